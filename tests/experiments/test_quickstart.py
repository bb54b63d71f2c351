"""The quickstart, by its path: a few steps end to end, a second call, and bad input."""

import csv
import importlib.util
import sys

import pytest

from cla_jax.training import trainer
from tests.experiments.processes import ROOT, run

SCRIPT = ROOT / "experiments" / "quickstart.py"
TEXT = "the cat [sat] on the [/mat] of a [bold]list[int][/bold]; :smile: x[:1].\n"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_end_to_end_then_only_redrawn(quickstart, tmp_path, capsys, monkeypatch):
    (tmp_path / "my.txt").write_text(TEXT * 60)
    options = quickstart.Quickstart(
        text=tmp_path / "my.txt", out=tmp_path / "out", steps=4, batch_size=2, sequence_length=64,
        new_tokens=8,
    )  # fmt: skip
    quickstart.main(options)
    first = capsys.readouterr().out

    results = list((tmp_path / "out").rglob("results.csv"))
    assert len(results) == 1
    rows = list(csv.DictReader(results[0].read_text().splitlines()))
    assert [row["model"] for row in rows] == ["tiny/MQA", "tiny/MQA-CLA2"]
    assert [int(row["kv_bytes_per_token"]) for row in rows] == [768, 384]
    assert [float(row["kv_cache_ratio"]) for row in rows] == [1.0, 0.5]
    perplexities = [float(row["validation_perplexity"]) for row in rows]
    assert all(1 < p < 300 for p in perplexities)
    ratio = float(rows[1]["validation_perplexity_ratio"])
    assert ratio == pytest.approx(perplexities[1] / perplexities[0], abs=1e-3)

    figures = sorted(results[0].parent.glob("*.[ps][nv]g"))
    assert [f.name for f in figures] == ["loss.png", "loss.svg", "pareto.png", "pareto.svg"]
    for figure in figures:
        data = figure.read_bytes()
        assert data.startswith(b"\x89PNG" if figure.suffix == ".png" else b"<?xml")
        assert len(data) > 5_000
        assert f"wrote {figure}" in first
    for needed in ("noise", "768", "384", *(row["parameters"] for row in rows)):
        assert needed in first.replace(",", ""), needed
    # The prompt is the validation text, as it is.
    assert TEXT.splitlines()[0][:60] in first

    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("metrics.jsonl")}
    assert len(before) == 2
    monkeypatch.setattr(trainer._Loop, "run", None)  # training again would fail
    for figure in figures:
        figure.unlink()
    quickstart.main(options)
    second = capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert all(f.exists() for f in figures)
    untimed = [[line for line in out.splitlines() if "s in all" not in line] for out in
               (first, second)]  # fmt: skip
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param(None, ["no such text file", "my.txt"], marks=pytest.mark.slow),
        pytest.param(b"", ["my.txt", "no bytes of text"], marks=pytest.mark.slow),
        (b"caf\xe9 au lait\n" * 200, ["my.txt", "not UTF-8", "offset 3"]),
    ],
    ids=["missing", "empty", "not UTF-8"],
)
def test_bad_text_is_one_line(tmp_path, content, parts):
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    code, out, err = run("quickstart", "--text", "my.txt", "--out", "out", cwd=tmp_path)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("quickstart: ")
    assert all(part in lines[0] for part in parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 250}, "250 tokens and 160 new"),
        ({"prompt": ""}, "prompt is empty"),
        ({"new_tokens": 300}, "300 new"),
        ({"new_tokens": -1}, "max_new_tokens=-1"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_options_are_refused_before_training(
    quickstart, tmp_path, monkeypatch, changes, message
):
    (tmp_path / "my.txt").write_text(TEXT * 60)

    def trained(*_, **__):
        pytest.fail("it began to train")

    monkeypatch.setattr("cla_jax.training.train", trained)
    options = quickstart.Quickstart(text=tmp_path / "my.txt", out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        quickstart.main(quickstart.dataclasses.replace(options, **changes))
