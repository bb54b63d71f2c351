"""Loss curves of runs that are under way, for a notebook that watches them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.reporting._style import (
    LABEL,
    STYLE,
    canvas,
    label_ends,
    line_styles,
    marker,
    short_names,
    text_width,
)

__all__ = ["LiveCurves"]

_WINDOW = 10  # records whose mean is drawn
_START = 5  # records that the loss axis leaves out, where there are more


class LiveCurves:
    """Loss curves that grow as models train, one after another.

    `train(..., on_record=curves.watch(config, training))` feeds them.

    Args:
        show: is given the figure at most every `seconds`, and at each validation: in a notebook
            the `update` of the handle that `IPython.display.display(..., display_id=True)` gives.
        seconds: between two drawings.
    """

    def __init__(self, show: Callable[[Figure], None], *, seconds: float = 2.0) -> None:
        self._show, self._seconds, self._drawn = show, seconds, -np.inf
        self._runs = dict[str, tuple[ModelConfig, list[dict[str, Any]]]]()
        self._tokens = 1

    def watch(self, config: ModelConfig, training: TrainConfig) -> Callable[[dict[str, Any]], None]:
        """A function that takes the records of a model's run."""
        records = list[dict[str, Any]]()
        data = training.data
        tokens = training.steps * data.batch_size * data.sequence_length
        self._runs[config.name] = config, records
        self._tokens = max(self._tokens, tokens)

        def take(record: dict[str, Any]) -> None:
            records.append(record)
            due = time.monotonic() - self._drawn >= self._seconds
            if due or "validation_loss" in record:
                self._show(self.figure())
                self._drawn = time.monotonic()

        return take

    def figure(self) -> Figure:
        """The curves so far; the axis of tokens runs to the end of the longest run.

        Raises:
            ValueError: no run has a training record yet.
        """
        runs = {name: run for name, run in self._runs.items() if any("loss" in r for r in run[1])}
        if not runs:
            raise ValueError("nothing to draw yet: no run has a training record")
        curves = [_curve(records, "loss") for _, records in runs.values()]
        means = [_trailing_mean(loss) for _, loss in curves]
        labels = [
            f"{name}  {mean[-1]:.3f}" for name, mean in zip(short_names(runs), means, strict=True)
        ]
        shares = [config.kv_layers < config.num_layers for config, _ in runs.values()]
        styles = list(line_styles(shares))
        with matplotlib.rc_context(STYLE):
            made = canvas(
                _title(
                    [*runs],
                    [float(tokens[-1]) / self._tokens for tokens, _ in curves],
                    [float(mean[-1]) for mean in means],
                ),
                f"light: training loss; line: the mean of {_WINDOW} records; marks: validation "
                "loss",
                right=float(max(text_width(label, LABEL) for label in labels) + 16),
            )
            axes = made.axes(*made.room)
            for (tokens, loss), mean, (color, dash) in zip(curves, means, styles, strict=True):
                axes.plot(tokens, loss, color=color, alpha=0.2, linewidth=0.5)
                axes.plot(tokens, mean, color=color, linestyle=dash, linewidth=1.2)
            for (_, records), shared, (color, _) in zip(runs.values(), shares, styles, strict=True):
                axes.plot(
                    *_curve(records, "validation_loss"), marker(shared), color=color,
                    markersize=3.5, markerfacecolor="white", markeredgewidth=0.9, zorder=4,
                )  # fmt: skip
            seen = np.concatenate([mean[min(_START, len(mean) - 1) :] for mean in means])
            margin = 0.06 * np.ptp(seen) + 0.05
            axes.set_xlim(0, 1.015 * self._tokens)
            axes.set_ylim(seen.min() - margin, seen.max() + margin)
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.set_xlabel("Training tokens")
            axes.set_ylabel("Loss (nats per token)")
            ends = [
                (float(tokens[-1]), float(mean[-1]))
                for (tokens, _), mean in zip(curves, means, strict=True)
            ]
            label_ends(axes, ends, labels, [color for color, _ in styles])
        return made.figure


def _title(names: Sequence[str], done: Sequence[float], losses: Sequence[float]) -> str:
    if min(done) >= 1:
        return f"Trained to a loss of {' and '.join(f'{loss:.2f}' for loss in losses)}"
    under_way = min(range(len(names)), key=lambda i: done[i])
    return f"{names[under_way]}: {done[under_way]:.0%} of its tokens"


def _curve(records: Sequence[dict[str, Any]], loss: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and losses of the records that hold one."""
    held = [(record["tokens"], record[loss]) for record in records if loss in record]
    tokens, losses = np.array(held, np.float64).reshape(-1, 2).T
    return tokens, losses


def _trailing_mean(values: np.ndarray) -> np.ndarray:
    """Of each value and those up to `_WINDOW - 1` before it."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - _WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
