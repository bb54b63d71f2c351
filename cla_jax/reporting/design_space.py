"""CLA Table 1 and Figure 3, from a sweep of `experiments/cla/design_space.py`."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.console import Group

from cla_jax.registry import model
from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
from cla_jax.reporting._pareto import Point, draw_pareto
from cla_jax.reporting._ranks import ranks, spearman
from cla_jax.reporting._style import HEIGHT, STYLE, canvas
from cla_jax.reporting._verdicts import Verdicts
from cla_jax.reporting.claims import CLAIMS, Sample
from cla_jax.reporting.judging import noise_of
from cla_jax.reporting.papers import CLA_TABLE_1, PaperResult, variant_in_paper
from cla_jax.reporting.runs import Run
from cla_jax.reporting.sweeps import SweepRecord
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table

__all__ = [
    "COLUMNS",
    "DesignPoint",
    "design_points",
    "design_space",
    "paper_design_space",
    "write_design_space",
]

_REFERENCE = "H128-MQA"  # whose perplexity the others are compared with, here and in the paper


@dataclasses.dataclass(frozen=True)
class DesignPoint:
    """A model of the design space: our runs of it and the paper's.

    Attributes:
        runs: one for each seed.
        paper: the paper's result.
        rank: by perplexity among the models here, from 1.
        paper_rank: of the paper's results among the same models.
        ratio: perplexity over that of H128-MQA, if it is there.
        paper_ratio: the same in the paper.
    """

    runs: tuple[Run, ...]
    paper: PaperResult
    rank: int
    paper_rank: int
    ratio: float | None
    paper_ratio: float | None

    @property
    def run(self) -> Run:
        """The first seed's, for what all have in common."""
        return self.runs[0]

    @property
    def perplexity(self) -> float:
        """Mean validation perplexity over the seeds."""
        return _mean(self.runs)

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and greatest over the seeds."""
        if len(self.runs) == 1:
            return None
        perplexities = [run.validation_perplexity for run in self.runs]
        return min(perplexities), max(perplexities)

    @property
    def tokens_per_second(self) -> float:
        """Of training, over all seeds."""
        return sum(r.tokens for r in self.runs) / max(sum(r.seconds for r in self.runs), 1e-9)


COLUMNS: tuple[Column[DesignPoint], ...] = (
    Column("model", "model", lambda p: p.run.name),
    Column("parameters", "parameters", lambda p: p.run.parameters, "d"),
    Column("kv_layers", "KV layers", lambda p: p.run.kv_layers, "d"),
    Column("kv_heads", "KV heads", lambda p: p.run.kv_heads, "d"),
    Column("head_dim", "head dim", lambda p: p.run.head_dim, "d"),
    Column("kv_bytes", "KV bytes/token", lambda p: p.run.kv_bytes_per_token, "d"),
    Column("paper_kv_bytes", "paper's", lambda p: p.paper.kv_bytes_per_token, "d"),
    Column("perplexity", "validation perplexity", lambda p: p.perplexity, ".3f"),
    Column("seeds", "seeds", lambda p: len(p.runs), "d"),
    Column("spread", "spread", lambda p: p.spread and p.spread[1] - p.spread[0], ".3f"),
    Column("paper_perplexity", "paper's", lambda p: p.paper.perplexity, ".2f"),
    Column("ratio", f"over {_REFERENCE}", lambda p: p.ratio, ".4f"),
    Column("paper_ratio", "paper's", lambda p: p.paper_ratio, ".4f"),
    Column("rank", "rank", lambda p: p.rank, "d"),
    Column("paper_rank", "paper's", lambda p: p.paper_rank, "d"),
    Column("tokens_per_second", "tokens/s", lambda p: p.tokens_per_second, ".0f"),
)
_RUN_COLUMNS: tuple[Column[Run], ...] = (
    Column("model", "model", lambda r: r.name),
    Column("seed", "seed", lambda r: r.seed, "d"),
    Column("steps", "steps", lambda r: r.steps, "d"),
    Column("tokens", "tokens", lambda r: r.tokens, "d"),
    Column("validation_loss", "validation loss", lambda r: r.validation_loss, ".6f"),
    Column("perplexity", "validation perplexity", lambda r: r.validation_perplexity, ".4f"),
    Column("seconds", "seconds", lambda r: r.seconds, ".1f"),
)
_SHORT = ("model", "kv_bytes", "perplexity", "spread", "paper_perplexity",
          "rank", "paper_rank")  # fmt: skip
_IN_SHORT = tuple(column for column in COLUMNS if column.key in _SHORT)


def design_points(runs: Sequence[Run]) -> tuple[DesignPoint, ...]:
    """Runs by model, in the order given, beside the paper's Table 1.

    Raises:
        ValueError: no runs, or one of a model that the table does not have.
    """
    if not runs:
        raise ValueError("no finished runs to compare: expected at least one")
    by_model = {
        variant_in_paper(name): tuple(group)
        for name, group in itertools.groupby(runs, key=lambda run: run.name)
    }
    for variant, group in by_model.items():
        if variant not in CLA_TABLE_1:
            raise ValueError(f"{group[0].name} is not in CLA Table 1 ({', '.join(CLA_TABLE_1)})")
    ours = {variant: _mean(group) for variant, group in by_model.items()}
    papers = {variant: _perplexity(CLA_TABLE_1[variant]) for variant in by_model}
    rank, paper_rank = ranks(ours), ranks(papers)
    return tuple(
        DesignPoint(
            runs=group,
            paper=CLA_TABLE_1[variant],
            rank=rank[variant],
            paper_rank=paper_rank[variant],
            ratio=ours[variant] / ours[_REFERENCE] if _REFERENCE in ours else None,
            paper_ratio=papers[variant] / papers[_REFERENCE] if _REFERENCE in papers else None,
        )
        for variant, group in by_model.items()
    )


def design_space(points: Sequence[DesignPoint], *, title: str | None = None) -> Figure:
    """CLA Figure 3 twice: our points and frontiers above, the paper's for the same models below.

    Bars span the seeds.
    """
    ours = [
        Point(p.run.name, p.run.kv_bytes_per_token, p.perplexity, p.run.shares_layers, p.spread)
        for p in points
    ]
    papers = [
        Point(variant_in_paper(p.run.name), p.paper.kv_bytes_per_token, _perplexity(p.paper),
              p.run.shares_layers)
        for p in points
    ]  # fmt: skip
    bars = "; bars: the range over seeds" if any(p.spread for p in points) else ""
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or _title(points),
            f"above: ours; below, faint: the paper's (1B, 30 B tokens); lines: frontiers{bars}",
            height=2 * HEIGHT - 20,
        )
        left, bottom, width, height = made.room
        height, gap = height - 12, 28.0  # the legend; the upper ticks
        below = (height - gap) / 2
        upper = made.axes(left, bottom + below + gap, width, height - gap - below)
        lower = made.axes(left, bottom, width, below)
        draw_pareto(upper, ours)
        draw_pareto(lower, papers, muted=True)
        upper.set_xlabel("")
        upper.set_ylabel("Validation perplexity, ours")
        lower.set_ylabel("Validation perplexity, the paper's")
    return made.figure


def paper_design_space(*, title: str | None = None) -> Figure:
    """CLA Figure 3 as the paper has it: perplexity against KV bytes per token of its 1B models."""
    papers = [
        Point(f"1B/{variant}", result.kv_bytes_per_token, _perplexity(result), shares)
        for variant, result in CLA_TABLE_1.items()
        for sharing in [model(f"1B/{variant}").sharing]
        for shares in [sharing.kv_layers < sharing.num_layers]
    ]
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or "Up to 20 KiB per token, the frontier lies lower with cross-layer sharing",
            "CLA Table 1: 1B models, 30 B tokens, learning rate 3e-4; lines: Pareto frontiers",
            height=HEIGHT + 40,
        )
        left, bottom, width, height = made.room
        draw_pareto(made.axes(left, bottom, width, height - 12), papers)  # the legend
    return made.figure


def write_design_space(sweep: SweepRecord, out: Path) -> Written:
    """Writes results.csv, runs.csv, claims.csv, results.md, design_space and loss figures.

    Raises:
        ValueError: no finished runs.
    """
    points = design_points(sweep.runs)
    first_seed, verdicts = [point.run for point in points], paper_verdicts(points)
    written = [
        write_atomically(out / "results.csv", csv_text(points, COLUMNS).encode()),
        write_atomically(out / "runs.csv", csv_text(sweep.runs, _RUN_COLUMNS).encode()),
        write_atomically(out / "claims.csv", verdicts.csv().encode()),
        write_atomically(out / "results.md", _document(sweep, points, verdicts).encode()),
    ]
    written += figures.save(design_space(points), out / "design_space")
    written += figures.save(figures.loss_curves(first_seed), out / "loss")
    shown = Group(terminal_table(points, _IN_SHORT), *verdicts.shown())
    return Written(tuple(written), shown)


def paper_verdicts(points: Sequence[DesignPoint]) -> Verdicts:
    """What the points say of the paper's claims."""
    samples = {
        variant_in_paper(p.run.name): Sample(
            tuple(run.validation_loss for run in p.runs),
            p.run.kv_bytes_per_token,
            _perplexity(p.paper),
        )
        for p in points
    }
    return Verdicts(CLAIMS, samples, noise_of(sample.losses for sample in samples.values()))


def _document(sweep: SweepRecord, points: Sequence[DesignPoint], verdicts: Verdicts) -> str:
    run = points[0].run
    lines = [
        f"# CLA Table 1 at scale {sweep.scale}",
        "",
        f"{len(points)} of the paper's 20 models, {run.tokens:,} training tokens each "
        f"({settings(sweep)}). "
        "The columns called *paper's* are those of the 1B models on 30 B tokens; ranks are among "
        "the models here.",
        "",
        markdown(points, COLUMNS),
    ]
    if len(points) > 4:
        lines += [f"Rank correlation with the paper (Spearman): {_spearman(points):.2f}.", ""]
    lines += verdicts.lines("The paper's claims")
    lines += unfinished(sweep)
    lines += ["![perplexity against the KV cache](design_space.png)", "", "![loss](loss.png)"]
    return "\n".join(lines) + "\n"


def settings(sweep: SweepRecord) -> str:
    """What its runs have in common, in words."""
    shared = [f"{key.replace('_', ' ')} {v}" for key, v in sweep.options["experiment"].items()]
    data = sweep.options["data"]
    return f"{', '.join(shared)}; tokenizer {data['tokenizer']}, data {data['tokens'][:12]}"


def unfinished(sweep: SweepRecord) -> list[str]:
    """Lines that name the runs which are not in the table."""
    lines = list[str]()
    for what, names in (
        ("Diverged", [m.directory for m in sweep.members if m.diverged and m.run is None]),
        ("Not finished", [m.directory for m in sweep.members if not m.diverged and m.run is None]),
    ):
        if names:
            lines += [f"{what}: {', '.join(names)}.", ""]
    return lines


def _title(points: Sequence[DesignPoint]) -> str:
    scales = {p.run.name.partition("/")[0] for p in points}
    title = f"Scale {', '.join(sorted(scales))} beside the paper's 1B models"
    return title if len(points) < 5 else f"{title}: rank correlation {_spearman(points):.2f}"


def _mean(runs: Sequence[Run]) -> float:
    return math.fsum(run.validation_perplexity for run in runs) / len(runs)


def _perplexity(paper: PaperResult) -> float:
    assert paper.perplexity is not None
    return paper.perplexity


def _spearman(points: Sequence[DesignPoint]) -> float:
    return spearman([(point.rank, point.paper_rank) for point in points])
