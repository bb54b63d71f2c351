"""CLA Tables 3, 5, 7 and Figures 4, 5, from a sweep of `experiments/cla/learning_rates.py`."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Group

from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
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
from cla_jax.reporting._tuned_verdicts import TunedVerdicts
from cla_jax.reporting.design_space import settings, unfinished
from cla_jax.reporting.sweeps import Member, SweepRecord
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table
from cla_jax.reporting.tuning import Tuned, format_rate, tuned

__all__ = ["COLUMNS", "learning_rates", "write_learning_rates"]

COLUMNS: tuple[Column[Tuned], ...] = (
    Column("model", "model", lambda t: t.run.name),
    Column("kv_bytes", "KV bytes/token", lambda t: t.run.kv_bytes_per_token, "d"),
    Column("best_rate", "best learning rate", lambda t: format_rate(t.best.rate)),
    Column("paper_rate", "paper's", lambda t: t.paper and format_rate(t.paper.learning_rate)),
    Column("perplexity", "validation perplexity", lambda t: t.best.perplexity, ".3f"),
    Column("seeds", "seeds", lambda t: len(t.best.runs), "d"),
    Column("paper_perplexity", "paper's", lambda t: t.paper and t.paper.perplexity, ".2f"),
    Column("paper_wikitext", "paper's Wikitext", lambda t: t.paper and t.paper.wikitext, ".2f"),
    Column("rates", "rates tried", lambda t: len(t.rungs), "d"),
    Column("bracketed", "higher rate is no better", lambda t: t.bracketed),
)
_SHORT = ("model", "best_rate", "paper_rate", "perplexity", "seeds", "rates", "bracketed")
_RUN_COLUMNS: tuple[Column[Member], ...] = (
    Column("model", "model", lambda m: m.model),
    Column("learning_rate", "learning rate", lambda m: format_rate(m.learning_rate)),
    Column("seed", "seed", lambda m: m.seed, "d"),
    Column("perplexity", "validation perplexity",
           lambda m: m.run and m.run.validation_perplexity, ".3f"),
    Column("state", "", lambda m: "diverged" if m.run is None else ""),
)  # fmt: skip


def learning_rates(
    rows: Sequence[Tuned], *, same_scale: bool = False, title: str | None = None
) -> Figure:
    """Validation perplexity against the learning rate (CLA Figures 4 and 5), the best filled.

    Args:
        rows: the models.
        same_scale: ours are the paper's models and tokens: mark its best, too.
        title: what is seen; by default the best rates.
    """
    names = short_names(row.run.name for row in rows)
    styles = list(line_styles([row.run.shares_layers for row in rows]))
    labels = [
        f"{name}  {row.best.perplexity:.2f} at {format_rate(row.best.rate)}"
        for name, row in zip(names, rows, strict=True)
    ]
    subtitle = "filled: best of each model; cross: diverged"
    if not any(rung.diverged for row in rows for rung in row.rungs):
        subtitle = "filled: best of each model"
    if any(len(rung.runs) > 1 for row in rows for rung in row.finished):
        subtitle += "; bars: the range over seeds"
    if same_scale:
        subtitle += "; star: the paper's best"
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or "Validation perplexity against the peak learning rate", subtitle,
            right=float(max(text_width(label, LABEL) for label in labels) + 16), bottom=46.0,
        )  # fmt: skip
        axes = made.axes(*made.room)
        _set_axes(axes, rows, same_scale)
        for row, (color, dash) in zip(rows, styles, strict=True):
            _draw(axes, row, color, dash, same_scale)
        ends = [(row.finished[-1].rate, row.finished[-1].perplexity) for row in rows]
        label_ends(axes, ends, labels, [color for color, _ in styles])
    return made.figure


def write_learning_rates(sweep: SweepRecord, out: Path) -> Written:
    """Writes results.csv and .md (best of each model), runs.csv, claims.csv, and figures.

    Raises:
        ValueError: no finished runs.
    """
    options = sweep.options["experiment"]
    rows = tuned(sweep.members, options.get("table"))
    # The paper's perplexities are marked only where its budget was ours.
    same_scale = sweep.scale in ("1B", "3B") and rows[0].run.tokens >= 25e9
    best, verdicts = [row.run for row in rows], TunedVerdicts(rows)
    judged = options.get("table") != 7  # whose rates are given, not found
    document = [
        f"# Learning rates at scale {sweep.scale}, beside CLA Table {options.get('table')}",
        "",
        f"{best[0].tokens:,} training tokens a run ({settings(sweep)}). The paper's figures are at "
        "its own scale, tokens and data.",
        "",
        markdown(rows, COLUMNS),
        "## Every run",
        "",
        markdown([member for row in rows for member in row.members], _RUN_COLUMNS),
        *(verdicts.lines() if judged else []),
        *unfinished(sweep),
        "![perplexity against learning rate](learning_rates.png)",
        "",
        "![loss at the best learning rates](loss.png)",
    ]
    members = [member for row in rows for member in row.members]
    written = [
        write_atomically(out / "results.csv", csv_text(rows, COLUMNS).encode()),
        write_atomically(out / "runs.csv", csv_text(members, _RUN_COLUMNS).encode()),
        write_atomically(out / "results.md", ("\n".join(document) + "\n").encode()),
    ]
    if judged:
        written.append(write_atomically(out / "claims.csv", verdicts.csv().encode()))
    written += figures.save(learning_rates(rows, same_scale=same_scale), out / "learning_rates")
    written += figures.save(figures.loss_curves(best), out / "loss")
    table = terminal_table(rows, [column for column in COLUMNS if column.key in _SHORT])
    return Written(tuple(written), Group(table, *verdicts.shown()) if judged else table)


def _set_axes(axes: Axes, rows: Sequence[Tuned], same_scale: bool) -> None:
    rates = {rung.rate for row in rows for rung in row.rungs}
    perplexities = [rung.perplexity for row in rows for rung in row.finished]
    if same_scale:
        for row in rows:
            if row.paper is not None and row.paper.perplexity is not None:
                rates.add(row.paper.learning_rate)
                perplexities.append(row.paper.perplexity)
    axes.set_xscale("log")
    low, high = min(rates), max(rates)
    margin = max(0.05 * math.log(high / low), 0.1)
    axes.set_xlim(low * math.exp(-margin), high * math.exp(margin))
    # A rate that is far too low would flatten the rest: twice the distance from the best to the
    # median, and at least 2 %.
    least, median = min(perplexities), float(np.median(perplexities))
    reach = max(2 * (median - least), 0.02 * least)
    top = min(max(perplexities), least + reach)
    pad = max(0.08 * (top - least), 0.002 * least)
    axes.set_ylim(least - 2 * pad, top + 2 * pad)
    axes.xaxis.set_major_locator(FixedLocator(sorted(rates)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_rate(rate)))
    if len(rates) > 5:
        axes.tick_params(axis="x", rotation=30, pad=1)
    axes.set_xlabel("Peak learning rate, log scale")
    axes.set_ylabel("Validation perplexity  (← lower is better)")


def _draw(axes: Axes, row: Tuned, color: str, dash: str, same_scale: bool) -> None:
    best, shared = row.best.rate, row.run.shares_layers
    rungs = [(rung.rate, rung.perplexity) for rung in row.finished]
    axes.plot(*np.array(rungs).T, color=color, linestyle=dash, linewidth=1.1)
    for rung in row.finished:
        seeds = [run.validation_perplexity for run in rung.runs]
        axes.plot([rung.rate] * 2, [min(seeds), max(seeds)], color=color, linewidth=0.8, zorder=3)
        axes.plot(
            [rung.rate], [rung.perplexity], marker(shared), color=color,
            markersize=5 if rung.rate == best else 4,
            markerfacecolor=color if rung.rate == best else "white", zorder=4,
        )  # fmt: skip
    diverged = [rung.rate for rung in row.rungs if rung.diverged]
    axes.plot(
        diverged, [0.97] * len(diverged), "x", color=color, markersize=5, zorder=4,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    if same_scale and row.paper is not None and row.paper.perplexity is not None:
        axes.plot(
            [row.paper.learning_rate], [row.paper.perplexity], "*", color=color, markersize=8,
            markerfacecolor="white", markeredgewidth=0.8, alpha=0.8, zorder=3,
        )  # fmt: skip
