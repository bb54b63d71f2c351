"""Checkpoint directories in and out: goldens of transformers, identical round trips, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import ModelConfig
from cla_jax.conversion import (
    HuggingFaceCheckpoint,
    convert,
    huggingface_directory,
    load_huggingface,
    save_huggingface,
    source_name,
)
from cla_jax.conversion.layouts import tensor_specs
from cla_jax.conversion.parameters import parameter_shapes
from cla_jax.registry import model
from cla_jax.sharing import KVSharing
from tests.conversion.checkpoints import (
    NAMES,
    golden,
    logits,
    relative_error,
    stored,
    write,
    written,
)


def random_params(config: ModelConfig, dtype: str = "float32"):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: random.standard_normal(s.shape).astype(dtype), parameter_shapes(config)
    )


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_goldens_of_transformers(name: str, tmp_path: Path):
    config, tensors, expected = golden(name)
    checkpoint = load_huggingface(write(tmp_path, config, tensors))
    assert relative_error(logits(checkpoint), expected) < 1e-4
    assert checkpoint.config.parameters == sum(t.size for t in tensors.values())


def test_there_are_a_dozen_goldens_of_each_family_and_they_differ():
    for family in ("llama/", "gpt_neox/"):
        found = [golden(name)[2] for name in NAMES if name.startswith(family)]
        assert len(found) >= 12
        assert len({f.tobytes() for f in found}) == len(found)


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama/llama3-all", "llama/wide-heads", "gpt_neox/sequential"])
def test_an_export_reproduces_every_tensor_byte_for_byte(name: str, dtype: str, tmp_path: Path):
    source = written(tmp_path / "source", name, dtype)
    checkpoint = load_huggingface(source)
    save_huggingface(checkpoint, tmp_path / "whole")
    save_huggingface(checkpoint, tmp_path / "shards", max_shard_bytes=5000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert stored(tmp_path / "whole") == stored(tmp_path / "shards") == stored(source)
    for copy in ("whole", "shards"):
        again = load_huggingface(tmp_path / copy, name="source")
        assert again.config == checkpoint.config
        jax.tree.map(np.testing.assert_array_equal, again.params, checkpoint.params)


def test_an_export_keeps_tokenizer_files_token_ids_and_stored_buffers(tmp_path: Path):
    config, tensors, _ = golden("gpt_neox/plain")
    tensors["gpt_neox.layers.0.attention.bias"] = np.tril(np.ones((1, 1, 8, 8), bool))
    tensors["gpt_neox.layers.0.attention.masked_bias"] = np.array(-1e9, np.float32)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    source = write(tmp_path / "source", {**config, "eos_token_id": 7}, tensors)
    (source / "tokenizer.json").write_text("{}")
    checkpoint = load_huggingface(source)
    save_huggingface(checkpoint, tmp_path / "out")
    save_huggingface(convert(checkpoint, KVSharing.none(3)), tmp_path / "converted")
    assert stored(tmp_path / "out") == stored(tmp_path / "converted") == stored(source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("tiny/MHA", "llama"),
        ("tiny/MQA-CLA3", "cla_llama"),
        ("pythia-tiny/MHA", "gpt_neox"),
        ("pythia-tiny/GQA-48", "cla_gpt_neox"),
        ("pythia-tiny/MLKV-6", "cla_gpt_neox"),
    ],
)
def test_models_of_our_own_come_back_with_their_owner_map(
    name: str, model_type: str, tmp_path: Path
):
    config = model(name)
    params = random_params(config, "float16")
    save_huggingface(HuggingFaceCheckpoint(config, params), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == model_type
    shared = config.kv_layers < config.num_layers
    assert values.get("sharing_pattern") == (
        config.sharing.sharing_pattern if model_type.startswith("cla") else None
    )
    assert not shared or model_type.startswith("cla")
    again = load_huggingface(tmp_path / "out", name=name)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Of a small model of either family with any owner map."""
    owners: list[int] = []
    for layer in range(draw(st.integers(1, 5))):
        owners.append(draw(st.sampled_from([*dict.fromkeys(owners), layer])))
    kv_heads = draw(st.integers(1, 2))
    return {
        "owners": tuple(owners),
        "neox": draw(st.booleans()),
        "d_model": draw(st.sampled_from([6, 8])),
        "kv_heads": kv_heads,
        "query_heads": kv_heads * draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from([2, 4, 6])),
        "separate_kv_norm": draw(st.booleans()),
        "tied_embeddings": draw(st.booleans()),
    }


def drawn_model(owners: tuple[int, ...], neox: bool, **drawn: Any) -> ModelConfig:
    return ModelConfig(
        name="drawn", sharing=KVSharing(owners), ffn_dim=5, vocab_size=11, rms_norm=not neox,
        swiglu=not neox, use_bias=neox, parallel_residual=neox, rotary_dim=2 if neox else None,
        **drawn,
    )  # fmt: skip


@given(drawn=sizes())
def test_tensors_cover_every_parameter_once_for_any_map(drawn: dict[str, Any]):
    config = drawn_model(**drawn)
    specs = tensor_specs(config)
    assert len({spec.name for spec in specs}) == len(specs)
    assert sum(spec.size for spec in specs) == config.parameters


@settings(max_examples=10)
@given(drawn=sizes())
def test_any_map_comes_back(drawn: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    config = drawn_model(**drawn)
    directory = tmp_path_factory.mktemp("any") / "out"
    params = random_params(config)
    save_huggingface(HuggingFaceCheckpoint(config, params), directory, max_shard_bytes=400)
    again = load_huggingface(directory, name="drawn")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


# --- refusals -------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path):
    config, tensors, _ = golden("llama/gqa")
    name = "model.layers.1.self_attn.k_proj.weight"
    without = {k: v for k, v in tensors.items() if k != name}
    with pytest.raises(ValueError, match=rf"tensor {name} is missing"):
        load_huggingface(write(tmp_path / "a", config, without))
    extra = {**tensors, "model.layers.1.self_attn.q_norm.weight": np.ones(8, np.float32)}
    with pytest.raises(ValueError, match=r"q_norm\.weight does not belong .* nearest"):
        load_huggingface(write(tmp_path / "b", config, extra))
    wrong = {**tensors, name: np.ones((8, 32), np.float32)}
    with pytest.raises(ValueError, match=rf"{name} has the shape \[8, 32\].* it \[16, 32\]"):
        load_huggingface(write(tmp_path / "c", config, wrong))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_huggingface(write(tmp_path / "d", {**config, "tie_word_embeddings": True}, tensors))


def test_dtypes_that_do_not_serve_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, tensors, _ = golden("llama/gqa")
    name = "model.layers.1.self_attn.v_proj.weight"
    half = {**tensors, name: tensors[name].astype(np.float16)}
    with (
        pytest.raises(ValueError, match=rf"{name} is F16, but .*k_proj.* is F32"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(
            "cla_jax.conversion.safetensors_io.read_tensors", None
        )  # the headers say so already
        load_huggingface(write(tmp_path / "a", config, half))
    double = {**tensors, name: tensors[name].astype(np.float64)}
    with pytest.raises(ValueError, match=rf"{name} is F64, which is not supported"):
        load_huggingface(write(tmp_path / "b", config, double))


def test_a_tied_copy_of_the_embedding_is_accepted(tmp_path: Path):
    config, tensors, expected = golden("llama/tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert (
        relative_error(logits(load_huggingface(write(tmp_path, config, tensors))), expected) < 1e-4
    )


def test_directories_that_hold_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match="is no Hugging Face checkpoint: it is no directory"):
        load_huggingface(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"it holds no config\.json"):
        load_huggingface(tmp_path)
    directory = written(tmp_path / "pickled")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .* refused"):
        load_huggingface(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_huggingface(directory)
    (directory / "config.json").write_text('{"model": {}, "training": {}}')
    with pytest.raises(ValueError, match=r"config\.json has no model_type"):
        load_huggingface(directory)
    (directory / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"pickled is a run of `cla-jax train`, no Hugging Face"):
        load_huggingface(directory)


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path / "pythia")
    with pytest.raises(ValueError, match=r"no directory .*pythai; the nearest is .*/pythia\."):
        huggingface_directory(tmp_path / "pythai")
    with pytest.raises(ValueError, match="is a file"):
        huggingface_directory(tmp_path / "pythia" / "config.json")
    assert huggingface_directory(tmp_path / "pythia") == tmp_path / "pythia"
    assert source_name(tmp_path / "pythia/") == source_name(tmp_path / "pythia/.") == "pythia"
    assert source_name("hf:no-one/nothing@v1") == "no-one/nothing@v1"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"no-one/nothing.* could not be had .* Offline, give a"):
        huggingface_directory("no-one/nothing")


def test_a_model_on_the_hub_is_fetched_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **arguments: Any) -> str:
        asked.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert huggingface_directory("hf:EleutherAI/pythia-160m@step1000") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("EleutherAI/pythia-160m", "step1000")
    assert not any(p.endswith((".bin", ".pt")) or p == "*" for p in asked["allow_patterns"])


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = load_huggingface(written(tmp_path / "source"))
    with pytest.raises(ValueError, match="exists already; nothing in it was touched"):
        save_huggingface(checkpoint, tmp_path / "source")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("cla_jax.conversion.safetensors_io.write_checksums", full)
    with pytest.raises(OSError, match="no space left"):
        save_huggingface(checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_parameters_of_another_model_and_families_that_are_none(tmp_path: Path):
    checkpoint = load_huggingface(written(tmp_path / "source"))
    wider = dataclasses.replace(checkpoint.config, ffn_dim=45)
    with pytest.raises(
        ValueError, match=r"parameter layers\.0\.0\.ffn\.down\.kernel has the shape"
    ):
        save_huggingface(dataclasses.replace(checkpoint, config=wider), tmp_path / "out")
    mixed = dataclasses.replace(checkpoint.config, rms_norm=False)
    with pytest.raises(ValueError, match="rms_norm=False is not llama's; swiglu=True"):
        save_huggingface(dataclasses.replace(checkpoint, config=mixed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_an_export_is_found_by_its_checksum(tmp_path: Path):
    save_huggingface(load_huggingface(written(tmp_path / "source")), tmp_path / "out")
    for file in ("model.safetensors", "config.json"):
        copy = shutil.copytree(tmp_path / "out", tmp_path / f"flipped-{file}")
        data = bytearray((copy / file).read_bytes())
        data[-3] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(ValueError, match=file):
            load_huggingface(copy)
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_huggingface(tmp_path / "out")
