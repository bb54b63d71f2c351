"""Perplexity against KV bytes per token, in one axes: CLA Figure 3."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cla_jax.reporting._placement import place_labels
from cla_jax.reporting._style import (
    FEW,
    LABEL,
    MUTED,
    color,
    marker,
    points,
    short_names,
    text_width,
)


class Point(NamedTuple):
    """A model in the plane.

    Attributes:
        name: the model's.
        kv_bytes: of its 16-bit KV cache, per token.
        perplexity: on validation text.
        shares_layers: whether it shares K/V across layers.
        spread: the least and the greatest perplexity over seeds, if there are several.
    """

    name: str
    kv_bytes: int
    perplexity: float
    shares_layers: bool
    spread: tuple[float, float] | None = None


def pareto_frontier(points: Sequence[tuple[int | float, int | float]]) -> tuple[int, ...]:
    """Indices of the points that no other dominates, by ascending x; lower is better on both axes.

    One point dominates another if it is nowhere worse and somewhere better; equal points stay.
    """
    frontier = list[int]()
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        last = points[frontier[-1]] if frontier else None
        if last is None or points[i][1] < last[1] or points[i] == last:
            frontier.append(i)
    return tuple(frontier)


def set_cache_ticks(axes: Axes, octaves: Sequence[float], gap: float) -> None:
    """Ticks of an axis of cache sizes, of those in order that keep `gap` octaves to the others.

    Args:
        axes: whose horizontal axis is logarithmic.
        octaves: logarithms to base 2 of sizes in bytes, the most wanted first.
        gap: octaves that a label takes.
    """
    ticks = list[float]()
    for octave in octaves:
        if all(abs(octave - tick) > gap for tick in ticks):
            ticks.append(octave)
    axes.xaxis.set_major_locator(FixedLocator([2**tick for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(round(size))))


def format_bytes(count: int) -> str:
    """`384 B`, `768 B`, `2.5 KiB`, `160 KiB`."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min(max(int(math.log2(max(count, 1)) // 10), 0), len(units) - 1)
    digits = f"{count / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{digits} {units[power]}"


def draw_pareto(axes: Axes, models: Sequence[Point], *, muted: bool = False) -> None:
    """Draws points, frontiers and names, sets the axes, and puts the legend above them.

    Models with and without cross-layer sharing have a frontier each: the least perplexity to be
    had for at most so many bytes. The perplexity axis spans at least 5 %, so that a difference
    within noise does not look like a gulf.

    Args:
        axes: empty, with its final frame.
        models: at least one.
        muted: lighter, without a legend: for what others measured.
    """
    groups = {
        "with cross-layer sharing": [point for point in models if point.shares_layers],
        "without": [point for point in models if not point.shares_layers],
    }
    _set_axes(axes, models)
    lines, alpha = list[np.ndarray](), 0.45 if muted else 1.0
    for label, group in groups.items():
        if group:
            shared = group[0].shares_layers
            lines.append(_draw_frontier(axes, group, alpha))
            axes.plot(
                *np.array([_position(point) for point in group]).T, marker(shared),
                color=color(shared), label=label, markersize=5, markeredgecolor="white",
                markeredgewidth=0.6, zorder=4, alpha=alpha,
            )  # fmt: skip
            lines += [_draw_spread(axes, point) for point in group if point.spread is not None]
    if not muted:
        # Above the axes: inside them is no place that a model may not take.
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1,
                    handletextpad=0.1, columnspacing=1.2)  # fmt: skip
    _label_points(axes, models, np.concatenate(lines), MUTED if muted else None)


def _position(point: Point) -> tuple[float, float]:
    return float(point.kv_bytes), point.perplexity


def _set_axes(axes: Axes, models: Sequence[Point]) -> None:
    x = np.array([point.kv_bytes for point in models], float)
    y = np.array([value for point in models for value in (point.spread or [point.perplexity])])
    axes.set_xscale("log", base=2)
    octaves = np.log2(x)
    reach = max(0.63 * np.ptp(octaves), 1.0)
    centre = (octaves.min() + octaves.max()) / 2
    axes.set_xlim(2 ** (centre - reach), 2 ** (centre + reach))
    reach_y = max(0.65 * np.ptp(y), 0.025 * y.mean())
    centre_y = (y.min() + y.max()) / 2
    axes.set_ylim(centre_y - reach_y, centre_y + reach_y)
    # Ticks are cache sizes that occur, as far as their labels have room; first those that most
    # models share or are a power of two away from.
    kin = {o: int(sum(abs(d - round(d)) < 1e-9 for d in octaves - o)) for o in octaves.tolist()}
    set_cache_ticks(axes, sorted(kin, key=lambda o: (-kin[o], o)), 0.2 * reach)
    axes.set_xlabel("KV cache per token, 16-bit, log scale  (← lower is better)")
    axes.set_ylabel("Validation perplexity  (← lower is better)")


def _draw_frontier(axes: Axes, group: Sequence[Point], alpha: float) -> np.ndarray:
    """Draws the step line; returns points `[n, 2]` along it, for labels to keep clear of."""
    at = [_position(point) for point in group]
    steps = [at[i] for i in pareto_frontier(at)]
    corners = [steps[0]]
    for (_, y), after in itertools.pairwise(steps):
        corners += [(after[0], y), after]
    line = np.array(corners)
    axes.plot(
        *line.T, color=color(group[0].shares_layers), linewidth=1.1, alpha=0.75 * alpha, zorder=2
    )
    return _along(points(axes, line))


def _draw_spread(axes: Axes, point: Point) -> np.ndarray:
    """Draws an error bar; returns points along it."""
    low, high = point.spread or (point.perplexity, point.perplexity)
    ends = np.array([(point.kv_bytes, low), (point.kv_bytes, high)], float)
    axes.plot(
        *ends.T, color=color(point.shares_layers), linewidth=0.9, marker="_", markersize=4, zorder=3
    )
    return _along(points(axes, ends))


def _along(at: np.ndarray) -> np.ndarray:
    """Points a few apart on a line through `[n, 2]`."""
    pieces = [at[:1]] + [
        np.linspace(a, b, 2 + int(np.abs(b - a).max() // 3)) for a, b in itertools.pairwise(at)
    ]
    return np.concatenate(pieces)


def _label_points(
    axes: Axes, models: Sequence[Point], lines: np.ndarray, ink: str | None = None
) -> None:
    """Every model's name by its point, with a hairline where it stands apart from it.

    Few models are labelled larger, and with the perplexity.
    """
    names, font = short_names(point.name for point in models), LABEL
    if len(models) <= FEW:
        font = 7.5
        names = [f"{n}  {point.perplexity:.2f}" for n, point in zip(names, models, strict=True)]
    at = points(axes, np.array([_position(point) for point in models]))
    sizes = np.array([(text_width(name, font), 1.15 * font) for name in names])
    bounds = points(axes, np.array([axes.get_xlim(), axes.get_ylim()]).T)
    bounds += [(3, 3), (-1, -1)]
    centres = place_labels(at, sizes, lines, bounds)
    for point, name, offset, size in zip(models, names, centres - at, sizes, strict=True):
        shade = ink or color(point.shares_layers)
        tip = np.clip(0, offset - size / 2, offset + size / 2)  # the box's nearest to the point
        if np.hypot(*tip) > 7:
            axes.annotate(
                "", _position(point), tuple(tip), textcoords="offset points", zorder=3,
                arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.5, "shrinkA": 0.5,
                            "shrinkB": 2.5},
            )  # fmt: skip
        axes.annotate(
            name, _position(point), tuple(offset), textcoords="offset points", ha="center",
            va="center", fontsize=font, color=shade, zorder=5,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.4},
        )  # fmt: skip
