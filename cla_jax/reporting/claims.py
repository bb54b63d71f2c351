"""What the CLA paper claims about its design space, as data: which models, in which relation.

Paper: Brandon et al. 2024 (arXiv 2405.12981), sections 3.2.1, 3.2.2, 3.3 and 4. A claim compares
validation perplexities, most of them at an equal KV cache; `judging` says what runs make of it.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "CLAIMS",
    "RATE_CLAIM",
    "TUNED_CLAIMS",
    "Below",
    "Chain",
    "Claim",
    "Frontier",
    "Pair",
    "RateClaim",
    "Sample",
    "Samples",
]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A model of ours and of the paper.

    Attributes:
        losses: final validation losses, one for each seed, nats per token.
        kv_bytes: per token, of ours.
        paper: the paper's perplexity.
    """

    losses: tuple[float, ...]
    kv_bytes: int
    paper: float

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.losses) / len(self.losses)


Samples = Mapping[str, Sample]
"""By the paper's names."""


class Pair(NamedTuple):
    """`lower` has a lower perplexity than `higher`, or one above it by `tolerance` at most.

    The tolerance is a fraction of perplexity.
    """

    lower: str
    higher: str
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Below:
    """The claim of one pair."""

    lower: str
    higher: str
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """For readers."""
        return f"{self.lower} against {self.higher}"

    def missing(self, samples: Samples) -> list[str]:
        """Models without which there is nothing to compare."""
        return [name for name in (self.lower, self.higher) if name not in samples]

    def pairs(self, samples: Samples) -> list[Pair]:
        """What is compared."""
        return [] if self.missing(samples) else [Pair(self.lower, self.higher, self.tolerance)]


# Section 3.2.1's family: MQA and CLA2, uniform, of any head size.
_MQA_CLA2 = tuple(f"H{size}-MQA-CLA2" for size in (512, 256, 128, 90, 64))


@dataclasses.dataclass(frozen=True)
class Frontier:
    """No model of another kind with at most the model's KV cache has a lower perplexity.

    Compared with the best of those that are there; `baseline`, which has the same cache without
    sharing, must be one of them.
    """

    model: str
    baseline: str
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """For readers."""
        return f"{self.model} against all with at most its cache"

    def missing(self, samples: Samples) -> list[str]:
        """Models without which there is nothing to compare."""
        return [name for name in (self.model, self.baseline) if name not in samples]

    def pairs(self, samples: Samples) -> list[Pair]:
        """What is compared."""
        if self.missing(samples):
            return []
        size = samples[self.model].kv_bytes
        rivals = [
            name
            for name, sample in samples.items()
            if name not in _MQA_CLA2 and (sample.kv_bytes <= size or name == self.baseline)
        ]
        best = min(rivals, key=lambda name: samples[name].loss)
        return [Pair(self.model, best, self.tolerance)]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Perplexities rise from model to model; neighbours among those that are there are compared."""

    models: tuple[str, ...]

    @property
    def name(self) -> str:
        """For readers."""
        return ", ".join(self.models)

    def missing(self, samples: Samples) -> list[str]:
        """Models that the chain passes over."""
        return [name for name in self.models if name not in samples]

    def pairs(self, samples: Samples) -> list[Pair]:
        """What is compared."""
        there = [name for name in self.models if name in samples]
        return [Pair(lower, higher) for lower, higher in itertools.pairwise(there)]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the paper.

    Attributes:
        section: of the paper.
        text: what it says.
        relations: what must hold.
    """

    section: str
    text: str
    relations: tuple[Below | Frontier | Chain, ...]


_POINT = 0.01 / 13  # "within 0.01 points" of perplexities between 13 and 14

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "3.2.1",
        "MQA with CLA2 has a lower perplexity than the model without CLA of the same KV cache",
        (
            Below("H64-MQA-CLA2", "H32-MQA"),
            Below("H90-MQA-CLA2", "H46-MQA"),
            Below("H128-MQA-CLA2", "H64-MQA"),
            Below("H256-MQA-CLA2", "H128-MQA"),
            Below("H512-MQA-CLA2", "H128-GQA2"),
        ),
    ),
    Claim(
        "4",
        "MQA with CLA2 is on the frontier: the lowest perplexity, within 0.01 points, of all "
        "models with at most its KV cache",
        (
            Frontier("H64-MQA-CLA2", "H32-MQA", _POINT),
            Frontier("H90-MQA-CLA2", "H46-MQA", _POINT),
            Frontier("H128-MQA-CLA2", "H64-MQA", _POINT),
            Frontier("H256-MQA-CLA2", "H128-MQA", _POINT),
            Frontier("H512-MQA-CLA2", "H128-GQA2", _POINT),
        ),
    ),
    Claim(
        "3.2.1, 4",
        "CLA2 with smaller heads has a lower perplexity than CLA3 and CLA4 at the same KV cache",
        (
            Below("H90-MQA-CLA2", "H128-MQA-CLA3"),
            Below("H64-MQA-CLA2", "H128-MQA-CLA4"),
        ),
    ),
    Claim(
        "3.2.1, 4",
        "CLA3 and CLA4 have a lower perplexity than plain MQA at the same KV cache",
        (Below("H128-MQA-CLA3", "H46-MQA"), Below("H128-MQA-CLA4", "H32-MQA")),
    ),
    Claim(
        "3.2.1",
        "Uniform CLA2 has a lower perplexity than KeepEnds, DenseFront and DenseBack, whose KV "
        "cache is a little larger",
        tuple(
            Below("H128-MQA-CLA2", f"H128-MQA-CLA2-{pattern}")
            for pattern in ("KeepEnds", "DenseFront", "DenseBack")
        ),
    ),
    Claim(
        "4",
        "CLA2 halves the KV cache of an MQA model for less than 1 % of perplexity",
        (
            Below("H128-MQA-CLA2", "H128-MQA", 0.01),
            Below("H64-MQA-CLA2", "H64-MQA", 0.01),
        ),
    ),
    Claim(
        "3.2.1",
        "Without CLA, perplexity rises as the KV cache shrinks",
        (
            Chain(("H128-MHA", "H128-GQA4", "H128-GQA2", "H128-MQA", "H64-MQA", "H46-MQA",
                   "H32-MQA")),
        ),
    ),
)  # fmt: skip
"""Of the design space, Table 1. Left out is GQA with CLA2, where text and table disagree."""

TUNED_CLAIMS: tuple[Claim, ...] = (
    Claim(
        "3.2.2, 3.3",
        "At the best learning rates, CLA2 has a lower perplexity than MQA of the same KV cache",
        (Below("H128-MQA-CLA2", "H64-MQA"),),
    ),
    Claim(
        "3.2.2, 3.3, 4",
        "At the best learning rates, CLA2 halves the KV cache of an MQA model for less than 1 % "
        "of perplexity",
        (Below("H128-MQA-CLA2", "H128-MQA", 0.01),),
    ),
)
"""Of Tables 3 and 5."""


class RateClaim(NamedTuple):
    """The best learning rate of one model is higher than another's.

    Attributes:
        section: of the paper.
        text: what it says.
        higher: the model with the higher rate.
        lower: the other.
    """

    section: str
    text: str
    higher: str
    lower: str


RATE_CLAIM = RateClaim(
    "3.2.2, 3.3",
    "CLA2 has a higher optimal learning rate than the MQA model that it is made from",
    "H128-MQA-CLA2",
    "H128-MQA",
)
