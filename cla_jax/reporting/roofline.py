"""Decoding steps against what the device can read."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cla_jax.registry import model
from cla_jax.reporting._placement import place_labels
from cla_jax.reporting._style import (
    INK,
    LABEL,
    MUTED,
    STYLE,
    canvas,
    line_styles,
    marker,
    points,
    short_names,
    text_width,
)
from cla_jax.reporting.tables import Column

__all__ = ["MeasuredStep", "columns", "roofline"]


@runtime_checkable
class MeasuredStep(Protocol):
    """A batch decoding at a context, as `cla_jax.evaluation.decoding.decode_costs` measures it."""

    @property
    def model(self) -> str:
        """Its name in the registry."""
        ...

    @property
    def batch(self) -> int:
        """Rows."""
        ...

    @property
    def context(self) -> int:
        """Keys that a row sees."""
        ...

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        ...

    @property
    def read_bytes(self) -> int:
        """That the step must read."""
        ...


def roofline(
    costs: Sequence[MeasuredStep], bandwidth: float, *, title: str | None = None
) -> Figure:
    """Milliseconds of a decoding step against the bytes that it must read, log-log.

    The line is the floor: those bytes at `bandwidth`. No step lies below it, unless the chip's own
    cache holds K/V between the layers that share them.

    Args:
        costs: measurements of the registry's models.
        bandwidth: bytes per second that the device reads (`read_bandwidth`).
        title: what is seen; by default the best and the worst share of the bandwidth.

    Raises:
        ValueError: nothing was measured.
    """
    if not costs:
        raise ValueError("nothing to draw: no measurement")
    names = list(dict.fromkeys(cost.model for cost in costs))
    shares = [model(name).kv_layers < model(name).num_layers for name in names]
    reached = [_share(cost, bandwidth) for cost in costs]
    read = np.array([cost.read_bytes for cost in costs], np.float64)
    ends = np.array([read.min() / 2, read.max() * 2])
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or f"A decoding step reads at {min(reached):.0%} to {max(reached):.0%} of what "
            "the device reads",
            f"line: the floor, every byte once at {bandwidth / 1e12:.3g} TB/s (measured); "
            "numbers: batch x context",
        )  # fmt: skip
        axes = made.axes(*made.room)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(ends / 1e9, 1e3 * ends / bandwidth, color=INK, linewidth=1.0)
        styles = line_styles(shares)
        for name, label, shared, (color, _) in zip(
            names, short_names(names), shares, styles, strict=True
        ):
            of_model = [cost for cost in costs if cost.model == name]
            x = [cost.read_bytes / 1e9 for cost in of_model]
            y = [1e3 * cost.step_seconds for cost in of_model]
            axes.plot(x, y, marker(shared), color=color, label=label, markersize=5,
                      markeredgecolor="white", markeredgewidth=0.6, zorder=4)  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_xlim(*(ends / 1e9))
        axes.set_ylim(700 * ends[0] / bandwidth, 3e3 * max(c.step_seconds for c in costs))
        axes.set_xlabel("Bytes that a step must read, GB, log scale")
        axes.set_ylabel("Time of a step, ms, log scale")
        axes.legend(loc="upper left", fontsize=7)
        _label(axes, costs, ends / 1e9, 1e3 * ends / bandwidth)
    return made.figure


def _label(axes: Axes, costs: Sequence[MeasuredStep], read: np.ndarray, floor: np.ndarray) -> None:
    """Batch and context beside each point, so that no label covers another or the floor."""
    data = [(cost.read_bytes / 1e9, 1e3 * cost.step_seconds) for cost in costs]
    texts = [f"{cost.batch:,} x {cost.context:,}" for cost in costs]
    sizes = np.array([(text_width(text, LABEL), 1.15 * LABEL) for text in texts])
    at, (low, high) = points(axes, np.array(data)), points(axes, np.array([read, floor]).T)
    line = low + np.linspace(0, 1, 120)[:, None] * (high - low)
    bounds = points(axes, np.array([axes.get_xlim(), axes.get_ylim()]).T)
    centres = place_labels(at, sizes, line, bounds)
    for text, point, offset, size in zip(texts, data, centres - at, sizes, strict=True):
        tip = np.clip(0, offset - size / 2, offset + size / 2)
        if np.hypot(*tip) > 7:
            axes.annotate(
                "", point, tuple(tip), textcoords="offset points", zorder=3,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0.5,
                            "shrinkB": 2.5},
            )  # fmt: skip
        axes.annotate(
            text, point, tuple(offset), textcoords="offset points", ha="center", va="center",
            fontsize=LABEL, color=MUTED, zorder=3,
        )  # fmt: skip


def columns(bandwidth: float) -> tuple[Column[MeasuredStep], ...]:
    """Columns of a table of measured steps beside their floor at `bandwidth` bytes per second."""
    return (
        Column[MeasuredStep]("model", "model", lambda c: c.model),
        Column[MeasuredStep]("batch", "batch", lambda c: c.batch, "d"),
        Column[MeasuredStep]("context", "context", lambda c: c.context, "d"),
        Column[MeasuredStep]("read_gb", "read, GB", lambda c: c.read_bytes / 1e9, ".2f"),
        Column[MeasuredStep](
            "floor_ms", "floor, ms", lambda c: 1e3 * c.read_bytes / bandwidth, ".2f"
        ),
        Column[MeasuredStep]("step_ms", "measured, ms", lambda c: 1e3 * c.step_seconds, ".2f"),
        Column[MeasuredStep](
            "of_ceiling", "of the read bandwidth", lambda c: _share(c, bandwidth), ".2f"
        ),
        Column[MeasuredStep](
            "tokens_per_second", "tokens/s", lambda c: c.batch / c.step_seconds, ".0f"
        ),
    )


def _share(cost: MeasuredStep, bandwidth: float) -> float:
    """Of the bandwidth that the step's bytes come to."""
    return cost.read_bytes / cost.step_seconds / bandwidth
