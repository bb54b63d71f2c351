"""Benchmark tables beside the papers', and MLKV Figure 4."""

import json

import pytest

from cla_jax import model
from cla_jax.reporting.accuracy_memory import AccuracyPoint, accuracy_memory, papers_points
from cla_jax.reporting.downstream import (
    Evaluation,
    Result,
    lines,
    load_evaluation,
    read_evaluation,
    table,
    write_evaluation,
    write_evaluations,
)
from cla_jax.reporting.papers import DOWNSTREAM, MLKV_160M, MLKV_410M
from cla_jax.reporting.report import report

MLKV = ("arc_easy", "lambada_openai", "piqa", "sciq")


def record(name: str, tasks=MLKV, acc: float = 0.25, error: float | None = 0.04) -> dict:
    config = model(name)
    metrics = {"acc": {"value": acc, "stderr": error}, "acc_norm": {"value": 0.9, "stderr": 0.1}}
    words = {"word_perplexity": {"value": 123.4, "stderr": None}}
    return {
        "model": name, "kv_bytes_per_token": config.kv_bytes_per_token, "context": 256,
        "shares_layers": config.kv_layers < config.num_layers, "limit": 50,
        "tasks": {
            t: {"metrics": words if t == "wikitext" else metrics, "items": 50, "data": f"{t}.jsonl"}
            for t in tasks
        },
        "requests": {"requests": 400, "truncated": 3, "seconds": 9.5, "compile_seconds": 1.5,
                     "requests_per_second": 50.0},
        "device": "cpu",
    }  # fmt: skip


def evaluation(name: str, **changes) -> Evaluation:
    return read_evaluation(record(name, **changes), name)


def test_the_papers_averages_are_those_of_their_columns():
    by_title = {paper.title: paper for paper in DOWNSTREAM}
    for title, results in (("MLKV Table 3", MLKV_160M), ("MLKV Table 4", MLKV_410M)):
        rows = by_title[title].rows
        assert rows.keys() == results.keys()
        for name, values in rows.items():
            # The paper rounds its columns, and its averages: 0.005 each, and float noise.
            assert sum(values) / 4 == pytest.approx(results[name].accuracy, abs=0.0101), name
    for paper in DOWNSTREAM:
        assert all(len(values) == len(paper.tasks) for values in paper.rows.values())


def test_ours_stand_below_the_papers_model_of_the_same_name():
    ours = [evaluation(n) for n in ("tiny/MQA-CLA2", "mini/H64-MQA-CLA2", "pythia-tiny/MLKV-6")]
    cla, _, _, mlkv, _ = DOWNSTREAM
    assert [(line.model, line.source) for line in lines(ours, cla)] == [
        ("H128-MQA", "paper"), ("H128-MQA-CLA2", "paper"), ("tiny/MQA-CLA2", "ours"),
        ("H64-MQA", "paper"), ("mini/H64-MQA-CLA2", "ours"),
    ]  # fmt: skip
    found = lines(ours, mlkv)
    at = [line.model for line in found].index("MLKV-6")
    assert found[at + 1].model == "pythia-tiny/MLKV-6"
    assert (found[at].results["sciq"], found[at].average) == (Result(69.9), Result(49.06))
    assert found[at + 1].results["sciq"] == Result(25.0, 4.0)


def test_average_and_its_error():
    assert evaluation("pythia-tiny/MHA").average == Result(25.0, 2.0)
    assert evaluation("pythia-tiny/MHA", tasks=MLKV[:3]).average is None
    assert evaluation("pythia-tiny/MHA", error=None).average == Result(25.0, None)


def test_reports_of_several_evaluations(tmp_path):
    directories = []
    for name in ("pythia-tiny/MHA", "pythia-tiny/MLKV-6"):
        directories.append(tmp_path / name.replace("/", "-"))
        write_evaluation(record(name, tasks=("wikitext", *MLKV)), {"results": {}}, directories[-1])
    (written,) = report(directories, tmp_path / "out")
    assert {p.name for p in written.files} == {
        "results.csv", "results.md", "accuracy.png", "accuracy.svg",
    }  # fmt: skip
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## MLKV Table 3" in text
    assert "25.00 ± 4.00" in text
    assert "400 requests, 3 longer than the 256 tokens of context" in text
    assert "arc_easy 50 (arc_easy.jsonl)" in text
    header, first, _ = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert header.startswith("model,wikitext,wikitext_stderr,arc_easy,arc_easy_stderr")
    assert first.startswith("pythia-tiny/MHA,123.4,,25,4,")
    (alone,) = report(directories[:1])
    assert alone.files[0].parent == directories[0]
    assert [str(c.header) for c in table([load_evaluation(directories[0])]).columns] == [
        "task", "items", "ours", "±", "the paper's",
    ]  # fmt: skip


def test_refusals(tmp_path):
    with pytest.raises(
        ValueError, match=r"nothing was evaluated in .*: evaluation.json is missing"
    ):
        load_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": {}}))
    with pytest.raises(ValueError, match="is no record of an evaluation: KeyError"):
        load_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"tasks"')
    with pytest.raises(ValueError, match=r"evaluation.json is not JSON"):
        load_evaluation(tmp_path)
    with pytest.raises(ValueError, match="no evaluations"):
        write_evaluations([], tmp_path)
    with pytest.raises(ValueError, match="no models to draw"):
        accuracy_memory([])


def test_figure_sets_pythia_beside_the_papers():
    points = [
        AccuracyPoint(f"pythia-tiny/{v}", size, acc, 1.0, shared)
        for v, size, acc, shared in (("MHA", 4096, 30.0, False), ("MLKV-6", 512, 29.0, True))
    ]
    ours, papers = accuracy_memory(points).axes
    assert {text.get_text() for text in ours.texts} == {"MHA", "MLKV-6"}
    assert {text.get_text() for text in papers.texts} == set(MLKV_160M)
    assert len(accuracy_memory([points[0]._replace(name="tiny/MQA")]).axes) == 1
    found = {point.name: point for point in papers_points("pythia-160m")}
    assert found["pythia-160m/MLKV-6"].cache_bytes == 2 * 2 * 64 * 6 * 2048
    assert found["pythia-160m/MLKV-6"].accuracy == 49.06
