"""Ranks, ours beside the papers'."""

from collections.abc import Mapping, Sequence


def ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Of each value among all, from 1, the lowest first; equal values have one rank."""
    return {
        name: 1 + sum(other < value for other in values.values()) for name, value in values.items()
    }


def spearman(pairs: Sequence[tuple[int, int]]) -> float:
    """Correlation of two rankings of the same things; without ties, as the papers' are."""
    n = len(pairs)
    return 1 - 6 * sum((one - two) ** 2 for one, two in pairs) / (n * (n * n - 1))
