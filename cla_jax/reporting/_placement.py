"""Where the names of points go in a plot, so that none covers another."""

import itertools
import math

import numpy as np


def place_labels(
    at: np.ndarray, sizes: np.ndarray, lines: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """Centres `[n, 2]` of labels, by iterated local search among up to 100 places for each.

    Args:
        at: `[n, 2]` the labelled points; all lengths are in points of 1/72 inch.
        sizes: `[n, 2]` widths and heights of the labels.
        lines: `[m, 2]` places that a label should not cover.
        bounds: `[2, 2]` lower left and upper right corner of the room.
    """
    n, half = len(at), sizes / 2
    every, count = np.arange(n), min(100, 3000 // n)
    options = [_options(i, at, half[i], lines, bounds, count) for i in range(n)]
    centres, alone = np.stack([o[0] for o in options]), np.stack([o[1] for o in options])
    pairs = np.zeros((n, count, n, count), np.float32)
    for i, j in itertools.permutations(range(n), 2):
        conflicts = _conflicts(at[i], half[i], centres[i], at[j], half[j], centres[j])
        pairs[i, :, j] += conflicts
        pairs[j, :, i] += conflicts.T
    near = np.argsort(np.linalg.norm(at[:, None] - at, axis=-1), axis=1)[:, :3]
    random = np.random.default_rng(0)
    best, least = alone.argmin(1), math.inf
    for trial in range(300):
        choice = best.copy()
        if trial:  # shake some neighbours loose
            shaken = near[random.integers(n)]
            choice[shaken] = random.integers(count, size=len(shaken))
        for _ in range(20):
            before = choice.copy()
            for i in random.permutation(n):
                choice[i] = np.argmin(alone[i] + pairs[i][:, every, choice].sum(1))
            if np.array_equal(before, choice):
                break
        total = alone[every, choice].sum() + pairs[every, choice][:, every, choice].sum() / 2
        if total < least:
            best, least = choice, total
    return centres[every, best]


def _options(
    i: int, at: np.ndarray, half: np.ndarray, lines: np.ndarray, bounds: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best places for label i by itself: centres `[count, 2]` and costs `[count]`."""
    beside = half[0] + np.array([5, 12, 22])
    x = np.concatenate([-beside, half[0] * np.array([-1, -0.5, 0, 0.5, 1]), beside])
    y = np.concatenate([[0, -8, 8], np.arange(-90, 91, 5)])
    centre = at[i] + np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    leader = np.clip(at[i], centre - half, centre + half) - at[i]
    length = np.hypot(*leader.T)
    low, high = bounds[0] + half, bounds[1] - half
    outside = np.maximum(np.maximum(low - centre, centre - high), 0).sum(1)
    markers = _inside(centre, at, half + 3.5).sum(1)
    covered = _inside(centre, lines, half + 1.5).sum(1)
    from_point = np.delete(at, i, 0) - at[i]
    share = np.clip(leader @ from_point.T / np.maximum(length, 1e-9)[:, None] ** 2, 0, 1)
    away = np.linalg.norm(share[..., None] * leader[:, None] - from_point, axis=-1)
    touched = ((away < 3.5) & (length > 0)[:, None]).sum(1)  # markers that the leader passes
    far = 1.2 * length + length**2 / 60 + np.abs(centre - at[i])[:, 0] / 40
    cost = 100 * outside + 200 * markers + 8 * covered + 150 * touched + far
    keep = np.argsort(cost, kind="stable")[:count]
    return centre[keep], cost[keep]


def _conflicts(
    at: np.ndarray, half: np.ndarray, centre: np.ndarray,
    other_at: np.ndarray, other_half: np.ndarray, other: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Costs `[c, d]` of places for one label beside places for another.

    Overlap and crossing leaders, halved, since the other way round counts them too; and this
    label's leader passing under the other label.
    """
    overlap = _inside(centre, other, half + other_half + 1)
    tip = np.clip(at, centre - half, centre + half)
    other_tip = np.clip(other_at, other - other_half, other + other_half)
    crossed = _cross(at, tip, other_at, other_tip)
    # Who passes under a box crosses one of its diagonals.
    rising, falling = other_half, other_half * (1, -1)
    under = _cross(at, tip, other - rising, other + rising)
    under |= _cross(at, tip, other - falling, other + falling)
    return 200 * overlap + 50 * crossed + 200 * under


def _inside(centre: np.ndarray, points: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Whether each of `[p, 2]` points lies within `half` of each of `[c, 2]` centres: `[c, p]`."""
    return (np.abs(centre[:, None] - points) < half).all(-1)


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Whether segments from `a` to each of `b [m, 2]` cross those from `c` to `d [p, 2]`."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        u, v = q - p, r - p
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    b = b[:, None]
    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
