"""Figures for papers: loss curves, and perplexity against the KV cache (CLA Figure 3).

Each function takes finished runs and returns a `matplotlib.figure.Figure`; `save` writes it as PNG
and SVG. No display and no state of `pyplot` is touched. Models that share K/V across layers are
red and square, the others blue and round, in every figure (blue and vermilion stay apart in the
common kinds of colour blindness).
"""

import io
import itertools
import math
import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from cla_jax.reporting._placement import place_labels
from cla_jax.reporting.runs import Run

__all__ = ["format_bytes", "loss_curves", "pareto", "pareto_frontier", "save"]

_SHARED = ("#c1440e", "#e8912d", "#7f2704")
_UNSHARED = ("#0b62a4", "#56a7dc", "#08306b")
_INK, _MUTED, _GRID = "#222222", "#6b6b6b", "#e6e6e6"
_WIDTH, _HEIGHT = 5.0, 3.4  # inches
_LABEL = 6.5  # points: the size of a model's name in the plot
_FEW = 6  # as many runs are labelled in full
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: same figure on every machine
    "font.size": 8,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": 8,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cla-jax",
}


def loss_curves(runs: Sequence[Run], *, title: str | None = None) -> Figure:
    """Training loss (raw, and its running mean) and validation loss against training tokens.

    The loss axis leaves out the steep start (the first 3 % of the tokens); where there is room, an
    inset magnifies the end. Up to six runs are labelled at their line's end, with the last
    validation loss; more stand in a legend, and without the raw loss.

    Args:
        runs: finished runs.
        title: what is seen; by default the range of the last validation losses.

    Raises:
        ValueError: no runs, one without training records, or no finite loss.
    """
    _check_some(runs)
    for run in runs:
        if not len(run.training):
            raise ValueError(f"{run.name}: no training records in {run.directory} to draw")
    limits = _loss_limits(runs)
    if limits is None:
        raise ValueError(f"no finite losses to draw in {', '.join(str(r.directory) for r in runs)}")
    names, styles = _labels(runs), list(_line_styles(runs))
    few = len(runs) <= _FEW
    if few:
        names = [
            f"{name}  {run.validation_loss:.3f}" for name, run in zip(names, runs, strict=True)
        ]
    subtitle = "line: training loss, running mean; marks: validation loss"
    if few:
        subtitle = "light: training loss; line: its running mean; marks: validation loss"
    with matplotlib.rc_context(_STYLE):
        right = max(_text_width(name, _LABEL) for name in names) + (16 if few else 30)
        figure, axes = _canvas(_loss_title(runs) if title is None else title, subtitle, right=right)
        if few:
            for run, (color, _) in zip(runs, styles, strict=True):
                curve = run.training
                axes.plot(curve.tokens, curve.loss, color=color, alpha=0.2, linewidth=0.5)
        _draw_losses(axes, runs, styles)
        axes.set_xlim(0, 1.015 * max(int(run.training.tokens[-1]) for run in runs))
        axes.set_ylim(*limits)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("Training tokens")
        axes.set_ylabel("Loss (nats per token)")
        _magnify_end(axes, runs, styles)
        if few:
            _label_ends(axes, runs, names, styles)
        else:
            for name, (color, dash) in zip(names, styles, strict=True):
                axes.plot([], [], color=color, linestyle=dash, label=name)
            axes.legend(
                loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=_LABEL,
                handlelength=1.8, labelspacing=0.3,
            )  # fmt: skip
    return figure


def pareto(runs: Sequence[Run], *, title: str | None = None) -> Figure:
    """Validation perplexity against KV bytes per token, with the Pareto frontiers (CLA Figure 3).

    Models with and without cross-layer sharing have a frontier each: the least perplexity to be
    had for at most so many bytes. The perplexity axis spans at least 5 %, so that a difference
    within noise does not look like a gulf.

    Args:
        runs: finished runs.
        title: what is seen; by default, for a model with and one without sharing, both ratios.

    Raises:
        ValueError: no runs, or a perplexity that is not finite.
    """
    _check_some(runs)
    for run in runs:
        if not math.isfinite(run.validation_perplexity):
            raise ValueError(
                f"{run.name}: validation perplexity {run.validation_perplexity} in "
                f"{run.directory} cannot be drawn; leave this run out"
            )
    groups = {
        "with cross-layer sharing": [run for run in runs if run.shares_layers],
        "without": [run for run in runs if not run.shares_layers],
    }
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(
            _pareto_title(runs) if title is None else title,
            "lines: Pareto frontiers" if len(runs) > 2 else "",
            right=10.0,
        )
        _set_pareto_axes(axes, runs)
        lines = list[np.ndarray]()
        for label, group in groups.items():
            if group:
                lines.append(_draw_frontier(axes, group))
                axes.plot(
                    *np.array([_position(run) for run in group]).T, _marker(group[0]),
                    color=_color(group[0]), label=label, markersize=5, markeredgecolor="white",
                    markeredgewidth=0.6, zorder=4,
                )  # fmt: skip
        axes.legend(loc="upper right", borderaxespad=0.2, handletextpad=0.2).set_zorder(1)
        _label_points(axes, runs, np.concatenate(lines))
    return figure


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


def format_bytes(count: int) -> str:
    """`384 B`, `768 B`, `2.5 KiB`, `160 KiB`."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min(max(int(math.log2(max(count, 1)) // 10), 0), len(units) - 1)
    digits = f"{count / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{digits} {units[power]}"


def save(figure: Figure, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes `path`.png (200 dots per inch) and `path`.svg, each whole or not at all.

    The same figure gives the same bytes. Text in the SVG stays text.

    Args:
        figure: from this module.
        path: without suffix; its directory is made.

    Returns:
        The two files' paths.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    for target, metadata in zip(written, ({"Software": None}, {"Date": None}), strict=True):
        content = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            figure.savefig(content, format=target.suffix[1:], dpi=200, metadata=metadata)
        _write_atomically(target, content.getvalue())
    return written


def _write_atomically(target: Path, content: bytes) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


# What both figures share.


def _check_some(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("no runs to draw: expected at least one")


def _canvas(title: str, subtitle: str, *, right: float) -> tuple[Figure, Axes]:
    """A figure with fixed margins, so that labels can be placed before it is drawn.

    `right` is the right margin in points.
    """
    title = textwrap.fill(title, 64)
    top = 7 + 12 * (title.count("\n") + 1)
    width, height = 72 * _WIDTH, 72 * _HEIGHT
    left, bottom, under = 44, 36, 18 if subtitle else 9
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=72, facecolor="white")
    figure.text(8 / width, 1 - 7 / height, title, fontsize=9, weight="bold", va="top")
    figure.text(8 / width, 1 - (top + 3) / height, subtitle, color=_MUTED, fontsize=7, va="top")
    frame = (left, bottom, width - left - right, height - bottom - top - under)
    axes = figure.add_axes(tuple(np.divide(frame, (width, height, width, height)).tolist()))
    return figure, axes


def _labels(runs: Sequence[Run]) -> list[str]:
    """Model names, without the scale where it is the same for all."""
    scales = {run.name.partition("/")[0] for run in runs}
    if len(scales) > 1 or any("/" not in run.name for run in runs):
        return [run.name for run in runs]
    return [run.name.partition("/")[2] for run in runs]


def _color(run: Run) -> str:
    return (_SHARED if run.shares_layers else _UNSHARED)[0]


def _marker(run: Run) -> str:
    return "s" if run.shares_layers else "o"


def _line_styles(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """A colour of the run's family and a dash pattern, no pair twice among nine of a family."""
    seen = Counter[bool]()
    for run in runs:
        palette = _SHARED if run.shares_layers else _UNSHARED
        number = seen[run.shares_layers]
        seen[run.shares_layers] += 1
        yield palette[number % 3], ("-", "--", ":")[number // 3 % 3]


def _text_width(text: str, size: float) -> float:
    """Width in points, known without drawing."""
    return TextPath((0, 0), text, size=size).get_extents().width


def _points(axes: Axes, data: np.ndarray) -> np.ndarray:
    """Data coordinates `[n, 2]` to points from the figure's corner: a canvas's pixel is a point."""
    return axes.transData.transform(data)


# Loss curves.


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of 4 % of the records, which is cut short at both ends."""
    ones = np.ones(len(values) // 50 * 2 + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _loss_limits(runs: Sequence[Run], start: float = 0.03) -> tuple[float, float] | None:
    """The range of smoothed and validation losses after a share `start` of the tokens."""
    seen = list[np.ndarray]()
    for run in runs:
        first = start * run.training.tokens[-1]
        seen.append(_running_mean(run.training.loss)[run.training.tokens >= first])
        seen.append(run.validation.loss[run.validation.tokens >= first])
    losses = np.concatenate(seen)
    losses = losses[np.isfinite(losses)]  # what a run that diverged had before
    if not len(losses):
        return None
    low, high = float(losses.min()), float(losses.max())
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _loss_title(runs: Sequence[Run]) -> str:
    losses = sorted(run.validation_loss for run in runs if math.isfinite(run.validation_loss))
    if not losses:
        return "Training loss"
    title = f"Validation loss ends at {losses[0]:.3f}"
    return title if len(losses) == 1 else f"{title} to {losses[-1]:.3f}"


def _draw_losses(axes: Axes, runs: Sequence[Run], styles: Sequence[tuple[str, str]]) -> None:
    for run, (color, dash) in zip(runs, styles, strict=True):
        mean = _running_mean(run.training.loss)
        axes.plot(run.training.tokens, mean, color=color, linestyle=dash, linewidth=1.2)
    for run, (color, _) in zip(runs, styles, strict=True):
        axes.plot(
            run.validation.tokens, run.validation.loss, _marker(run), color=color,
            markersize=3.5, markerfacecolor="white", markeredgewidth=0.9, zorder=4,
        )  # fmt: skip


def _magnify_end(axes: Axes, runs: Sequence[Run], styles: Sequence[tuple[str, str]]) -> None:
    """An inset of the last 30 %, in the upper right, unless the curves pass there."""
    (low, high), end = axes.get_ylim(), axes.get_xlim()[1]
    later, last = _loss_limits(runs, 0.3), _loss_limits(runs, 0.7)
    if later is None or last is None or later[1] > low + 0.45 * (high - low):
        return
    # The room of the inset and of its tick labels, free of the outer grid.
    axes.add_patch(
        Rectangle((0.33, 0.41), 0.67, 0.6, transform=axes.transAxes, color="white", zorder=2.5)
    )
    inset = axes.inset_axes((0.42, 0.52, 0.56, 0.42))
    _draw_losses(inset, runs, styles)
    inset.set_xlim(0.68 * end, end)
    inset.set_ylim(*last)
    inset.xaxis.set_major_formatter(EngFormatter())
    inset.locator_params(nbins=4)
    inset.tick_params(labelsize=6.5, pad=2)
    inset.set_title("the last 30 %", fontsize=7, color=_MUTED, pad=3)


def _label_ends(
    axes: Axes, runs: Sequence[Run], labels: Sequence[str], styles: Sequence[tuple[str, str]]
) -> None:
    """Labels beside the lines' ends, pushed apart, with hairlines to where they belong."""
    low, high = axes.get_ylim()
    # A run that diverged is labelled at the top.
    losses = np.nan_to_num([run.validation_loss for run in runs], nan=high, posinf=high)
    last = [
        (float(run.training.tokens[-1]), float(loss))
        for run, loss in zip(runs, losses.clip(low, high), strict=True)
    ]
    ends = _points(axes, np.array(last))
    order = np.argsort(ends[:, 1], kind="stable")
    steps = (_LABEL + 2.5) * np.arange(len(runs))
    y = ends[order, 1] - steps
    # Each half alone spreads to one side; their mean keeps the gaps and stays about the ends.
    y = (np.maximum.accumulate(y) + np.minimum.accumulate(y[::-1])[::-1]) / 2 + steps
    y += max(0.0, axes.transAxes.transform((0, 0))[1] + 4 - y[0])
    for i, height in zip(order, y, strict=True):
        color, _ = styles[i]
        axes.annotate(
            str(labels[i]), last[i], (10, height - ends[i, 1]), textcoords="offset points",
            va="center", fontsize=_LABEL, color=color, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "shrinkA": 0.5,
                        "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


# Perplexity against the cache.


def _position(run: Run) -> tuple[float, float]:
    return float(run.kv_bytes_per_token), run.validation_perplexity


def _pareto_title(runs: Sequence[Run]) -> str:
    without, *shared = sorted(runs, key=lambda run: run.shares_layers)
    if len(shared) != 1 or without.shares_layers or not shared[0].shares_layers:
        return "Validation perplexity against the KV cache"
    cache = shared[0].kv_bytes_per_token / without.kv_bytes_per_token
    perplexity = shared[0].validation_perplexity / without.validation_perplexity
    name, baseline = _labels([shared[0], without])
    return f"{name}: {cache:.2f} × the cache of {baseline} at {perplexity:.3f} × its perplexity"


def _set_pareto_axes(axes: Axes, runs: Sequence[Run]) -> None:
    x, y = np.array([_position(run) for run in runs]).T
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
    ticks = list[float]()
    for octave in sorted(kin, key=lambda o: (-kin[o], o)):
        if all(abs(octave - tick) > 0.2 * reach for tick in ticks):
            ticks.append(octave)
    axes.xaxis.set_major_locator(FixedLocator([2**tick for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(round(size))))
    axes.set_xlabel("KV cache per token, 16-bit, log scale  (← lower is better)")
    axes.set_ylabel("Validation perplexity  (← lower is better)")


def _draw_frontier(axes: Axes, runs: Sequence[Run]) -> np.ndarray:
    """Draws the step line; returns points `[n, 2]` along it, for labels to keep clear of."""
    points = [_position(run) for run in runs]
    steps = [points[i] for i in pareto_frontier(points)]
    corners = [steps[0]]
    for (_, y), after in itertools.pairwise(steps):
        corners += [(after[0], y), after]
    line = np.array(corners)
    axes.plot(*line.T, color=_color(runs[0]), linewidth=1.1, alpha=0.75, zorder=2)
    at = _points(axes, line)
    pieces = [at[:1]] + [
        np.linspace(a, b, 2 + int(np.abs(b - a).max() // 3)) for a, b in itertools.pairwise(at)
    ]
    return np.concatenate(pieces)


def _label_points(axes: Axes, runs: Sequence[Run], lines: np.ndarray) -> None:
    """Every model's name by its point, with a hairline where it stands apart from it.

    Few models are labelled larger, and with the perplexity.
    """
    names, font = _labels(runs), _LABEL
    if len(runs) <= _FEW:
        font = 7.5
        names = [
            f"{name}  {run.validation_perplexity:.2f}"
            for name, run in zip(names, runs, strict=True)
        ]
    at = _points(axes, np.array([_position(run) for run in runs]))
    sizes = np.array([(_text_width(name, font), 1.15 * font) for name in names])
    bounds = _points(axes, np.array([axes.get_xlim(), axes.get_ylim()]).T)
    bounds += [(3, 3), (-1, -1)]
    legend = bounds[1] - np.stack(np.meshgrid(range(0, 120, 6), range(0, 26, 5)), -1).reshape(-1, 2)
    centres = place_labels(at, sizes, np.concatenate([lines, legend]), bounds)
    for run, name, offset, size in zip(runs, names, centres - at, sizes, strict=True):
        color = _color(run)
        tip = np.clip(0, offset - size / 2, offset + size / 2)  # the box's nearest to the point
        if np.hypot(*tip) > 7:
            axes.annotate(
                "", _position(run), tuple(tip), textcoords="offset points", zorder=3,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0.5,
                            "shrinkB": 2.5},
            )  # fmt: skip
        axes.annotate(
            name, _position(run), tuple(offset), textcoords="offset points", ha="center",
            va="center", fontsize=font, color=color, zorder=5,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.4},
        )  # fmt: skip
