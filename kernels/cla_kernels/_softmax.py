"""Softmax attention over tiles of K and V: the arithmetic of a warpgroup that multiplies.

Roles are swapped: the scores of a tile are `K Q^T`, keys by queries, and sums of values `V^T P`, so
that a KV head's few query heads are the short side of the product, whose tiles come in eights.
8-bit K/V are widened on the way: K in registers, V through shared memory. The scale of a key goes
on its scores, that of a value on its weights. Wide heads that no 16 divides take the same way.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._shared import Merging, Problem, Shared
from cla_kernels._stretch import Stretch
from cla_kernels._tuning import TILE_KEYS

_TILE = plgpu.Layout.WGMMA
_BY_KEY, _BY_ROW = _TILE.reduce(1), _TILE.reduce(0)
_WIDENED = plgpu.Layout.WGMMA_UPCAST_2X  # 8-bit values in this are loaded four at a time


class Found(NamedTuple):
    """What is known of the keys so far: float32."""

    sums: jax.Array  # of values, [C, R]
    largest: jax.Array  # score times log2 e, [R]
    weight: jax.Array  # sum of weights, [R]


def attend(
    problem: Problem, shared: Shared, stretch: Stretch, q: Any, worker: int, wg: jax.Array
) -> Found:
    """The softmax of a stretch's queries over the tiles of it that are this worker's.

    Args:
        problem: of the kernel.
        shared: whose ring holds the tiles.
        stretch: of a row.
        q: reference to its queries, `[C, R]`.
        worker: which takes every `workers`-th tile, counted over all of the unit's.
        wg: the same, traced.
    """
    tuning, rows = problem.tuning, problem.rows
    first, count = stretch.first, stretch.blocks
    offset = lax.rem(stretch.before + worker, jnp.int32(tuning.workers))
    tile = functools.partial(_tile, problem, shared, stretch, q, wg, offset)
    # Blocks of which every query sees every key.
    all_see = jnp.minimum(stretch.length - (problem.queries - 1), problem.size)
    whole = jnp.clip(lax.div(all_see, jnp.int32(tuning.block)) - first, 0, count)
    carry = (
        _filled((problem.width, rows), 0.0, _TILE),
        _filled((rows,), -jnp.inf, _BY_ROW),
        _filled((TILE_KEYS, rows), 0.0, _TILE),
    )
    whole, mine = (
        lax.div(number - offset + (tuning.workers - 1), jnp.int32(tuning.workers))
        for number in (whole, count)
    )
    carry = lax.fori_loop(0, whole, functools.partial(tile, whole=True), carry)
    carry = lax.fori_loop(whole, mine, functools.partial(tile, whole=False), carry)
    sums, largest, weight = carry
    return Found(sums, largest, weight.sum(axis=0))


def give(merging: Merging, found: Found, number: jax.Array) -> None:
    """The second worker's share of a stretch, to the first."""
    pl.when(number > 0)(functools.partial(plgpu.barrier_wait, merging.free))
    for place, one in zip(merging[:3], found, strict=True):
        place[...] = one
    plgpu.barrier_arrive(merging.given)


def take(merging: Merging, found: Found) -> Found:
    """The first worker's share, with the second's."""
    plgpu.barrier_wait(merging.given)
    other = Found(
        *(
            plgpu.load(place, layout=layout)
            for place, layout in zip(merging[:3], (_TILE, _BY_ROW, _BY_ROW), strict=True)
        )
    )
    plgpu.barrier_arrive(merging.free)
    largest = jnp.maximum(found.largest, other.largest)
    factor, other_factor = jnp.exp2(found.largest - largest), jnp.exp2(other.largest - largest)
    sums = found.sums * _to_columns(factor, found.sums)
    sums = sums + other.sums * _to_columns(other_factor, sums)
    return Found(sums, largest, found.weight * factor + other.weight * other_factor)


def normalised(found: Found) -> jax.Array:
    """The result, `[C, R]`; zeros where nothing was seen."""
    inverse = jnp.where(found.weight > 0, 1.0 / found.weight, 0.0)
    return found.sums * _to_columns(inverse, found.sums)


def _tile(
    problem: Problem, shared: Shared, stretch: Stretch, q: Any, wg: jax.Array, offset: jax.Array,
    j: jax.Array, carry: tuple[jax.Array, ...], *, whole: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The next tile of this worker; `whole`: every query sees all of it."""
    acc, m, total = carry
    tuning = problem.tuning
    block, piece, stages = tuning.block, problem.piece, jnp.int32(tuning.stages)
    pieces = range(0, block, piece)
    weights = shared.weights.at[wg]
    i = offset + tuning.workers * j
    slot_k = lax.rem(2 * (stretch.before + i), stages)
    slot_v = lax.rem(2 * (stretch.before + i) + 1, stages)
    behind = (stretch.first + i) * block
    stored = jnp.minimum(stretch.length, problem.size) - behind

    plgpu.barrier_wait(shared.full.at[slot_k])
    scores = [_scores(problem, shared, slot_k, at, q, wg) for at in pieces]
    plgpu.barrier_arrive(shared.empty.at[slot_k])
    if not whole:
        scores = [
            _masked(problem, x, stretch.length - behind - at, stored - at)
            for at, x in zip(pieces, scores, strict=True)
        ]
    m_new = jnp.maximum(m, functools.reduce(jnp.maximum, scores).max(axis=0))
    if not whole:
        m_new = jnp.maximum(m_new, -1e30)  # nothing may be visible
    alpha = jnp.exp2(m - m_new)
    p = [jnp.exp2(x - _to_columns(m_new, x)) for x in scores]
    # Summed over a tile's keys at the end of the stretch.
    total = total * _to_columns(alpha, total)
    for x in p:
        for at in range(0, piece, TILE_KEYS):
            total = total + x[at : at + TILE_KEYS]
    acc = acc * _to_columns(alpha, acc)

    plgpu.barrier_wait(shared.full.at[slot_v])
    values = shared.kv.at[slot_v]
    for at, x in zip(pieces, p, strict=True):
        here = pl.ds(at, piece)
        if shared.scales is not None:
            scale = plgpu.load(shared.scales.at[slot_v, here], layout=_BY_KEY)
            if not whole:
                scale = _upto(stored - at, scale, _BY_KEY)
            x = x * lax.broadcast_in_dim(scale, x.shape, [0])
        weights.at[:, here].T[...] = x.astype(problem.dtype)
    # Rows behind the length may hold anything, and 0 * NaN is NaN.
    if problem.through_registers:
        for at in pieces:
            here = pl.ds(at, piece)
            copied, layout = _in_registers(problem, values.at[here])
            if not whole:
                copied = _upto(stored - at, copied, layout)
            shared.copied_v.at[wg, here][...] = copied
        values = shared.copied_v.at[wg]
    elif not whole:
        loaded = plgpu.load(values, layout=_TILE, optimized=False)
        values[...] = _upto(stored, loaded, _TILE)
    plgpu.commit_smem()
    if problem.through_registers:
        plgpu.barrier_arrive(shared.empty.at[slot_v])
    acc = _added(acc, values.T, weights.T, tuning.on_device)
    if not problem.through_registers:
        plgpu.barrier_arrive(shared.empty.at[slot_v])
    return acc, m_new, total


def _scores(
    problem: Problem, shared: Shared, slot: jax.Array, at: int, q: Any, wg: jax.Array
) -> jax.Array:
    """Of the keys of one piece of a tile, `[keys, R]`."""
    keys, rows = shared.kv.at[slot], problem.rows
    if not problem.through_registers:
        return problem.scale2 * _multiplied(keys, q, (problem.tuning.block, rows))
    here = pl.ds(at, problem.piece)
    copied, _ = _in_registers(problem, keys.at[here])
    if problem.tuning.on_device:
        keys = plgpu.layout_cast(copied, _TILE)
    else:  # the interpreter multiplies from memory alone
        keys = shared.copied_k.at[wg, here]
        keys[...] = copied
        plgpu.commit_smem()
    x = _multiplied(keys, q, (problem.piece, rows))
    if shared.scales is None:
        return problem.scale2 * x
    scale = plgpu.load(shared.scales.at[slot, here], layout=_BY_KEY)
    return x * lax.broadcast_in_dim(scale * problem.scale2, x.shape, [0])


def _masked(problem: Problem, x: jax.Array, length: Any, stored: Any) -> jax.Array:
    """Scores that are seen, of rows of so many tokens from here."""
    ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_TILE)
    seen = ids < stored
    if problem.queries > 1:
        # Query t of T sees T - 1 - t keys less than the last.
        row_ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=_TILE)
        query = lax.div(row_ids, jnp.int32(problem.heads))
        seen = seen & (ids <= query + (length - problem.queries))
    return jnp.where(seen, x, -jnp.inf)


def _upto(stored: Any, x: jax.Array, layout: Any) -> jax.Array:
    """The first so many keys of `x`; zeros behind."""
    ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
    return jnp.where(ids < stored, x, jnp.zeros((), x.dtype))


def _in_registers(problem: Problem, ref: Any) -> tuple[jax.Array, Any]:
    """Values of shared memory in the type in which they are multiplied, and their layout."""
    if problem.kv_dtype == problem.dtype:
        return plgpu.load(ref, layout=_TILE, optimized=False), _TILE
    values = plgpu.load(ref, layout=_WIDENED)
    if values.dtype == jnp.float8_e4m3fn:
        values = values.astype(jnp.float16).astype(jnp.float32)
    return values.astype(problem.dtype), _WIDENED


def _multiplied(a: Any, b: Any, out: tuple[int, int]) -> jax.Array:
    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(out, jnp.float32))


def _added(acc: jax.Array, a: Any, b: Any, on_device: bool) -> jax.Array:
    if not on_device:  # the interpreter has no initial accumulators
        return acc + _multiplied(a, b, (acc.shape[0], acc.shape[1]))
    multiply = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))
    return cast(jax.Array, multiply(plgpu.WGMMAAccumulatorRef.init(acc)))


def _to_columns(x: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each query, to all of its column."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
