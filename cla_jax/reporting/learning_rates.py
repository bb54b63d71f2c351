"""CLA Tables 3, 5, 7 and Figures 4, 5, from a sweep of `experiments/cla/learning_rates.py`."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
from cla_jax.reporting.design_space import settings, unfinished
from cla_jax.reporting.papers import (
    CLA_TABLE_3,
    CLA_TABLE_5,
    CLA_TABLE_7,
    PaperResult,
    variant_in_paper,
)
from cla_jax.reporting.runs import Run
from cla_jax.reporting.sweeps import Member, SweepRecord
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table

__all__ = ["COLUMNS", "Tuned", "format_rate", "learning_rates", "tuned", "write_learning_rates"]

_TABLES = {3: CLA_TABLE_3, 5: CLA_TABLE_5, 7: CLA_TABLE_7}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A model at the learning rates that were tried.

    Attributes:
        members: by learning rate, finished or diverged; at least one is finished.
        paper: the paper's result, if it has this model.
    """

    members: tuple[Member, ...]
    paper: PaperResult | None

    @property
    def finished(self) -> list[tuple[float, Run]]:
        """Learning rates with their runs."""
        return [(m.learning_rate, m.run) for m in self.members if m.run is not None]

    @property
    def best(self) -> tuple[float, Run]:
        """The learning rate of the least validation perplexity, and its run."""
        return min(self.finished, key=lambda pair: pair[1].validation_perplexity)

    @property
    def bracketed(self) -> str:
        """Whether a higher rate was tried and was no better: the paper's rule for stopping."""
        return "yes" if self.members[-1].learning_rate > self.best[0] else "not yet"


COLUMNS: tuple[Column[Tuned], ...] = (
    Column("model", "model", lambda t: t.best[1].name),
    Column("kv_bytes", "KV bytes/token", lambda t: t.best[1].kv_bytes_per_token, "d"),
    Column("best_rate", "best learning rate", lambda t: format_rate(t.best[0])),
    Column("paper_rate", "paper's", lambda t: t.paper and format_rate(t.paper.learning_rate)),
    Column("perplexity", "validation perplexity", lambda t: t.best[1].validation_perplexity, ".3f"),
    Column("paper_perplexity", "paper's", lambda t: t.paper and t.paper.perplexity, ".2f"),
    Column("paper_wikitext", "paper's Wikitext", lambda t: t.paper and t.paper.wikitext, ".2f"),
    Column("rates", "rates tried", lambda t: len(t.members), "d"),
    Column("bracketed", "a higher rate is no better", lambda t: t.bracketed),
)
_RUN_COLUMNS: tuple[Column[Member], ...] = (
    Column("model", "model", lambda m: m.model),
    Column("learning_rate", "learning rate", lambda m: format_rate(m.learning_rate)),
    Column("perplexity", "validation perplexity",
           lambda m: m.run and m.run.validation_perplexity, ".3f"),
    Column("state", "", lambda m: "diverged" if m.run is None else ""),
)  # fmt: skip


def format_rate(rate: float) -> str:
    """As the paper prints them, in ASCII: `4.5e-4`."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    return f"{round(rate / 10**exponent, 2):g}e{exponent}"


def tuned(members: Sequence[Member], table: int | None) -> tuple[Tuned, ...]:
    """Members by model, beside a table of the paper; models without a finished run are left out.

    Args:
        members: in the order of models, then of learning rates.
        table: 3, 5 or 7.

    Raises:
        ValueError: no finished run.
    """
    papers = {} if table is None else _TABLES[table]
    rows = list[Tuned]()
    for name, group in itertools.groupby(members, key=lambda member: member.model):
        done = tuple(member for member in group if member.run is not None or member.diverged)
        if any(member.run is not None for member in done):
            rows.append(Tuned(done, papers.get(variant_in_paper(name))))
    if not rows:
        raise ValueError("no finished runs to compare: expected at least one")
    return tuple(rows)


def learning_rates(
    rows: Sequence[Tuned], *, same_scale: bool = False, title: str | None = None
) -> Figure:
    """Validation perplexity against the learning rate (CLA Figures 4 and 5), the best filled.

    Args:
        rows: the models.
        same_scale: ours are the paper's models and tokens: mark its best, too.
        title: what is seen; by default the best rates.
    """
    names = short_names(row.best[1].name for row in rows)
    styles = list(line_styles([row.best[1].shares_layers for row in rows]))
    labels = [
        f"{name}  {row.best[1].validation_perplexity:.2f} at {format_rate(row.best[0])}"
        for name, row in zip(names, rows, strict=True)
    ]
    subtitle = "filled: best of each model; cross: diverged"
    if not any(member.diverged for row in rows for member in row.members):
        subtitle = "filled: best of each model"
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
        ends = [(rate, run.validation_perplexity) for rate, run in (r.finished[-1] for r in rows)]
        label_ends(axes, ends, labels, [color for color, _ in styles])
    return made.figure


def write_learning_rates(sweep: SweepRecord, out: Path) -> Written:
    """Writes results.csv and .md (best of each model), runs.csv, and figures.

    Raises:
        ValueError: no finished runs.
    """
    options = sweep.options["experiment"]
    rows = tuned(sweep.members, options.get("table"))
    # The paper's perplexities are marked only where its budget was ours.
    same_scale = sweep.scale in ("1B", "3B") and rows[0].best[1].tokens >= 25e9
    best = [row.best[1] for row in rows]
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
    written += figures.save(learning_rates(rows, same_scale=same_scale), out / "learning_rates")
    written += figures.save(figures.loss_curves(best), out / "loss")
    return Written(tuple(written), terminal_table(rows, COLUMNS))


def _set_axes(axes: Axes, rows: Sequence[Tuned], same_scale: bool) -> None:
    rates = {member.learning_rate for row in rows for member in row.members}
    perplexities = [run.validation_perplexity for row in rows for _, run in row.finished]
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
    rates, perplexities = np.array([(r, run.validation_perplexity) for r, run in row.finished]).T
    best, shared = row.best[0], row.best[1].shares_layers
    axes.plot(rates, perplexities, color=color, linestyle=dash, linewidth=1.1)
    for rate, perplexity in zip(rates, perplexities, strict=True):
        axes.plot(
            [rate], [perplexity], marker(shared), color=color, markersize=5 if rate == best else 4,
            markerfacecolor=color if rate == best else "white", zorder=4,
        )  # fmt: skip
    diverged = [m.learning_rate for m in row.members if m.run is None]
    axes.plot(
        diverged, [0.97] * len(diverged), "x", color=color, markersize=5, zorder=4,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    if same_scale and row.paper is not None and row.paper.perplexity is not None:
        axes.plot(
            [row.paper.learning_rate], [row.paper.perplexity], "*", color=color, markersize=8,
            markerfacecolor="white", markeredgewidth=0.8, alpha=0.8, zorder=3,
        )  # fmt: skip
