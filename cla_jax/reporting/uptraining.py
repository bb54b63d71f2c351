"""MLKV Table 2, from a sweep of `experiments/mlkv/uptrain.py`: loss before and after uptraining."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
from cla_jax.reporting._ranks import ranks, spearman
from cla_jax.reporting._style import HEIGHT, INK, LABEL, MUTED, STYLE, canvas, color, marker
from cla_jax.reporting.design_space import settings, unfinished
from cla_jax.reporting.papers import MLKV_160M, MLKV_410M, MLKVResult
from cla_jax.reporting.runs import Run
from cla_jax.reporting.sweeps import SweepRecord
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table

__all__ = ["COLUMNS", "Source", "Uptrained", "uptrained", "uptraining", "write_uptraining"]

MERGES = ("mean", "first")
_LAST = 0.05  # share of the training records whose mean is the training loss at the end


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that was converted.

    Attributes:
        name: of the model or of its checkpoint.
        fingerprint: SHA-256 of its parameters.
        parameters: how many.
        kv_heads: in all layers together.
        validation_loss: nats per token.
    """

    name: str
    fingerprint: str
    parameters: int
    kv_heads: int
    validation_loss: float


@dataclasses.dataclass(frozen=True)
class Uptrained:
    """A variant of the source: its runs and what the paper says.

    Attributes:
        variant: by the paper's name.
        runs: by how KV heads were merged; at least one.
        paper: of the same name; None where the paper has none.
        rank: by loss after uptraining from means, among the variants with a loss in the paper.
        paper_rank: of the paper's loss among the same.
    """

    variant: str
    runs: Mapping[str, Run]
    paper: MLKVResult | None
    rank: int | None = None
    paper_rank: int | None = None

    @property
    def run(self) -> Run:
        """One of them, for what all have in common."""
        return next(iter(self.runs.values()))

    @property
    def kv_heads(self) -> int:
        """In all layers together."""
        return self.run.kv_layers * self.run.kv_heads

    def converted(self, merge: str) -> float | None:
        """Validation loss before the first update."""
        run = self.runs.get(merge)
        return None if run is None else float(run.validation.loss[0])

    def after(self, merge: str) -> float | None:
        """Validation loss after the last."""
        run = self.runs.get(merge)
        return None if run is None else run.validation_loss

    def training(self, merge: str) -> float | None:
        """Mean training loss of the last records: the kind of loss that the paper prints."""
        run = self.runs.get(merge)
        if run is None:
            return None
        return float(run.training.loss[-max(round(_LAST * len(run.training)), 1) :].mean())


def _column(
    key: str, heading: str, loss: Callable[[Uptrained, str], float | None], merge: str
) -> Column[Uptrained]:
    return Column[Uptrained](
        f"{key}_{merge}", f"{heading}, {merge}", lambda u: loss(u, merge), ".4f"
    )


COLUMNS: tuple[Column[Uptrained], ...] = (
    Column("model", "model", lambda u: u.run.name),
    Column("parameters", "parameters", lambda u: u.run.parameters, "d"),
    Column("kv_layers", "KV layers", lambda u: u.run.kv_layers, "d"),
    Column("kv_heads", "KV heads a layer", lambda u: u.run.kv_heads, "d"),
    Column("total_kv_heads", "in all", lambda u: u.kv_heads, "d"),
    Column("kv_bytes", "KV bytes/token", lambda u: u.run.kv_bytes_per_token, "d"),
    _column("converted", "converted", Uptrained.converted, "mean"),
    _column("uptrained", "uptrained", Uptrained.after, "mean"),
    _column("converted", "converted", Uptrained.converted, "first"),
    _column("uptrained", "uptrained", Uptrained.after, "first"),
    _column("training", "training loss", Uptrained.training, "mean"),
    _column("training", "training loss", Uptrained.training, "first"),
    Column("paper_loss", "paper's loss", lambda u: u.paper and u.paper.loss, ".4f"),
    Column("rank", "rank", lambda u: u.rank, "d"),
    Column("paper_rank", "paper's", lambda u: u.paper_rank, "d"),
    Column("paper_accuracy", "paper's accuracy, %", lambda u: u.paper and u.paper.accuracy, ".2f"),
)
_VARIANT = Column[Uptrained]("variant", "variant", lambda u: u.variant)
_SHORT = ("total_kv_heads", "converted_mean", "uptrained_mean", "converted_first",
          "uptrained_first", "paper_loss", "rank", "paper_rank")  # fmt: skip


def uptrained(sweep: SweepRecord) -> tuple[Uptrained, ...]:
    """The finished runs of a sweep by variant, in the paper's order.

    Raises:
        ValueError: none is finished, or one was not begun with a converted model.
    """
    papers = MLKV_410M if sweep.scale == "410m" else MLKV_160M
    rows = list[Uptrained]()
    members = [m for m in sweep.members if m.run is not None and Path(m.directory).name in MERGES]
    for name, group in itertools.groupby(members, key=lambda member: member.model):
        variant = name.partition("/")[2]
        runs = {Path(m.directory).name: m.run for m in group if m.run is not None}
        for run in runs.values():
            if not len(run.validation) or run.validation.steps[0] != 0:
                raise ValueError(
                    f"{run.directory} was not begun with a converted model: its metrics hold no "
                    "validation loss at step 0"
                )
        runs = {merge: runs[merge] for merge in MERGES if merge in runs}
        rows.append(Uptrained(variant, runs, papers.get(variant)))
    if not rows:
        raise ValueError(f"no finished runs in {sweep.directories[0]}: expected at least one")
    return _ranked(rows)


def _ranked(rows: Sequence[Uptrained]) -> tuple[Uptrained, ...]:
    ours, papers = dict[str, float](), dict[str, float]()
    for row in rows:
        loss, paper = row.after("mean"), row.paper and row.paper.loss
        if loss is not None and paper is not None:
            ours[row.variant], papers[row.variant] = loss, paper
    rank, paper_rank = ranks(ours), ranks(papers)
    return tuple(
        dataclasses.replace(row, rank=rank.get(row.variant), paper_rank=paper_rank.get(row.variant))
        for row in rows
    )


def uptraining(rows: Sequence[Uptrained], source: Source) -> Figure:
    """Validation loss against total KV heads: converted, then uptrained, then the paper's."""
    papers = [row for row in rows if row.paper is not None and row.paper.loss is not None]
    panels = 3 if papers else 2
    legend, gap = 24.0, 26.0
    with matplotlib.rc_context(STYLE):
        made = canvas(
            _title(rows),
            f"validation loss of {source.name} variants; dashed: the source itself"
            + ("; below, the paper's loss after uptraining Pythia-160M" if papers else ""),
            height=panels * 0.62 * HEIGHT + 60,
        )  # fmt: skip
        left, bottom, width, height = made.room
        each = (height - legend - (panels - 1) * gap) / panels
        axes = [
            made.axes(left, bottom + (panels - 1 - i) * (each + gap), width, each)
            for i in range(panels)
        ]
        heads = sorted({row.kv_heads for row in rows} | {source.kv_heads})
        for at, what in zip(axes, ("converted", "uptrained", "paper"), strict=False):
            _draw(at, rows if what != "paper" else papers, what)
            _set_axes(at, heads)
        for at, title in zip(axes, ("right after conversion", "after uptraining"), strict=False):
            at.set_title(title, fontsize=7.5, color=MUTED, pad=3, loc="right")
            at.axhline(source.validation_loss, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            at.plot([source.kv_heads], [source.validation_loss], "D", color=INK, markersize=4)
        if papers:
            axes[2].set_title(
                "the paper's, after uptraining", fontsize=7.5, color=MUTED, pad=3, loc="right"
            )
        axes[len(axes) // 2].set_ylabel("Loss, nats per token  (← lower is better)")
        axes[-1].set_xlabel("KV heads in all layers together, log scale")
        used = [merge for merge in MERGES if any(merge in row.runs for row in rows)]
        made.figure.legend(
            handles=_legend(rows, used), loc="upper center", ncols=4, fontsize=LABEL,
            bbox_to_anchor=(
                (left + width / 2) / (72 * made.figure.get_figwidth()),
                (bottom + height + 4) / (72 * made.figure.get_figheight()),
            ),
        )  # fmt: skip
    return made.figure


def write_uptraining(sweep: SweepRecord, out: Path) -> Written:
    """Writes results.csv, results.md, uptraining.png and .svg and loss.png and .svg.

    Raises:
        ValueError: no finished runs, no record of the source, or parts with different sources.
    """
    source, rows = _source_of(sweep), uptrained(sweep)
    columns = [c for c in COLUMNS if any(c.value(row) is not None for row in rows)]
    short = [_VARIANT, *(column for column in columns if column.key in _SHORT)]
    drawn = [run for row in rows for merge, run in row.runs.items()
             if merge == next(iter(row.runs))]  # fmt: skip
    written = [
        write_atomically(out / "results.csv", csv_text(rows, COLUMNS).encode()),
        write_atomically(out / "results.md", _document(sweep, rows, source, columns).encode()),
    ]
    written += figures.save(uptraining(rows, source), out / "uptraining")
    written += figures.save(figures.loss_curves(drawn), out / "loss")
    return Written(tuple(written), terminal_table(rows, short))


def _source_of(sweep: SweepRecord) -> Source:
    first, *others = sweep.directories
    source = load_source(first)
    for directory in others:
        other = load_source(directory)
        if other.fingerprint != source.fingerprint:
            raise ValueError(
                f"{directory} holds variants of {other.name} (parameters "
                f"{other.fingerprint[:16]}), {first} those of {source.name} (parameters "
                f"{source.fingerprint[:16]}): report on each without the other"
            )
    return source


def load_source(directory: Path) -> Source:
    """What `experiments/mlkv/uptrain.py` recorded of the model that it converted.

    Raises:
        ValueError: nothing, or something else.
    """
    path = directory / "source.json"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        return Source(**values)
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no record of its source: {path.name} is missing"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a source: {error}") from None


def _document(
    sweep: SweepRecord,
    rows: Sequence[Uptrained],
    source: Source,
    columns: Sequence[Column[Uptrained]],
) -> str:
    fell = [
        f"{row.variant} ({merge})"
        for row in rows
        for merge, run in row.runs.items()
        if not run.validation_loss < run.validation.loss[0]
    ]
    count = sum(len(row.runs) for row in rows)
    lines = [
        f"# MLKV Table 2 at scale {sweep.scale}",
        "",
        f"Source: {source.name}, {source.parameters:,} parameters, {source.kv_heads} KV heads, "
        f"validation loss {source.validation_loss:.4f} (parameters {source.fingerprint[:12]}). "
        f"Each variant was converted by merging KV heads (their mean, or the first of each group) "
        f"and trained on {rows[0].run.tokens:,} tokens ({settings(sweep)}). Losses are in nats per "
        "token, on validation text; *training loss* is the mean of the last 5 % of the records. "
        "The columns called *paper's* are of Pythia at the paper's own scale, tokens and data.",
        "",
        markdown(rows, columns),
        f"The loss fell from its converted value in all {count} runs."
        if not fell
        else f"The loss did not fall in {len(fell)} of {count} runs: {', '.join(fell)}.",
        "",
        *_correlation(rows),
        *unfinished(sweep),
        "![loss against KV heads](uptraining.png)",
        "",
        "![loss over uptraining](loss.png)",
    ]
    return "\n".join(lines) + "\n"


def _correlation(rows: Sequence[Uptrained]) -> list[str]:
    pairs = [(r.rank, r.paper_rank) for r in rows if r.rank is not None and r.paper_rank]
    if len(pairs) < 5:
        return []
    return [
        f"Rank correlation with Table 2 (Spearman, {len(pairs)} variants, heads merged by their "
        f"mean): {spearman(pairs):.2f}. One run each: differences between neighbours may be "
        "noise.",
        "",
    ]


def _title(rows: Sequence[Uptrained]) -> str:
    runs = [run for row in rows for run in row.runs.values()]
    before = [float(run.validation.loss[0]) for run in runs]
    after = [run.validation_loss for run in runs]
    return (
        f"Converted: loss {min(before):.2f} to {max(before):.2f}; "
        f"uptrained: {min(after):.2f} to {max(after):.2f}"
    )


def _draw(axes: Axes, rows: Sequence[Uptrained], what: str) -> None:
    """Families of variants, a line for each; means filled, firsts hollow."""
    for shared in (False, True):
        family = sorted(
            (row for row in rows if row.run.shares_layers == shared), key=lambda row: row.kv_heads
        )
        for merge in MERGES if what != "paper" else ("paper",):
            points = [(row.kv_heads, _loss(row, what, merge)) for row in family]
            drawn = np.array([point for point in points if point[1] is not None], float)
            if not len(drawn):
                continue
            axes.plot(
                drawn[:, 0], drawn[:, 1], marker(shared), color=color(shared), markersize=4,
                linestyle=":" if merge == "first" else "-", linewidth=1.0,
                markerfacecolor="white" if merge == "first" else color(shared),
                alpha=0.55 if merge == "paper" else 1.0, zorder=3 if merge == "first" else 4,
            )  # fmt: skip


def _loss(row: Uptrained, what: str, merge: str) -> float | None:
    if what == "paper":
        return row.paper.loss if row.paper else None
    return row.converted(merge) if what == "converted" else row.after(merge)


def _set_axes(axes: Axes, heads: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(heads[0] / 1.25, heads[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(list(heads)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.12)


def _legend(rows: Sequence[Uptrained], merges: Sequence[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=color(shared), marker=marker(shared), markersize=4, linewidth=1.0,
               label=name)
        for shared, name in ((False, "GQA, MQA"), (True, "MLKV"))
        if any(row.run.shares_layers == shared for row in rows)
    ]  # fmt: skip
    if len(merges) > 1:
        handles += [
            Line2D([], [], color=MUTED, linestyle="-", marker="o", markersize=4,
                   linewidth=1.0, label="mean"),
            Line2D([], [], color=MUTED, linestyle=":", marker="o", markersize=4,
                   linewidth=1.0, markerfacecolor="white", label="first head"),
        ]  # fmt: skip
    return handles
