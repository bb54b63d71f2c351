import json
import sys

import pytest
import zstandard

from cla_jax import cli
from cla_jax.data import open_prepared, open_tokenizer


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `cla-jax`; returns its exit code and what it printed."""

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cla-jax", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        text = printed.out + printed.err + (code if isinstance(code, str) else "")
        return (1 if isinstance(code, str) else int(str(code or 0))), text

    return command


@pytest.fixture
def text(tmp_path):
    """Forty records, compressed."""
    records = [{"text": f"The {i}th of forty. " * 20, "meta": {"n": i}} for i in range(40)]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "text.jsonl.zst").write_bytes(zstandard.compress(data))
    return tmp_path / "text.jsonl.zst"


def test_from_text_to_a_prepared_directory(run, text, tmp_path):
    bpe, out = tmp_path / "bpe.json", tmp_path / "out"
    code, printed = run("train-tokenizer", text, "--vocab-size", 290, "--out", bpe)
    assert (code, "290 ids, <|endoftext|> ends a document" in printed) == (0, True)
    arguments = ("prepare-data", text, "--tokenizer", bpe, "--out", out, "--sequence-length", 64)
    code, printed = run(*arguments)
    assert code == 0
    streams = open_prepared(out)
    documents = (streams.train.num_documents, streams.validation.num_documents)
    assert sum(documents) == 40
    rows = {line[:24].strip(): line[24:].split() for line in printed.splitlines()}
    assert rows["documents"] == [f"{n}" for n in documents]
    assert rows["tokens"] == [f"{s.num_tokens:,}" for s in (streams.train, streams.validation)]
    assert rows["bytes per token"][0] == f"{streams.train.bytes_per_token:.4f}"
    assert rows["rows of 64, concat"][0] == str((streams.train.num_tokens - 1) // 64)
    decoded = open_tokenizer(out).decode(streams.train.tokens[: streams.train.offsets[1]])
    assert decoded.startswith("The ")
    assert run(*arguments) == (0, printed)


def test_refusals_leave_what_is_there(run, text, tmp_path):
    out = tmp_path / "out"
    good = text.read_bytes()
    text.write_bytes(good[:-20])
    code, printed = run("prepare-data", text, "--out", out)
    assert code == 1
    assert f"text.jsonl.zst is truncated at byte {len(good) - 20}" in printed
    assert not out.exists()
    text.write_bytes(good)
    assert run("prepare-data", text, "--out", out)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for arguments, expected in {
        ("prepare-data", text, "--tokenizer", "byte", "--out", out): "the nearest is 'bytes'",
        ("prepare-data", text, "--text-key", "txt", "--out", out): "key 'txt'",
        ("prepare-data", tmp_path / "no", "--out", out): "no such text file or folder",
        ("prepare-data", text, "--validation", tmp_path / "no", "--out", out): "no such text",
        ("prepare-data", text, "--out", tmp_path): "is not a prepared directory",
        ("train-tokenizer", text, "--vocab-size", 100, "--out", tmp_path / "b"): "at least 257",
    }.items():
        code, printed = run(*arguments)
        assert code == 1
        assert expected in printed
        assert "Traceback" not in printed
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
