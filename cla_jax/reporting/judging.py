"""What runs say of the paper's claims: reproduced, contradicted, or within the noise between seeds.

Runs are compared by the logarithms of perplexities, which are losses in nats: a difference of 0.01
is one per cent of perplexity, ours or the paper's.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from scipy import special

from cla_jax.reporting.claims import Claim, Pair, Samples

__all__ = [
    "Judged",
    "Noise",
    "Verdict",
    "judge",
    "noise_of",
    "plausible_rates",
    "rate_verdict",
    "verdict_of",
]

Verdict = Literal["reproduced", "within noise", "contradicted"]


class Noise(NamedTuple):
    """How far runs of one model that differ in their seeds lie apart.

    Attributes:
        deviation: standard deviation of a run's final validation loss, pooled, nats.
        degrees: of freedom: runs beyond the first of each group.
        groups: of runs that differ in their seeds alone.
    """

    deviation: float
    degrees: int
    groups: int

    @property
    def quantile(self) -> float:
        """Student's t, two-sided at 95 %: standard errors that a difference must have to count."""
        return float(special.stdtrit(self.degrees, 0.975))

    def least(self, n: int, m: int) -> float:
        """The least difference that counts between the means of n and m runs, nats."""
        return self.quantile * self.deviation * math.sqrt(1 / n + 1 / m)


def noise_of(losses: Iterable[Sequence[float]]) -> Noise | None:
    """The noise that repeated runs show; None if no model has two.

    Args:
        losses: final validation losses, a sequence for each model (and learning rate).
    """
    repeated = [tuple(runs) for runs in losses if len(runs) > 1]
    if not repeated:
        return None
    squares = math.fsum(statistics.variance(runs) * (len(runs) - 1) for runs in repeated)
    degrees = sum(len(runs) - 1 for runs in repeated)
    return Noise(math.sqrt(squares / degrees), degrees, len(repeated))


@dataclasses.dataclass(frozen=True)
class Judged:
    """A pair, measured.

    Attributes:
        claim: its number, from 1.
        pair: what is compared.
        ours: perplexities, of the lower and the higher.
        seeds: runs of each.
        paper: the paper's perplexities.
        noise: the least difference of logarithms that counts; None where nothing tells.
    """

    claim: int
    pair: Pair
    ours: tuple[float, float]
    seeds: tuple[int, int]
    paper: tuple[float, float]
    noise: float | None

    @property
    def difference(self) -> float:
        """Of the logarithms of our perplexities; negative where it is as claimed."""
        return math.log(self.ours[0] / self.ours[1])

    @property
    def papers_difference(self) -> float:
        """The same of the paper's."""
        return math.log(self.paper[0] / self.paper[1])

    @property
    def verdict(self) -> Verdict | None:
        """None where there is no measure of noise."""
        if self.noise is None:
            return None
        beyond = self.difference - math.log1p(self.pair.tolerance)
        if abs(beyond) <= self.noise:
            return "within noise"
        return "reproduced" if beyond < 0 else "contradicted"


def judge(claims: Sequence[Claim], samples: Samples, noise: Noise | None) -> tuple[Judged, ...]:
    """What the runs say of each pair of the claims whose models are there, in their order."""
    return tuple(
        Judged(
            claim=number,
            pair=pair,
            ours=(math.exp(lower.loss), math.exp(higher.loss)),
            seeds=(len(lower.losses), len(higher.losses)),
            paper=(lower.paper, higher.paper),
            noise=noise and noise.least(len(lower.losses), len(higher.losses)),
        )
        for number, claim in enumerate(claims, start=1)
        for relation in claim.relations
        for pair in relation.pairs(samples)
        for lower, higher in [(samples[pair.lower], samples[pair.higher])]
    )


def verdict_of(judged: Sequence[Judged]) -> Verdict | None:
    """Of a claim from its pairs: contradicted by any, reproduced by all, else within noise."""
    verdicts = {pair.verdict for pair in judged}
    if not verdicts or None in verdicts:
        return None
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if verdicts == {"reproduced"} else "within noise"


def plausible_rates(losses: Mapping[float, Sequence[float]], noise: Noise) -> tuple[float, ...]:
    """The learning rates that may be the best: those the noise does not tell from it, ascending.

    Args:
        losses: final validation losses by learning rate, one for each seed; none that diverged.
        noise: between seeds.
    """
    means = {rate: math.fsum(runs) / len(runs) for rate, runs in losses.items()}
    best = min(means, key=means.__getitem__)
    return tuple(
        rate
        for rate in sorted(means)
        if rate == best
        or means[rate] - means[best] <= noise.least(len(losses[rate]), len(losses[best]))
    )


def rate_verdict(higher: Sequence[float], lower: Sequence[float]) -> Verdict:
    """Of the claim that a model's best learning rate is above another's.

    Args:
        higher: the plausible rates of the model whose best is said to be higher.
        lower: those of the other.
    """
    if min(higher) > max(lower):
        return "reproduced"
    return "contradicted" if max(higher) <= min(lower) else "within noise"
