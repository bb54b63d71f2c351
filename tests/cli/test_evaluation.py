"""`cla-jax evaluate` and `perplexity`: what is refused before a model is loaded, what comes out."""

import json
import sys

import pytest

import cla_jax.evaluation
from cla_jax import loading
from tests.evaluation.models import text_model

GOOD = {"query": "Question: why?\nAnswer:", "choices": [" one", " two"], "gold": 1}


@pytest.fixture(scope="module")
def small():
    return text_model()


@pytest.fixture
def loaded(monkeypatch, small):
    """What every checkpoint holds; the arguments it was loaded with."""
    calls = []

    def load(path, **options):
        calls.append((str(path), options))
        return small

    monkeypatch.setattr(loading, "load", load)
    return calls


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "piqa.jsonl").write_text((json.dumps(GOOD) + "\n") * 3)


def test_prints_a_table(run, loaded):
    code, out, _ = run("evaluate", "runs/mine", "--tasks", "piqa", "--data-dir", "eval", "--limit",
                       "2", "--tokenizer", "bytes", "--batch-size", "1")  # fmt: skip
    assert code == 0
    assert loaded == [("runs/mine", {"tokenizer": "bytes"})]
    assert "PIQA" in out
    assert "4 requests, 0 of them longer than the context of 40 tokens" in out
    assert "requests/s" in out


def test_writes_records_and_tables(run, loaded, tmp_path):
    arguments = ("evaluate", "runs/mine", "--tasks", "piqa", "--data-dir", "eval", "--batch-size",
                 "1", "--out", "new/out")  # fmt: skip
    code, _, _ = run(*arguments)
    assert code == 0
    out_dir = tmp_path / "new" / "out"
    names = {"evaluation.json", "results.json", "results.csv", "results.md"}
    assert {p.name for p in out_dir.iterdir()} == names
    assert json.loads((out_dir / "evaluation.json").read_text())["tasks"]["piqa"]["items"] == 3
    assert "acc,none" in json.loads((out_dir / "results.json").read_text())["results"]["piqa"]
    before = {p: p.read_bytes() for p in out_dir.iterdir()}
    code, _, error = run(*arguments)
    assert (code, error) == (
        1, "cla-jax: new/out holds an evaluation already; choose another --out"
    )  # fmt: skip
    assert {p: p.read_bytes() for p in out_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks"], "--tasks: name cla, mlkv or tasks of the harness"),
        (["--tasks", "piqa", "--out", "run"], "run is a model's directory; choose --out run/eval"),
        (["--tasks", "piqa", "--out", "bad"], "--out bad is not empty; choose a new directory"),
        (["--tasks", "piqa", "--out", "bad/piqa.jsonl"], "--out bad/piqa.jsonl is no directory"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "piqa", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--tasks", "piqa", "--data-dir", "evil"], "no directory evil of task data; the nearest"),
        (["--tasks", "mlkv", "--data-dir", "eval"], "has no file for\n  arc_easy: arc_easy.jsonl"),
        (["--tasks", "pika", "--data-dir", "eval"], "no task 'pika' (with --data-dir, tasks come "
         "from files alone); the nearest is 'piqa'"),
        (["--tasks", "piqa", "--data-dir", "bad"], "bad/piqa.jsonl, line 2: gold is 2, expected 0"),
        (["--tasks", "piqa", "--data-dir", "eval", "--include-path", "eval"],
         "--include-path eval: there is no task .yaml file in it"),
    ],
)  # fmt: skip
def test_refuses_before_a_model_is_loaded(run, loaded, tmp_path, arguments, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    rows = [GOOD, {**GOOD, "gold": 2}]
    (tmp_path / "bad" / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, error = run("evaluate", "runs/mine", *arguments)
    assert (code, out) == (1, "")
    assert error.startswith("cla-jax: ")
    assert message in error
    assert not loaded


def test_without_the_harness_says_what_to_install(run, loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "cla_jax.evaluation.harness", raising=False)
    monkeypatch.delattr(cla_jax.evaluation, "harness", raising=False)
    code, _, error = run("evaluate", "runs/mine", "--tasks", "piqa", "--data-dir", "eval")
    assert code == 1
    assert "pip install 'cla-jax[eval]'" in error
    assert len(error.splitlines()) == 1
    assert not loaded


def test_perplexity(run, loaded, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 4)
    code, out, _ = run("perplexity", "runs/mine", "--text", "a.txt", "--stride", "20")
    assert code == 0
    assert out.startswith("test, context 40, stride 20\ntoken  perplexity ")
    assert "(96)" in out
    assert "bits per byte" in out
    code, out, _ = run(
        "perplexity", "runs/mine", "--text", "a.txt", "--through-cache", "--cache-dtype", "int8"
    )
    assert code == 0
    assert out.startswith("test, context 40, stride 40, int8 cache\ntoken  perplexity ")
    for arguments, message in (
        (["--text", "b.txt"], "--text: there is no file b.txt"),
        (["--text", "empty.txt"], "nothing but empty files"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8: byte 3 is wrong"),
        (["--text", "a.txt", "--stride", "41"], "stride=41 must be 1 to the context of 40 tokens"),
    ):
        (tmp_path / "empty.txt").touch()
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        code, _, error = run("perplexity", "runs/mine", *arguments)
        assert (code, message in error) == (1, True)
