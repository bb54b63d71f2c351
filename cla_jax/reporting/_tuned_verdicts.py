"""What a sweep of learning rates says of the paper's claims."""

import functools
from collections.abc import Mapping, Sequence

from rich.console import RenderableType

from cla_jax.reporting._verdicts import Verdicts
from cla_jax.reporting.claims import RATE_CLAIM, TUNED_CLAIMS, Sample
from cla_jax.reporting.judging import noise_of, plausible_rates, rate_verdict
from cla_jax.reporting.papers import variant_in_paper
from cla_jax.reporting.tuning import Tuned, format_rate


class TunedVerdicts:
    """The verdicts at the best learning rates, and that on the rates themselves.

    Args:
        rows: the models.
    """

    def __init__(self, rows: Sequence[Tuned]) -> None:
        self.rows: Mapping[str, Tuned] = {variant_in_paper(row.run.name): row for row in rows}
        self.noise = noise_of(rung.losses for row in rows for rung in row.finished)
        samples = {
            variant: Sample(row.best.losses, row.run.kv_bytes_per_token, row.paper.perplexity)
            for variant, row in self.rows.items()
            if row.paper is not None and row.paper.perplexity is not None
        }
        self.verdicts = Verdicts(TUNED_CLAIMS, samples, self.noise, "models and rates")

    def lines(self) -> list[str]:
        """A section of a Markdown document."""
        return [*self.verdicts.lines("The paper's claims"), f"{self.rates}", ""]

    def csv(self) -> str:
        """Every pair at the best rates, a line each."""
        return self.verdicts.csv()

    def shown(self) -> list[RenderableType]:
        """For the terminal."""
        return [*self.verdicts.shown(), "", self.rates]

    @functools.cached_property
    def rates(self) -> str:
        """The claim about the best learning rates, and what is to be said of it."""
        claim, names = RATE_CLAIM, (RATE_CLAIM.higher, RATE_CLAIM.lower)
        says = f"{claim.text} (section {claim.section})"
        if missing := [name for name in names if name not in self.rows]:
            return f"{says}: left out, no finished run of {', '.join(missing)}."
        higher, lower = (self.rows[name] for name in names)
        best = "; ".join(
            f"{name} {format_rate(row.best.rate)}"
            + (f" (the paper {format_rate(row.paper.learning_rate)})" if row.paper else "")
            for name, row in zip(names, (higher, lower), strict=True)
        )
        if going := [n for n in names if self.rows[n].bracketed != "yes"]:
            return f"{says}: no verdict, no higher rate was tried of {', '.join(going)}. {best}."
        if self.noise is None:
            return f"{says}: no verdict, no rate has two seeds. {best}."
        plausible = [
            plausible_rates({rung.rate: rung.losses for rung in row.finished}, self.noise)
            for row in (higher, lower)
        ]
        verdict = rate_verdict(*plausible)
        if verdict == "contradicted" and min(plausible[1]) == lower.rungs[0].rate:
            return f"{says}: no verdict, no lower rate was tried of {names[1]}. {best}."
        told = "; ".join(
            f"{name} {', '.join(map(format_rate, rates))}"
            for name, rates in zip(names, plausible, strict=True)
        )
        return (
            f"{says}: {verdict}. Best: {best}. Not told from the best by the "
            f"noise: {told}. Reproduced means that all of the first model's are above all of the "
            "second's; contradicted, that none is above any."
        )
