"""The papers' benchmarks by name, and their data from local files.

`cla`: Wikitext word perplexity and seven tasks (CLA Tables 3 to 8). `mlkv`: four tasks (MLKV Tables
3 and 4). All zero-shot. Neither paper says which accuracy it prints, `acc` or `acc_norm` (choices'
likelihoods divided by their lengths); both print `acc`, as far as that can be told: see
docs/paper-notes.md.

A local file is read and checked whole before any model is loaded.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["SETS", "TASKS", "TaskData", "TaskSpec", "expand", "local_data"]

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's items from a local file.

    Attributes:
        task: its name.
        file: name of the file, which tells the split.
        sha256: of the file.
        rows: the items, as the harness will see them.
    """

    task: str
    file: str
    sha256: str
    rows: tuple[Row, ...] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task of the papers.

    Attributes:
        name: in lm-evaluation-harness.
        metric: that the papers print.
        files: names of local files, the first that is there is taken.
        read: a file's bytes to rows; raises `ValueError`. Told the file's name for messages.
        config: of the harness's task on such rows.
    """

    name: str
    metric: str
    files: tuple[str, ...]
    read: Callable[[bytes, str], tuple[Row, ...]]
    config: Mapping[str, Any]


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Task names, sets taken apart, each once, in the order given."""
    return tuple(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


def local_data(names: Sequence[str], directory: Path) -> dict[str, TaskData]:
    """The data of those of the papers' tasks that are named, from files.

    Args:
        names: of tasks; those that the papers do not have are passed over.
        directory: files lie there, or in its folder `mc`.

    Raises:
        ValueError: no such directory, a task without a file (names all of them), or a file that
            holds something else (names the line).
    """
    if not directory.is_dir():
        near = difflib.get_close_matches(
            directory.name, [p.name for p in directory.parent.glob("*") if p.is_dir()], n=1
        )
        hint = f"; the nearest is {directory.parent / near[0]}" if near else ""
        raise ValueError(f"there is no directory {directory} of task data{hint}")
    wanted = [TASKS[name] for name in names if name in TASKS]
    places = {spec.name: _find(spec, directory) for spec in wanted}
    missing = [spec for spec in wanted if places[spec.name] is None]
    if missing:
        lines = "".join(f"\n  {spec.name}: {' or '.join(spec.files)}" for spec in missing)
        raise ValueError(f"{directory} (and its folder mc) has no file for{lines}")
    return {spec.name: _read(spec, path) for spec in wanted if (path := places[spec.name])}


def _find(spec: TaskSpec, directory: Path) -> Path | None:
    places = (folder / file for file in spec.files for folder in (directory, directory / "mc"))
    return next((path for path in places if path.is_file()), None)


def _read(spec: TaskSpec, path: Path) -> TaskData:
    data = path.read_bytes()
    rows = spec.read(data, str(path))
    return TaskData(spec.name, path.name, hashlib.sha256(data).hexdigest(), rows)


# --- files to rows --------------------------------------------------------------------------------


def _text(data: bytes, where: str) -> str:
    try:
        # The harness's detokenizer knows one kind of line end.
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {error.start} is wrong") from None
    if not text.strip():
        raise ValueError(f"{where} is empty: expected at least one item")
    return text


def _json_lines(check: Callable[[Row], Row]) -> Callable[[bytes, str], tuple[Row, ...]]:
    """Reader of JSON lines; `check` takes a row and raises `ValueError` without a place."""

    def read(data: bytes, where: str) -> tuple[Row, ...]:
        rows = list[Row]()
        for number, line in enumerate(_text(data, where).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}, line {number}: expected an object, found {row!r}")
            try:
                rows.append(check(row))
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: {error}") from None
        return tuple(rows)

    return read


def _field(row: Row, name: str) -> Any:
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"no field {name!r} among {sorted(row)}{hint}")
    return row[name]


def _string(row: Row, name: str) -> str:
    value = _field(row, name)
    if not _is_text(value):
        raise ValueError(f"{name} is {value!r}, expected a text that is not empty")
    return value


def _is_text(value: Any) -> bool:
    """Whether it is one that can be tokenized: JSON may hold half a surrogate pair."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _strings(row: Row, name: str) -> list[str]:
    values = _field(row, name)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{name} is {values!r}, expected a list of two texts or more")
    for value in values:
        if not _is_text(value):
            raise ValueError(f"{name} holds {value!r}, expected texts that are not empty")
    return values


def _gold(row: Row, choices: Sequence[str]) -> int:
    gold = _field(row, "gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold!r}, expected 0 to {len(choices) - 1}: the right choice")
    return gold


def _choices(row: Row) -> Row:
    # The harness puts the space between query and choice, and measures choices without it.
    choices = [choice.removeprefix(" ") for choice in _strings(row, "choices")]
    return {"query": _string(row, "query"), "choices": choices, "gold": _gold(row, choices)}


def _contexts(row: Row) -> Row:
    contexts = _strings(row, "contexts")
    continuation = _string(row, "continuation").strip()
    return {"contexts": contexts, "continuation": continuation, "gold": _gold(row, contexts)}


def _continuation(row: Row) -> Row:
    continuation = _string(row, "continuation")
    if not continuation[0].isspace():
        raise ValueError(f"continuation is {continuation!r}, expected the space before the word")
    return {"query": _string(row, "query"), "continuation": continuation}


def _pages(data: bytes, where: str) -> tuple[Row, ...]:
    """WikiText's raw format: articles behind lines ` = Title = `, each a document."""
    pages: list[list[str]] = [[]]
    for line in _text(data, where).split("\n"):
        if _is_title(line.strip()):
            pages.append([])
        pages[-1].append(line)
    if len(pages) == 1:
        raise ValueError(f"{where} has no line ' = Title = ': expected WikiText's raw format")
    texts = ["\n".join(lines) for lines in pages]
    return tuple({"page": text} for text in texts if text.strip())


def _is_title(line: str) -> bool:
    """Of an article: sections are ` = = Title = = `."""
    return line.startswith("= ") and line.endswith(" =") and not line.startswith("= = ")


# --- the tasks ------------------------------------------------------------------------------------

_ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_ACC_NORM = {**_ACC, "metric": "acc_norm"}
_MULTIPLE_CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices",
    "doc_to_target": "gold", "metric_list": [_ACC, _ACC_NORM],
}  # fmt: skip
_PARTIAL = {  # the choices stand before the text that is scored
    "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts",
    "doc_to_target": "continuation", "metric_list": [_ACC],
}  # fmt: skip
_LAST_WORD = {
    "output_type": "loglikelihood", "doc_to_text": "query", "doc_to_target": "continuation",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, _ACC,
    ],
}  # fmt: skip
_ROLLING = {  # the harness's detokenizer and word count come to this in harness.py
    "output_type": "loglikelihood_rolling", "doc_to_text": "",
    "metric_list": [
        {"metric": m, "aggregation": a, "higher_is_better": False}
        for m, a in (("word_perplexity", "weighted_perplexity"),
                     ("byte_perplexity", "weighted_perplexity"),
                     ("bits_per_byte", "bits_per_byte"))
    ],
}  # fmt: skip


def _multiple_choice(name: str, *splits: str) -> TaskSpec:
    files = (f"{name}.jsonl", *(f"{name}_{split}.jsonl" for split in splits))
    return TaskSpec(name, "acc", files, _json_lines(_choices), _MULTIPLE_CHOICE)


TASKS: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("wikitext", "word_perplexity", ("wikitext.txt", "wikitext2_raw_test.txt"),
                 _pages, _ROLLING),
        _multiple_choice("hellaswag", "validation"),
        _multiple_choice("piqa", "validation"),
        TaskSpec("winogrande", "acc", ("winogrande.jsonl", "winogrande_validation.jsonl",
                                       "winogrande_xl_validation.jsonl"),
                 _json_lines(_contexts), _PARTIAL),
        _multiple_choice("sciq", "test", "validation"),
        _multiple_choice("openbookqa", "test"),
        _multiple_choice("boolq", "validation"),
        _multiple_choice("arc_easy", "test"),
        TaskSpec("lambada_openai", "acc", ("lambada_openai.jsonl", "lambada_openai_test.jsonl"),
                 _json_lines(_continuation), _LAST_WORD),
    )
}  # fmt: skip
"""By name; the local file is of the split that the harness scores."""

SETS: Mapping[str, tuple[str, ...]] = {
    "cla": ("wikitext", "hellaswag", "piqa", "winogrande", "sciq", "openbookqa", "boolq",
            "arc_easy"),
    "mlkv": ("arc_easy", "lambada_openai", "piqa", "sciq"),
}  # fmt: skip
"""In the order of the papers' columns."""
