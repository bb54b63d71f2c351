"""What an evaluation found, as JSON values: `evaluation.json`, which `cla_jax.reporting` reads."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cla_jax.evaluation.scoring import Scorer
from cla_jax.evaluation.task_sets import TaskData
from cla_jax.loading import TextModel

__all__ = ["Counts", "as_json", "evaluation_record"]


@dataclasses.dataclass
class Counts:
    """What was asked of a model so far.

    Attributes:
        requests: log-likelihoods, rolling texts and generations.
        truncated: of these, how many were longer than the context and lost their beginning.
        seconds: of scoring and generating, compiling included; tokenizing apart.
    """

    requests: int = 0
    truncated: int = 0
    seconds: float = 0.0


def evaluation_record(
    model: TextModel,
    scorer: Scorer,
    counts: Counts,
    harness: Mapping[str, Any],
    *,
    local: Mapping[str, TaskData],
    limit: int | None,
    through_cache: bool,
) -> dict[str, Any]:
    """The record of one evaluation.

    Args:
        model: that was scored.
        scorer: that scored it.
        counts: of its requests.
        harness: lm-evaluation-harness's own results, as JSON values.
        local: data of tasks that came from files.
        limit: items of each task, if not all.
        through_cache: whether it was scored token by token.
    """
    results = {
        name: {
            "metrics": _metrics(values),
            "items": harness["n-samples"][name]["effective"],
            "data": local[name].file if name in local else None,
            "sha256": local[name].sha256 if name in local else None,
        }
        for name, values in harness["results"].items()
        if name in harness["n-samples"]  # groups of tasks have no items of their own
    }
    running = max(counts.seconds - scorer.compile_seconds, 1e-9)
    return {
        "model": model.config.name,
        "parameters": model.config.parameters,
        "kv_bytes_per_token": model.config.kv_bytes_per_token,
        "shares_layers": model.config.kv_layers < model.config.num_layers,
        "context": scorer.context,
        "compute_dtype": model.decoder.execution.compute_dtype,
        "through_cache": through_cache,
        "cache_dtype": scorer.cache_dtype,
        "limit": limit,
        "tasks": results,
        "requests": {
            **dataclasses.asdict(counts),
            "compile_seconds": scorer.compile_seconds,
            "compiled_shapes": len(scorer.shapes),
            "requests_per_second": counts.requests / running,
        },
        "device": jax.devices()[0].device_kind,
        "lm_eval": harness.get("lm_eval_version"),
    }


def as_json(value: Any) -> Any:
    """Values as they are when read back: NumPy's numbers as Python's, others as text."""
    return json.loads(json.dumps(value, default=_plain))


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`{"acc,none": x, "acc_stderr,none": y}` as `{"acc": {"value": x, "stderr": y}}`.

    A filter other than `none` stays in the name: a task may have several.
    """
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(key.replace(",", "_stderr,", 1))
        metrics[name if chosen == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return metrics


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
