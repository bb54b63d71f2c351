"""Claims and verdicts as Markdown, CSV and for the terminal."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from rich.console import RenderableType

from cla_jax.reporting.claims import Claim, Sample
from cla_jax.reporting.judging import Judged, Noise, judge, verdict_of
from cla_jax.reporting.tables import Column, csv_text, markdown, terminal_table


def _percent(logarithm: float | None) -> float | None:
    return None if logarithm is None else 100 * math.expm1(logarithm)


_PAIR_COLUMNS: tuple[Column[Judged], ...] = (
    Column("claim", "claim", lambda j: j.claim, "d"),
    Column("lower", "lower, by the claim", lambda j: j.pair.lower),
    Column("higher", "than", lambda j: j.pair.higher),
    Column("perplexity_lower", "perplexity of the first", lambda j: j.ours[0], ".3f"),
    Column("perplexity_higher", "of the second", lambda j: j.ours[1], ".3f"),
    Column("seeds", "seeds", lambda j: f"{j.seeds[0]}, {j.seeds[1]}"),
    Column("difference", "difference, %", lambda j: _percent(j.difference), "+.2f"),
    Column("allowed", "allowed, %", lambda j: 100 * j.pair.tolerance or None, ".2f"),
    Column("noise", "noise, ± %", lambda j: _percent(j.noise), ".2f"),
    Column("paper_lower", "paper's first", lambda j: j.paper[0], ".2f"),
    Column("paper_higher", "paper's second", lambda j: j.paper[1], ".2f"),
    Column("paper_difference", "paper's difference, %",
           lambda j: _percent(j.papers_difference), "+.2f"),
    Column("verdict", "verdict", lambda j: j.verdict),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What runs say of claims, to be written.

    Attributes:
        claims: what was claimed.
        samples: the models that are there.
        noise: between seeds; None where no model has several.
        repeated: what has several seeds: "models".
    """

    claims: Sequence[Claim]
    samples: Mapping[str, Sample]
    noise: Noise | None
    repeated: str = "models"

    @functools.cached_property
    def judged(self) -> tuple[Judged, ...]:
        """Every pair whose models are there."""
        return judge(self.claims, self.samples, self.noise)

    def lines(self, title: str) -> list[str]:
        """A section of a Markdown document."""
        found = [f"## {title}", "", *self._rule(), ""]
        if self.judged:
            found += [markdown(list(enumerate(self.claims, start=1)), self._columns())]
            found += [markdown(self.judged, _PAIR_COLUMNS)]
        return [*found, *self._left_out()]

    def csv(self) -> str:
        """Every pair, a line each."""
        return csv_text(self.judged, _PAIR_COLUMNS)

    def shown(self) -> list[RenderableType]:
        """The claims on which something is to be said, for the terminal."""
        rows = [(n, c) for n, c in enumerate(self.claims, start=1) if self._of(n)]
        if not rows:
            return []
        why = [] if self.noise else ["No verdicts: no model has two seeds (--seeds 0 1)."]
        return ["", terminal_table(rows, self._columns()), *why]

    def _of(self, number: int) -> list[Judged]:
        return [pair for pair in self.judged if pair.claim == number]

    def _columns(self) -> tuple[Column[tuple[int, Claim]], ...]:
        return (
            Column("claim", "no.", lambda row: row[0], "d"),
            Column("section", "section", lambda row: row[1].section),
            Column("text", "claim", lambda row: row[1].text),
            Column("verdict", "verdict", lambda row: self._verdict(row[0])),
            Column("pairs", "pairs", lambda row: self._counts(row[0])),
        )

    def _verdict(self, number: int) -> str:
        pairs = self._of(number)
        return verdict_of(pairs) or ("no verdict" if pairs else "left out")

    def _counts(self, number: int) -> str:
        counts = collections.Counter(str(pair.verdict) for pair in self._of(number))
        if len(counts) == 1:
            (count,) = counts.values()
            return str(count)
        return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())

    def _rule(self) -> list[str]:
        noise = self.noise
        if noise is None:
            return [
                "No model has two seeds: there is no measure of noise, and no verdict; "
                "`--seeds 0 1` gives one."
            ]
        one, two = (_percent(noise.least(n, n)) for n in (1, 2))
        return [
            "Compared are the means over seeds of the final validation loss, the logarithm of "
            "perplexity. The noise is the standard deviation of a run's loss between seeds, "
            f"pooled over all {self.repeated} with several (there are {noise.groups}; degrees of "
            f"freedom: {noise.degrees}): {noise.deviation:.5f} nats. It is taken to be the same "
            f"for models with one seed. A difference counts beyond {noise.quantile:.2f} "
            "standard errors (Student's t, two-sided, 95 %): "
            f"{one:.2f} % of perplexity between models of one seed each, {two:.2f} % of two. One "
            "in twenty pairs that do not differ would count all the same. Seeds are of the "
            "parameters; the order of the data is one, so what another order would change is not "
            "in it. A claim is contradicted by any of its pairs, reproduced by all.",
        ]

    def _left_out(self) -> list[str]:
        found = list[str]()
        for number, claim in enumerate(self.claims, start=1):
            gone = dict.fromkeys(m for r in claim.relations for m in r.missing(self.samples))
            if gone:
                silent = [r.name for r in claim.relations if not r.pairs(self.samples)]
                about = f", so nothing is said on {'; '.join(silent)}" if silent else ""
                found += [f"Claim {number}: no finished run of {', '.join(gone)}{about}.", ""]
        return found
