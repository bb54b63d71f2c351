"""Figures for papers: loss curves, and perplexity against the KV cache (CLA Figure 3).

Each function takes finished runs and returns a `matplotlib.figure.Figure`; `save` writes it as PNG
and SVG. No display and no state of `pyplot` is touched.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from cla_jax.reporting._files import write_atomically
from cla_jax.reporting._pareto import Point, draw_pareto, format_bytes, pareto_frontier
from cla_jax.reporting._style import (
    FEW,
    LABEL,
    MUTED,
    STYLE,
    canvas,
    label_ends,
    line_styles,
    marker,
    short_names,
    text_width,
)
from cla_jax.reporting.runs import Run

__all__ = ["files_of", "format_bytes", "loss_curves", "pareto", "pareto_frontier", "save"]

# What each format would note down of the day and the program: left out, same figure, same bytes.
_NOTES = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}


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
    names = _labels(runs)
    styles = list(line_styles([run.shares_layers for run in runs]))
    few = len(runs) <= FEW
    if few:
        names = [
            f"{name}  {run.validation_loss:.3f}" for name, run in zip(names, runs, strict=True)
        ]
    subtitle = "line: training loss, running mean; marks: validation loss"
    if few:
        subtitle = "light: training loss; line: its running mean; marks: validation loss"
    with matplotlib.rc_context(STYLE):
        right = max(text_width(name, LABEL) for name in names) + (16 if few else 30)
        made = canvas(_loss_title(runs) if title is None else title, subtitle, right=float(right))
        axes = made.axes(*made.room)
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
                loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=LABEL,
                handlelength=1.8, labelspacing=0.3,
            )  # fmt: skip
    return made.figure


def pareto(runs: Sequence[Run], *, title: str | None = None) -> Figure:
    """Validation perplexity against KV bytes per token, with the Pareto frontiers (CLA Figure 3).

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
    models = [
        Point(run.name, run.kv_bytes_per_token, run.validation_perplexity, run.shares_layers)
        for run in runs
    ]
    subtitle = "lines: Pareto frontiers" if len(runs) > 2 else ""
    with matplotlib.rc_context(STYLE):
        made = canvas(_pareto_title(runs) if title is None else title, subtitle)
        left, bottom, width, height = made.room
        draw_pareto(made.axes(left, bottom, width, height - (0 if subtitle else 6)), models)
    return made.figure


def save(figure: Figure, path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes `path`.png (200 dots per inch) and `path`.svg, each whole or not at all.

    The same figure gives the same bytes. Text in the SVG stays text.

    Args:
        figure: from this module.
        path: without suffix, or with that of the one format wanted (`.png`, `.svg`, `.pdf`); its
            directory is made.

    Returns:
        The paths of what was written.

    Raises:
        ValueError: another suffix.
    """
    written = files_of(path)
    for target in written:
        content, kind = io.BytesIO(), target.suffix.lower()[1:]
        with matplotlib.rc_context(STYLE):
            figure.savefig(content, format=kind, dpi=200, metadata={_NOTES[kind]: None})
        write_atomically(target, content.getvalue())
    return written


def files_of(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that `save` will write for a path, so that a bad one is told before any work.

    What begins with a digit is no suffix: `v1.0` gives `v1.0.png` and `v1.0.svg`.

    Raises:
        ValueError: a suffix of no format that is written.
    """
    path = Path(path)
    if not path.suffix[1:2].isalpha():
        return path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    if path.suffix.lower()[1:] not in _NOTES:
        raise ValueError(
            f"{path}: figures are not written as {path.suffix}; expected .png, .svg or .pdf, or no "
            f"suffix for both PNG and SVG, as in {path.with_suffix('')}"
        )
    return (path,)


def _check_some(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("no runs to draw: expected at least one")


def _labels(runs: Sequence[Run]) -> list[str]:
    """Model names; where several runs are of one model, with the seed."""
    names = short_names(run.name for run in runs)
    if len(set(names)) == len(names):
        return names
    return [f"{name}, seed {run.seed}" for name, run in zip(names, runs, strict=True)]


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
            run.validation.tokens, run.validation.loss, marker(run.shares_layers), color=color,
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
    inset.set_title("the last 30 %", fontsize=7, color=MUTED, pad=3)


def _label_ends(
    axes: Axes, runs: Sequence[Run], labels: Sequence[str], styles: Sequence[tuple[str, str]]
) -> None:
    low, high = axes.get_ylim()
    # A run that diverged is labelled at the top.
    losses = np.nan_to_num([run.validation_loss for run in runs], nan=high, posinf=high)
    ends = [
        (float(run.training.tokens[-1]), float(loss))
        for run, loss in zip(runs, losses.clip(low, high), strict=True)
    ]
    label_ends(axes, ends, labels, [color for color, _ in styles])


def _pareto_title(runs: Sequence[Run]) -> str:
    without, *shared = sorted(runs, key=lambda run: run.shares_layers)
    if len(shared) != 1 or without.shares_layers or not shared[0].shares_layers:
        return "Validation perplexity against the KV cache"
    cache = shared[0].kv_bytes_per_token / without.kv_bytes_per_token
    perplexity = shared[0].validation_perplexity / without.validation_perplexity
    name, baseline = _labels([shared[0], without])
    return f"{name}: {cache:.2f} × the cache of {baseline} at {perplexity:.3f} × its perplexity"
