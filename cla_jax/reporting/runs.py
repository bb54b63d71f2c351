"""Finished runs: what the trainer left in a directory, as values.

A run's directory holds `result.json` (one object, written at the end) and `metrics.jsonl` (one
object a line: training records with `loss`, validation records with `validation_loss`).
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cla_jax import registry

__all__ = ["Curve", "Run", "load_run"]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A loss over the course of training; `n` records in the order of their steps.

    Attributes:
        steps: int64 `[n]`, optimizer updates done.
        tokens: int64 `[n]`, training tokens seen.
        loss: float64 `[n]`, nats per token.
    """

    steps: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        name: the model's, as in the registry: `tiny/MQA-CLA2`.
        directory: where it was read.
        parameters: of the model.
        num_layers: depth, `L`.
        kv_layers: layers that own K/V, `G`.
        kv_heads: KV heads of each, `K`.
        head_dim: `H`.
        kv_bytes_per_token: of the 16-bit KV cache.
        steps: optimizer updates.
        tokens: training tokens.
        seconds: of training, at its median rate: compiling, saving and validating apart.
        validation_loss: at the end, nats per token.
        validation_perplexity: at the end.
        seed: of the parameters.
        training: the training loss.
        validation: the validation loss.
    """

    name: str
    directory: Path
    parameters: int
    num_layers: int
    kv_layers: int
    kv_heads: int
    head_dim: int
    kv_bytes_per_token: int
    steps: int
    tokens: int
    seconds: float
    validation_loss: float
    validation_perplexity: float
    seed: int
    training: Curve = dataclasses.field(repr=False)
    validation: Curve = dataclasses.field(repr=False)

    @property
    def shares_layers(self) -> bool:
        """Whether some layer reads another's K/V: CLA, or MLKV with fewer KV layers than layers."""
        return self.kv_layers < self.num_layers


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Reads a finished run.

    A step that was logged twice (once before, once after a resume) counts as last written. Keys
    beyond those needed are ignored. `num_layers` may be absent for a model of the registry.

    Raises:
        ValueError: a file that is missing or not JSON (names the line), a missing key, a value of
            another type.
    """
    directory = Path(directory)
    path = directory / "result.json"
    try:
        result = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path}: expected one JSON object, found {type(result).__name__}")
    name = _value(result, "model", str, path)
    if "num_layers" not in result and name in registry.model_names():
        result["num_layers"] = registry.model(name).num_layers
    numbers: dict[str, Any] = {
        field.name: _value(result, field.name, field.type, path)
        for field in dataclasses.fields(Run)
        if field.type is int or field.type is float
    }
    metrics = directory / "metrics.jsonl"
    records = list(_records(metrics))
    return Run(
        name=name,
        directory=directory,
        training=_curve(records, "loss", metrics),
        validation=_curve(records, "validation_loss", metrics),
        **numbers,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"no finished run in {path.parent}: {path.name} is missing (result.json is written "
            "when training ends)"
        ) from None


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records of a JSONL file; blank lines are passed over."""
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON (a line cut short?): {error}"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {record!r}")
        if "loss" not in record and "validation_loss" not in record:
            raise ValueError(
                f"{path}, line {number}: neither 'loss' (a training record) nor "
                f"'validation_loss' (a validation record) among its keys {sorted(record)}"
            )
        yield number, record


def _curve(records: list[tuple[int, dict[str, Any]]], loss: str, path: Path) -> Curve:
    points = dict[int, tuple[int, float]]()
    for number, record in records:
        if loss in record:
            where = f"{path}, line {number}"
            step = _value(record, "step", int, where)
            points[step] = _value(record, "tokens", int, where), _value(record, loss, float, where)
    steps = sorted(points)
    return Curve(
        steps=np.array(steps, np.int64),
        tokens=np.array([points[step][0] for step in steps], np.int64),
        loss=np.array([points[step][1] for step in steps], np.float64),
    )


def _value[T: (int, float, str)](
    values: Mapping[str, Any], key: str, kind: type[T], where: str | Path
) -> T:
    if key not in values:
        near = difflib.get_close_matches(key, values, n=1)
        hint = f"; the nearest key is {near[0]!r}" if near else f" among {sorted(values)}"
        raise ValueError(f"{where}: missing key {key!r}{hint}")
    value = values[key]
    accepted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{where}: {key} is {value!r}; expected {kind.__name__}")
    return kind(value)
