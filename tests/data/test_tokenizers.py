import huggingface_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cla_jax.data import ByteTokenizer, TextCorpus, Tokenizer, tokenizer_at, train_tokenizer


@given(st.text())
def test_round_trip(text):
    tokenizer: Tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode(tokens) == text


@given(st.lists(st.integers(-5, 600)))
def test_decode_takes_any_ids(tokens):
    text = ByteTokenizer().decode(tokens)
    by_hand = b"".join(bytes([t]) if 0 <= t < 256 else b"\xff" for t in tokens if t != 256)
    assert text == by_hand.decode(errors="replace")


def test_end_of_text_is_the_last_id():
    tokenizer = ByteTokenizer()
    assert tokenizer.end_of_text == 256 == tokenizer.vocab_size - 1
    assert tokenizer.decode([104, 105, 256, 300]) == "hi\ufffd"


TEXTS = [
    "the cat sat on the mat, the end",
    "Zwölf Boxkämpfer 🎉\n\n\tjagen <|endoftext|>",
    "",
    "  ",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 50)
    return train_tokenizer(TextCorpus(folder / "text.txt"), 270, folder / "new" / "bpe.json")


def test_trained_tokenizer(trained, tmp_path):
    tokenizer: Tokenizer = trained
    assert tokenizer.name == "bpe"
    assert tokenizer.vocab_size == 270
    assert tokenizer.encode("the cat").size < 5
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.end_of_text not in tokens
        assert tokenizer.decode(tokens) == text
    for one, many in zip(map(tokenizer.encode, TEXTS), tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(one, many)
    tokens = [*tokenizer.encode("the"), tokenizer.end_of_text, 999, -1, *tokenizer.encode(" mat")]
    assert tokenizer.decode(tokens) == "the\ufffd\ufffd mat"


def test_training_again_gives_the_same_tokenizer(trained, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "the cat sat on the mat and the dog sat on the cat\\n"}\n' * 50
    )
    again = train_tokenizer(TextCorpus(tmp_path), 270, tmp_path / "again.json")
    assert again.data == trained.data
    assert again.fingerprint == tokenizer_at(tmp_path / "again.json").fingerprint
    other = tokenizer_at(tmp_path / "again.json", "a")
    assert (other.end_of_text, other.vocab_size) == (trained.encode("a")[0], 270)
    assert other.fingerprint != again.fingerprint


def test_truncation_and_padding_of_the_json_are_off(trained, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_buffer(trained.data)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "a.json"))
    text = "the cat sat on the mat" * 3
    encoded = tokenizer_at(tmp_path / "a.json").encode_batch([text, "a"])
    assert [len(ids) for ids in encoded] == [len(trained.encode(text)), 1]


def test_clear_errors(trained, tmp_path):
    (tmp_path / "bpe.json").write_bytes(trained.data)
    with pytest.raises(
        ValueError, match=r"no tokenizer file .*bpa\.json; the nearest is 'bpe\.json"
    ):
        tokenizer_at(tmp_path / "bpa.json")
    with pytest.raises(ValueError, match=r"no tokenizer file byte; the nearest is 'bytes'"):
        tokenizer_at("byte")
    with pytest.raises(ValueError, match=r"'<\|end\|>' does not go with bytes"):
        tokenizer_at("bytes", "<|end|>")
    with pytest.raises(
        ValueError, match=r"bpe\.json has no token '<\|end\|>'; the nearest is '<\|en"
    ):
        tokenizer_at(tmp_path / "bpe.json", "<|end|>")
    model = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words\.json has none of .*</s>; .* --end-of-text"):
        tokenizer_at(tmp_path / "words.json")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no\.json is not a `tokenizers` JSON file"):
        tokenizer_at(tmp_path / "no.json")
    with pytest.raises(ValueError, match=r"vocab_size=256 must be at least 257"):
        train_tokenizer(TextCorpus(tmp_path / "no.json"), 256, tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"bpe\.json exists already"):
        train_tokenizer(TextCorpus(tmp_path / "no.json"), 300, tmp_path / "bpe.json")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text to train"):
        train_tokenizer(TextCorpus(tmp_path / "empty.txt"), 300, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_hub_tokenizer(trained, tmp_path, monkeypatch):
    asked = {}

    def download(repository, file, revision):
        asked.update(repository=repository, file=file, revision=revision)
        (tmp_path / "x").write_bytes(trained.data)
        return str(tmp_path / "x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = tokenizer_at("hf:owner/name@main")
    assert asked == {"repository": "owner/name", "file": "tokenizer.json", "revision": "main"}
    assert tokenizer.name == "owner/name"
    assert tokenizer.fingerprint == trained.fingerprint


@pytest.mark.parametrize("name", ["owner/name", "owner//name", "o/w/n"])
def test_hub_offline(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"could not get tokenizer\.json of '{name}' .*Offline, give"
    ):
        tokenizer_at(f"hf:{name}")
