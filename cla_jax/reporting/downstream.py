"""Benchmark results beside the papers': CLA Tables 4, 6 and 8, MLKV Tables 3 and 4, and Figure 4.

Reads what `cla-jax evaluate --out` wrote.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
from cla_jax.reporting.accuracy_memory import AccuracyPoint, accuracy_memory
from cla_jax.reporting.papers import DOWNSTREAM, DownstreamTable, variant_in_paper
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table

__all__ = [
    "Evaluation",
    "Line",
    "Result",
    "lines",
    "load_evaluation",
    "read_evaluation",
    "table",
    "write_evaluation",
    "write_evaluations",
]

FILE = "evaluation.json"
AVERAGED = ("arc_easy", "lambada_openai", "piqa", "sciq")  # by the MLKV paper
_HEADINGS = {
    "wikitext": "Wikitext, word perplexity", "hellaswag": "HellaSwag", "piqa": "PIQA",
    "winogrande": "WinoGrande", "sciq": "SciQ", "openbookqa": "OpenBookQA", "boolq": "BoolQ",
    "arc_easy": "ARC-Easy", "lambada_openai": "LAMBADA", "average": "average of MLKV's four",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """A number of a table: an accuracy in per cent, or a perplexity.

    Attributes:
        value: the number.
        stderr: its standard error, if there is one.
    """

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.2f}"
        return f"{self.value:.2f}{error}" if self.value < 1e6 else f"{self.value:.3g}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model scored.

    Attributes:
        model: its name.
        place: where the record was read.
        kv_bytes_per_token: of the 16-bit KV cache.
        shares_layers: whether it shares K/V across layers.
        context: tokens that it reads.
        limit: items of each task, if not all.
        results: by task, in the order in which they were asked for.
        items: of each task.
        files: that the items came from; None: the hub.
        requests: counts and times.
        device: its kind.
    """

    model: str
    place: str
    kv_bytes_per_token: int
    shares_layers: bool
    context: int
    limit: int | None
    results: Mapping[str, Result]
    items: Mapping[str, int]
    files: Mapping[str, str | None]
    requests: Mapping[str, int | float]
    device: str

    @property
    def average(self) -> Result | None:
        """Over the MLKV paper's four tasks; None unless all were scored."""
        return _average(self.results)


@dataclasses.dataclass(frozen=True)
class Line:
    """A model in a table: one of ours, or of the paper's, with the average as printed there."""

    model: str
    source: str
    results: Mapping[str, Result]
    average: Result | None


class _Cell(NamedTuple):
    model: str
    task: str
    result: Result
    items: int | None
    printed: str | None


_CELLS: tuple[Column[_Cell], ...] = (
    Column("model", "model", lambda c: c.model),
    Column("task", "task", lambda c: _HEADINGS.get(c.task, c.task)),
    Column("items", "items", lambda c: c.items, "d"),
    Column("ours", "ours", lambda c: c.result.value, ".2f"),
    Column("stderr", "±", lambda c: c.result.stderr, ".2f"),
    Column("paper", "the paper's", lambda c: c.printed),
)


def read_evaluation(record: Mapping[str, Any], place: str) -> Evaluation:
    """The record of `cla_jax.evaluation.harness.evaluate`.

    Raises:
        ValueError: something else (says where and what is missing).
    """
    try:
        tasks = record["tasks"]
        return Evaluation(
            model=record["model"], place=place,
            kv_bytes_per_token=record["kv_bytes_per_token"],
            shares_layers=record["shares_layers"], context=record["context"],
            limit=record["limit"],
            results={name: _result(task["metrics"]) for name, task in tasks.items()},
            items={name: task["items"] for name, task in tasks.items()},
            files={name: task["data"] for name, task in tasks.items()},
            requests=record["requests"], device=record["device"],
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is no record of an evaluation: {error!r}") from None


def load_evaluation(directory: Path) -> Evaluation:
    """Reads `evaluation.json`.

    Raises:
        ValueError: nothing, or something else.
    """
    path = directory / FILE
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"nothing was evaluated in {directory}: {FILE} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return read_evaluation(record, str(path))


def write_evaluation(record: Mapping[str, Any], harness: Mapping[str, Any], out: Path) -> None:
    """Writes `results.json`, the harness's own, and `evaluation.json`."""
    write_atomically(out / "results.json", (json.dumps(harness, indent=2) + "\n").encode())
    write_atomically(out / FILE, (json.dumps(record, indent=2) + "\n").encode())


def lines(evaluations: Sequence[Evaluation], paper: DownstreamTable) -> list[Line]:
    """The paper's models in their order, each followed by ours of the same variant; then others.

    Ours are those of the table's scales.
    """
    ours = [e for e in evaluations if e.model.partition("/")[0] in paper.scales]
    found = list[Line]()
    for variant, values in paper.rows.items():
        printed = {t: Result(v) for t, v in zip(paper.tasks, values, strict=True)}
        average = paper.averages.get(variant)
        found.append(Line(variant, "paper", printed, None if average is None else Result(average)))
        found += [_line(e) for e in ours if _variant(e) == variant]
    return found + [_line(e) for e in ours if _variant(e) not in paper.rows]


def _line(evaluation: Evaluation) -> Line:
    return Line(evaluation.model, "ours", evaluation.results, evaluation.average)


def table(evaluations: Sequence[Evaluation]) -> Table:
    """A row for each model and task, the papers' numbers at its end, for the terminal."""
    rows = [
        _Cell(e.model, task, result, e.items.get(task), _printed(e, task))
        for e in evaluations
        for task, result in (*e.results.items(), *([("average", e.average)] if e.average else []))
    ]
    columns = [c for c in _CELLS if c.key != "model" or len(evaluations) > 1]
    title = None if len(evaluations) > 1 else evaluations[0].model
    return terminal_table(rows, columns, title=title)


def write_evaluations(evaluations: Sequence[Evaluation], out: Path) -> Written:
    """Writes results.csv, results.md and, of models with the MLKV tasks, accuracy.png and .svg.

    Raises:
        ValueError: no evaluations.
    """
    if not evaluations:
        raise ValueError("no evaluations to set beside each other: expected at least one")
    ours = [_line(e) for e in evaluations]
    csv = csv_text(ours, _csv_columns(_tasks(evaluations)))
    drawn = [e for e in evaluations if e.average is not None]
    written = [
        write_atomically(out / "results.csv", csv.encode()),
        write_atomically(out / "results.md", _document(evaluations, bool(drawn)).encode()),
    ]
    if drawn:
        points = [
            AccuracyPoint(e.model, e.kv_bytes_per_token * e.context, average.value,
                          average.stderr or 0.0, e.shares_layers)
            for e in drawn
            if (average := e.average) is not None
        ]  # fmt: skip
        written += figures.save(accuracy_memory(points), out / "accuracy")
    return Written(tuple(written), table(evaluations))


def _variant(evaluation: Evaluation) -> str:
    return variant_in_paper(evaluation.model)


def _printed(evaluation: Evaluation, task: str) -> str | None:
    """What the papers print of this model and task."""
    found = list[str]()
    variant = _variant(evaluation)
    for paper in DOWNSTREAM:
        values = paper.rows.get(variant)
        if values is None or evaluation.model.partition("/")[0] not in paper.scales:
            continue
        printed = dict(zip(paper.tasks, values, strict=True))
        if variant in paper.averages:
            printed["average"] = paper.averages[variant]
        if task in printed:
            # "CLA Table 4 (Wikitext: Table 3)"
            own, _, wikitext = paper.title.rstrip(")").partition(" (Wikitext: ")
            number = wikitext if task == "wikitext" else own.partition(" ")[2]
            found.append(f"{printed[task]:.2f} ({number})")
    return ", ".join(found) or None


def _result(metrics: Mapping[str, Mapping[str, float | None]]) -> Result:
    """The number that the papers print of a task; of another task its first metric."""
    name = next((m for m in ("acc", "word_perplexity") if m in metrics), next(iter(metrics)))
    value, error = metrics[name]["value"], metrics[name]["stderr"]
    assert value is not None
    percent = 100.0 if name.startswith("acc") else 1.0
    return Result(percent * value, None if error is None else percent * error)


def _average(results: Mapping[str, Result]) -> Result | None:
    if not all(task in results for task in AVERAGED):
        return None
    chosen = [results[task] for task in AVERAGED]
    errors = [result.stderr for result in chosen if result.stderr is not None]
    whole = len(errors) == len(chosen)
    return Result(
        sum(result.value for result in chosen) / len(chosen),
        math.sqrt(sum(e * e for e in errors)) / len(chosen) if whole else None,
    )


def _tasks(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task for e in evaluations for task in e.results))


def _columns(tasks: Sequence[str]) -> list[Column[Line]]:
    columns = [
        Column[Line]("model", "model", lambda line: line.model),
        Column[Line]("source", "whose", lambda line: line.source),
    ]
    for task in tasks:
        columns.append(
            Column(task, _HEADINGS.get(task, task), lambda line, t=task: _shown(line.results, t))
        )
    if set(AVERAGED) <= set(tasks):
        columns.append(Column("average", _HEADINGS["average"], lambda line: _str(line.average)))
    return columns


def _csv_columns(tasks: Sequence[str]) -> list[Column[Line]]:
    columns = [Column[Line]("model", "model", lambda line: line.model)]
    for task in tasks:
        columns += [
            Column[Line](task, task, lambda line, t=task: _value(line.results, t), ".6g"),
            Column[Line](f"{task}_stderr", task, lambda line, t=task: _error(line.results, t),
                         ".3g"),
        ]  # fmt: skip
    return columns


def _str(result: Result | None) -> str | None:
    return None if result is None else str(result)


def _shown(results: Mapping[str, Result], task: str) -> str | None:
    return _str(results.get(task))


def _value(results: Mapping[str, Result], task: str) -> float | None:
    return results[task].value if task in results else None


def _error(results: Mapping[str, Result], task: str) -> float | None:
    return results[task].stderr if task in results else None


def _document(evaluations: Sequence[Evaluation], drawn: bool) -> str:
    text = [
        "# Benchmarks, zero-shot",
        "",
        "Accuracies are in per cent (`acc`, not normalised by length), ± standard errors. "
        "Perplexities have none.",
        "",
        markdown([_line(e) for e in evaluations], _columns(_tasks(evaluations))),
    ]  # fmt: skip
    for e in evaluations:
        data = ", ".join(
            f"{task} {e.items[task]:,}{f' ({file})' if (file := e.files[task]) else ''}"
            for task in e.results
        )
        r = e.requests
        text += [
            f"{e.model}: {'the first items' if e.limit else 'all items'} of {data}. "
            f"{r['requests']:,} requests, {r['truncated']:,} longer than the {e.context:,} tokens "
            f"of context; {r['seconds']:,.1f} s on {e.device}, {r['compile_seconds']:,.1f} of them "
            f"compiling; {r['requests_per_second']:,.1f} requests/s without that.",
            "",
        ]
    for paper in DOWNSTREAM:
        beside = lines(evaluations, paper)
        if any(line.source == "ours" for line in beside):
            text += [f"## {paper.title}", "", markdown(beside, _columns(paper.tasks))]
    if drawn:
        text += ["## MLKV Figure 4", "", "![accuracy against memory](accuracy.png)", ""]
    return "\n".join(text)
