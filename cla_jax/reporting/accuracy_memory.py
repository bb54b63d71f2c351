"""MLKV Figure 4: average accuracy against the memory of the KV cache."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cla_jax import registry
from cla_jax.reporting._pareto import pareto_frontier, set_cache_ticks
from cla_jax.reporting._placement import place_labels
from cla_jax.reporting._style import (
    HEIGHT,
    LABEL,
    MUTED,
    STYLE,
    canvas,
    color,
    marker,
    points,
    short_names,
    text_width,
)
from cla_jax.reporting.papers import MLKV_160M, MLKV_410M

__all__ = ["AccuracyPoint", "accuracy_memory", "papers_points"]


class AccuracyPoint(NamedTuple):
    """A model in the plane.

    Attributes:
        name: the model's.
        cache_bytes: of the 16-bit KV cache of one sequence at full context.
        accuracy: average, per cent.
        stderr: of the average; 0 where it is not known.
        shares_layers: whether it shares K/V across layers.
    """

    name: str
    cache_bytes: int
    accuracy: float
    stderr: float
    shares_layers: bool


def papers_points(scale: str) -> list[AccuracyPoint]:
    """The paper's models of a scale, `pythia-160m` or `pythia-410m`, at 2048 tokens."""
    found = list[AccuracyPoint]()
    for variant, result in (MLKV_410M if scale == "pythia-410m" else MLKV_160M).items():
        config = registry.model(f"{scale}/{variant}")
        cache, shared = config.kv_bytes_per_token * 2048, config.kv_layers < config.num_layers
        found.append(AccuracyPoint(config.name, cache, result.accuracy, 0.0, shared))
    return found


def accuracy_memory(models: Sequence[AccuracyPoint]) -> Figure:
    """Average accuracy against the KV cache of one sequence, with the Pareto frontier.

    Where the models are Pythia variants, the paper's stand in a panel below. (The paper's axis is
    the least memory that it recorded, weights and all; ours is the cache alone, by formula.)

    Raises:
        ValueError: no models.
    """
    if not models:
        raise ValueError("no models to draw: expected at least one")
    families = {model.name.partition("/")[0] for model in models}
    if families & {"pythia-mini", "pythia-tiny"}:
        families.add("pythia-160m")
    scales = [scale for scale in ("pythia-160m", "pythia-410m") if scale in families]
    paper = [point for scale in scales for point in papers_points(scale)]
    panels = [("ours", models, 1.0), *([("the paper's", paper, 0.6)] if paper else [])]
    gap = 44.0
    with matplotlib.rc_context(STYLE):
        made = canvas(
            "Average accuracy against the KV cache",
            "ARC-Easy, LAMBADA, PIQA and SciQ; squares: K/V shared across layers; line: Pareto "
            "frontier; bars: one standard error",
            height=HEIGHT * (0.4 + 0.7 * len(panels)),
        )
        left, bottom, width, height = made.room
        each = (height - 10 - gap * (len(panels) - 1)) / len(panels)
        for number, (title, drawn, alpha) in enumerate(panels):
            below = bottom + (len(panels) - 1 - number) * (each + gap)
            axes = made.axes(left, below, width, each)
            axes.set_title(title, fontsize=7.5, color=MUTED, pad=3, loc="right")
            _draw(axes, drawn, alpha)
    return made.figure


def _draw(axes: Axes, models: Sequence[AccuracyPoint], alpha: float) -> None:
    at = np.array([(m.cache_bytes, m.accuracy) for m in models], float)
    errors = np.array([m.stderr for m in models])
    axes.set_xscale("log", base=2)
    octaves = np.log2(at[:, 0])
    reach = max(0.6 * float(np.ptp(octaves)), 1.0)
    middle = float(octaves.min() + octaves.max()) / 2
    axes.set_xlim(2 ** (middle - reach), 2 ** (middle + reach))
    low, high = float((at[:, 1] - errors).min()), float((at[:, 1] + errors).max())
    margin = max(0.2 * (high - low), 1.0)
    axes.set_ylim(low - margin, high + margin)
    set_cache_ticks(axes, sorted(set(octaves.tolist())), 0.2 * reach)
    axes.set_xlabel("KV cache of one sequence at full context, 16-bit, log scale")
    axes.set_ylabel("Average accuracy, %")
    frontier = at[list(pareto_frontier([(x, -y) for x, y in at.tolist()]))]
    corners = [frontier[0]]
    for before, after in itertools.pairwise(frontier):
        corners += [np.array((after[0], before[1])), after]
    axes.plot(*np.array(corners).T, color=MUTED, linewidth=0.8, alpha=alpha)
    for model, place in zip(models, at, strict=True):
        shade = color(model.shares_layers)
        axes.errorbar(
            *place, yerr=model.stderr or None, fmt=marker(model.shares_layers), color=shade,
            markersize=5, markeredgecolor="white", markeredgewidth=0.6, elinewidth=0.8,
            capsize=2, zorder=4, alpha=alpha,
        )  # fmt: skip
    # What names should not cover: the frontier and the error bars.
    up = np.stack([np.zeros_like(errors), errors], axis=1)
    bars = np.stack([at - up, at + up], axis=1)
    lines = [*itertools.pairwise(corners), *bars]
    covered = [_between(*points(axes, np.array(line))) for line in lines]
    _label(axes, models, at, np.concatenate(covered))


def _between(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points `[n, 2]` a few apart on a line."""
    return np.linspace(start, end, 2 + int(np.abs(end - start).max() // 3))


def _label(axes: Axes, models: Sequence[AccuracyPoint], at: np.ndarray, lines: np.ndarray) -> None:
    names = short_names(model.name for model in models)
    here = points(axes, at)
    sizes = np.array([(text_width(name, LABEL), 1.15 * LABEL) for name in names])
    bounds = points(axes, np.array([axes.get_xlim(), axes.get_ylim()]).T)
    bounds += [(3, 3), (-1, -1)]
    centres = place_labels(here, sizes, lines, bounds)
    for model, name, place, offset in zip(models, names, at, centres - here, strict=True):
        axes.annotate(
            name, tuple(place), tuple(offset), textcoords="offset points", ha="center",
            va="center", fontsize=LABEL, color=color(model.shares_layers), zorder=5,
        )  # fmt: skip
