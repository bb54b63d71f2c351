"""Runs become models that write text; what is refused, and with which words."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import cla_jax
from cla_jax.configs import DataConfig, ExecutionConfig, ModelConfig, OptimizerConfig, TrainConfig
from cla_jax.conversion import HuggingFaceCheckpoint, save_huggingface
from cla_jax.data import ByteTokenizer, JsonTokenizer
from cla_jax.data.prepared import bind_prepared
from cla_jax.loading import TextModel, load
from cla_jax.sharing import KVSharing
from cla_jax.training import train
from tests.training.streams import write_streams

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=259, sequence_length=64, separate_kv_norm=True,
)  # fmt: skip
TRAINING = TrainConfig(
    steps=60,
    data=DataConfig(sequence_length=32, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=2e-2),
    execution=ExecutionConfig(compute_dtype="float32"),
    checkpoint_every=40,
)
PROMPT = "the cat sat "


def trained(directory, tokenizer):
    """A run of a few steps, on streams that lie in a prepared directory."""
    texts = {"train": ["the cat sat on the mat. " * 40] * 4, "validation": ["the mat sat. " * 5]}
    data = directory / "data"
    data.mkdir()
    bind_prepared(data, tokenizer)
    run = train(CONFIG, TRAINING, write_streams(data, texts, tokenizer), directory / "run")
    shutil.rmtree(data)  # a run is complete without
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("bytes"), ByteTokenizer())


@pytest.fixture(scope="module")
def model(run) -> TextModel:
    return load(run.directory)


@pytest.fixture
def copy(run, tmp_path):
    """The run, to be spoilt."""
    return shutil.copytree(run.directory, tmp_path / "run")


def word_tokenizer() -> JsonTokenizer:
    """Bytes as tokens of another kind, and an end token of its own name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", *alphabet, "th"]
    tokenizer = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return JsonTokenizer(tokenizer.to_str().encode(), "words", "<end>")


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- loading --------------------------------------------------------------------------------------


def test_holds_the_last_steps_parameters(run, model):
    assert model.config == CONFIG
    assert isinstance(model.tokenizer, ByteTokenizer)
    tokens = jnp.asarray([list(PROMPT.encode())], jnp.int32)
    expected = run.model(run.params)(tokens)
    assert model.decoder.execution.compute_dtype == "float32"
    np.testing.assert_array_equal(model.decoder(tokens), expected)
    assert {x.dtype.name for x in jax.tree.leaves(model.decoder)} == {"float32"}
    assert load(run.directory, compute_dtype="bfloat16").decoder(tokens).dtype == jnp.float32


def test_an_unfinished_run_gives_its_newest_checkpoint(copy, capsys):
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "60")
    before = sorted(p for p in copy.rglob("*"))
    load(copy)
    assert f"{copy} is not finished: this is its step 40" in capsys.readouterr().err
    assert sorted(p for p in copy.rglob("*")) == before


def test_finds_the_only_run_below(copy, tmp_path):
    assert load(tmp_path).config == CONFIG
    shutil.copytree(copy, tmp_path / "sweep" / "other")
    with pytest.raises(ValueError, match=r"there are 2 runs below .*\n  .*run\n  .*sweep/other$"):
        load(tmp_path)


def test_importing_the_package_imports_no_arrays():
    code = "import sys, cla_jax; print(*sorted({'jax', 'orbax', 'grain'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"
    assert cla_jax.load is load
    assert cla_jax.TextModel is TextModel


# --- Hugging Face directories ---------------------------------------------------------------------


@pytest.fixture
def exported(run, tmp_path):
    """The run's model as a Hugging Face directory, without a tokenizer."""
    numpy_params = jax.tree.map(np.asarray, run.params)
    save_huggingface(HuggingFaceCheckpoint(CONFIG, numpy_params), tmp_path / "exported")
    return tmp_path / "exported"


def test_a_hugging_face_directory_writes_what_the_run_writes(run, model, exported):
    loaded = load(exported, tokenizer="bytes")
    assert loaded.decoder.execution.compute_dtype == "float32"
    assert loaded.config.sharing == CONFIG.sharing
    tokens = jnp.asarray([list(PROMPT.encode())], jnp.int32)
    np.testing.assert_array_equal(loaded.decoder(tokens), run.model(run.params)(tokens))
    text = loaded.generate(PROMPT, max_new_tokens=8).text
    assert text == model.generate(PROMPT, max_new_tokens=8).text


def test_entries_that_are_not_known_are_told(exported, capsys):
    load(exported, tokenizer="bytes")
    assert "not known here" not in capsys.readouterr().err
    (exported / "checksums.json").unlink()
    edit(exported / "config.json", clip_qkv=8.0)
    load(exported, tokenizer="bytes")
    assert capsys.readouterr().err.endswith("what they change is lost: clip_qkv=8.0\n")
    edit(exported / "config.json", rope_tetha=1e6)
    load(exported, tokenizer="bytes")
    assert "rope_tetha=1000000.0 (the nearest that is known is rope_theta)" in (
        capsys.readouterr().err
    )


def test_entries_of_a_run_that_are_not_known_are_told(copy, capsys):
    load(copy)
    assert "not known here" not in capsys.readouterr().err
    edit(copy / "config.json", tokeniser=1, owner="me")
    load(copy)
    message = capsys.readouterr().err
    assert "passed over: tokeniser (the nearest that is known is tokenizer), owner\n" in message
    record = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", model={**record["model"], "head_dims": 8})
    with pytest.raises(ValueError, match=r"unknown key 'head_dims'.* the nearest is 'head_dim'"):
        load(copy)


def test_its_config_says_which_token_ends_a_document(exported, tmp_path):
    own = word_tokenizer()  # whose <end> is none of the usual names
    (exported / "tokenizer.json").write_bytes(own.data)
    (exported / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"none of the end-of-text tokens .* as eos_token_id in"):
        load(exported)
    for ends in (own.end_of_text, [own.end_of_text, 7]):
        edit(exported / "config.json", eos_token_id=ends)
        loaded = load(exported)
        assert loaded.tokenizer.end_of_text == own.end_of_text
        assert loaded.tokenizer.encode("that").tolist() == own.encode("that").tolist()
    named = tmp_path / "words.json"
    (exported / "tokenizer.json").rename(named)
    assert load(exported, tokenizer=named).tokenizer.end_of_text == own.end_of_text
    named.rename(exported / "tokenizer.json")
    edit(exported / "config.json", eos_token_id=9999)
    with pytest.raises(ValueError, match=r"tokenizer.json has no token of the id 9999"):
        load(exported)


def test_says_what_is_wrong_with_a_hugging_face_directory(exported):
    (exported / "checksums.json").unlink()
    weights = exported / "model.safetensors"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(exported / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"shard .*model-00001-of-00002.safetensors is missing"):
        load(exported)
    (exported / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin and no safetensors: pickled files"):
        load(exported)
    (exported / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        load(exported)
    for config in ("{}", "{"):
        (exported / "config.json").write_text(config)
        with pytest.raises(ValueError, match=r"there is no run in .*exported"):
            load(exported)


def test_refuses_a_hugging_face_directory_without_its_tokenizer(exported, tmp_path):
    with pytest.raises(ValueError, match=r"exported holds no tokenizer.json: name its tokenizer"):
        load(exported)
    alphabet = {f"w{i}": i for i in range(400)} | {"<|endoftext|>": 400}
    large = tokenizers.Tokenizer(models.WordLevel(alphabet, "w0"))
    (tmp_path / "large.json").write_text(large.to_str())
    with pytest.raises(ValueError, match=r"'large' has 401 ids, more than the 259 of the model"):
        load(exported, tokenizer=tmp_path / "large.json")
    (exported / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"model.safetensors"):
        load(exported, tokenizer="bytes")


# --- refusals -------------------------------------------------------------------------------------


def test_refuses_places_without_a_run(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "rum": r"there is no .*rum; the nearest is .*run$",
        tmp_path / "zzz" / "run": r"\(.* has no 'zzz'\)",
        tmp_path / "empty": r"there is no run in .*empty: `cla-jax train`",
        copy / "checkpoints" / "60": r"is part of a run: give the run's directory, .*run$",
        copy / "config.json": r"is part of a run: give the run's directory, .*run$",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(path)


def spoil_json(run):
    (run / "config.json").write_text("{")


def drop_a_key(run):
    config = json.loads((run / "config.json").read_text())
    del config["model"]["d_model"]
    edit(run / "config.json", model=config["model"])


def change_the_model(run):
    config = json.loads((run / "config.json").read_text())
    edit(run / "config.json", model={**config["model"], "ffn_dim": 48})


def drop_the_model(run):
    config = json.loads((run / "config.json").read_text())
    del config["model"]
    (run / "config.json").write_text(json.dumps(config))


def drop_checkpoints(run):
    for step in (run / "checkpoints").iterdir():
        shutil.rmtree(step)


def cut_a_checkpoint(run):
    for path in (run / "checkpoints" / "60" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_json, r"config.json is not a run's"),
        (drop_a_key, r"config.json is not a run's: a model config lacks d_model"),
        (drop_the_model, r"config.json is not a run's: it lacks 'model'"),
        (change_the_model, r"checkpoints/60 is of another config(.|\n)*ffn_dim: 32 there, 48 here"),
        (drop_checkpoints, r"there is no checkpoint in .*checkpoints"),
        (cut_a_checkpoint, r"checkpoints/60 is damaged: .* the one before it is taken"),
    ],
)
def test_refuses_damaged_runs(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_run_keeps_its_tokenizer(tmp_path):
    own = word_tokenizer()
    run = trained(tmp_path, own).directory
    loaded = load(run)
    assert loaded.tokenizer.fingerprint == own.fingerprint
    assert loaded.tokenizer.name == "words"
    one = loaded.generate(PROMPT, max_new_tokens=8)
    assert own.decode(own.encode(PROMPT).tolist() + list(one.tokens)) == PROMPT + one.text

    path, other = run / "tokenizer.json", tmp_path / "other.json"
    kept = path.read_bytes()
    other.write_bytes(kept.replace(b"<end>", b"<|endoftext|>"))
    with pytest.raises(ValueError, match=r"bytes .* is not the tokenizer .*: it needs no --token"):
        load(run, tokenizer="bytes")
    path.write_bytes(kept + b"\n")
    with pytest.raises(ValueError, match=r"tokenizer.json has changed"):
        load(run)
    path.rename(tmp_path / "mine.json")
    with pytest.raises(ValueError, match=r"does not hold the tokenizer .* name it with --token"):
        load(run)
    with pytest.raises(ValueError, match=r"no token '<end>'"):
        load(run, tokenizer=other)
    with pytest.raises(ValueError, match=r"mine.json .* is not the tokenizer"):
        load(run, tokenizer=tmp_path / "mine.json")
    (tmp_path / "mine.json").write_bytes(kept)
    assert load(run, tokenizer=tmp_path / "mine.json").tokenizer.fingerprint == own.fingerprint


def test_runs_of_before_tokenizers_were_kept(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["tokenizer"]
    (copy / "config.json").write_text(json.dumps(config))
    assert isinstance(load(copy).tokenizer, ByteTokenizer)
    assert isinstance(load(copy, tokenizer="bytes").tokenizer, ByteTokenizer)
    edit(copy / "config.json", data={"tokenizer": "f" * 64})
    with pytest.raises(ValueError, match=r"does not hold the tokenizer .*fingerprint f{16}\)"):
        load(copy)


# --- writing text ---------------------------------------------------------------------------------


def test_continues_one_prompt_or_several(run, model):
    decoder, ids = run.model(run.params), list(PROMPT.encode())
    for _ in range(20):
        padded = jnp.asarray([ids + [0] * (40 - len(ids))], jnp.int32)
        ids.append(int(np.argmax(decoder(padded)[0, len(ids) - 1])))
    added = ids[len(PROMPT) :]
    one = model.generate(PROMPT, max_new_tokens=20, cache_dtype="float32")
    assert list(one.tokens) == added
    assert (one.prompt, one.text, one.finished) == (PROMPT, bytes(added).decode(), "length")
    assert one.text.startswith("on the ")
    several = model.generate([PROMPT, "mat", PROMPT], max_new_tokens=20, cache_dtype="float32")
    assert [several[0], several[2]] == [one, one]
    assert several[1].prompt == "mat"


def test_stops_and_streams(model):
    pieces = {0: "", 1: ""}

    def on_text(row, text):
        pieces[row] += text

    prompts = [PROMPT, "on "]
    whole = model.generate(prompts, max_new_tokens=40)
    stop = whole[0].text[20:25]
    before = [one.text.partition(stop)[0] for one in whole]
    found = model.generate(prompts, max_new_tokens=40, stop=["zzz", stop], on_text=on_text)
    assert [one.text for one in found] == before == [pieces[0], pieces[1]]
    assert found[0].finished == "stop_string"
    assert bytes(found[0].tokens).decode() == before[0]


def test_draws_by_seed(model):
    def draw(seed):
        return [
            c.text for c in model.generate(["a"] * 3, max_new_tokens=12, temperature=2.0, seed=seed)
        ]

    assert draw(0) == draw(0)
    assert len({*draw(0), *draw(1)}) == 6


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts: give at least one"),
        ("", {}, "the prompt is empty"),
        (["a", ""], {"max_new_tokens": 4}, "prompt 2 of 2 is empty"),
        ("a", {"top_p": 1.5}, "top_p=1.5"),
        ("a", {"stop": ("",)}, "empty string"),
    ],
)
def test_refuses_to_continue(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **options)


def test_checks_prompts_before_any_is_continued(model):
    model.check(["a", "b" * 60], 4)
    with pytest.raises(ValueError, match=r"prompt 2 of 2: 60 tokens and 5 new ones exceed"):
        model.check(["a", "b" * 60], 5)
