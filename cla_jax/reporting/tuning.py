"""Models at several learning rates: what was tried, and which is the best."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from cla_jax.reporting.papers import (
    CLA_TABLE_3,
    CLA_TABLE_5,
    CLA_TABLE_7,
    PaperResult,
    variant_in_paper,
)
from cla_jax.reporting.runs import Run
from cla_jax.reporting.sweeps import Member

__all__ = ["Rung", "Tuned", "format_rate", "tuned"]

_TABLES = {3: CLA_TABLE_3, 5: CLA_TABLE_5, 7: CLA_TABLE_7}


@dataclasses.dataclass(frozen=True)
class Rung:
    """A learning rate that a model was trained at.

    Attributes:
        rate: peak.
        members: one for each seed, finished or diverged.
    """

    rate: float
    members: tuple[Member, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The finished ones."""
        return tuple(m.run for m in self.members if m.run is not None)

    @property
    def diverged(self) -> bool:
        """Whether a seed did."""
        return any(m.run is None for m in self.members)

    @property
    def losses(self) -> tuple[float, ...]:
        """Final validation losses, one for each seed."""
        return tuple(run.validation_loss for run in self.runs)

    @property
    def perplexity(self) -> float:
        """Of the mean loss over the seeds."""
        return math.exp(math.fsum(self.losses) / len(self.losses))


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A model at the learning rates that were tried.

    Attributes:
        rungs: by learning rate; one at least has not diverged.
        paper: the paper's result, if it has this model.
    """

    rungs: tuple[Rung, ...]
    paper: PaperResult | None

    @property
    def finished(self) -> tuple[Rung, ...]:
        """Those at which no seed diverged."""
        return tuple(rung for rung in self.rungs if not rung.diverged)

    @property
    def best(self) -> Rung:
        """That of the least validation perplexity."""
        return min(self.finished, key=lambda rung: rung.perplexity)

    @property
    def run(self) -> Run:
        """The best's first, for what all have in common."""
        return self.best.runs[0]

    @property
    def members(self) -> tuple[Member, ...]:
        """Of all rungs."""
        return tuple(member for rung in self.rungs for member in rung.members)

    @property
    def bracketed(self) -> str:
        """Whether a higher rate was tried and was no better: the paper's rule for stopping."""
        return "yes" if self.rungs[-1].rate > self.best.rate else "not yet"


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
    done = [member for member in members if member.run is not None or member.diverged]
    for name, group in itertools.groupby(done, key=lambda member: member.model):
        row = Tuned(
            tuple(
                Rung(rate, tuple(tried))
                for rate, tried in itertools.groupby(group, key=lambda m: m.learning_rate)
            ),
            papers.get(variant_in_paper(name)),
        )
        if row.finished:
            rows.append(row)
    if not rows:
        raise ValueError("no finished runs to compare: expected at least one")
    return tuple(rows)


def format_rate(rate: float) -> str:
    """As the paper prints them, in ASCII: `4.5e-4`."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    return f"{round(rate / 10**exponent, 2):g}e{exponent}"
