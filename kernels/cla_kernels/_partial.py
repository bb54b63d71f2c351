"""The first kernel: every unit's softmax attention over its stretch of a KV head's K/V.

Roles are swapped: the scores of a tile are `K Q^T`, keys by queries, and sums of values `V^T P`, so
that a KV head's few query heads are the short side of the product, whose tiles come in eights. One
warpgroup issues the loads (TMA) into a ring of tiles; the other multiplies (wgmma) and keeps the
running softmax. A stretch's queries are loaded while the one before is worked on.

8-bit K/V are widened on the way: K in registers, V through shared memory. The scale of a key goes
on its scores, that of a value on its weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._schedule import Schedule, stored_blocks
from cla_kernels._tuning import (
    REDUCTION_BYTES,
    TILE_KEYS,
    Tuning,
    tile_columns,
    tile_rows,
)

_TILE = plgpu.Layout.WGMMA
_WIDENED = plgpu.Layout.WGMMA_UPCAST_2X  # 8-bit values in this are loaded four at a time


class Cached(NamedTuple):
    """Stacked K/V: `[G, B, S, K, H]`, and of 8-bit ones their scales, float32 `[G, B, K, S]`."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


def _transforms(
    dtype: jnp.dtype, swizzle: int
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    # Their base class declares methods that they get elsewhere.
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def _widened(ref: Any, dtype: jnp.dtype) -> jax.Array:
    """8-bit values of shared memory, in the type in which they are multiplied."""
    values = plgpu.load(ref, layout=_WIDENED)
    if values.dtype == jnp.float8_e4m3fn:
        values = values.astype(jnp.float16).astype(jnp.float32)
    return values.astype(dtype)


# Jitted, so that a model's layers trace and lower it once.
@functools.partial(
    jax.jit,
    static_argnames=("queries", "heads", "scale", "written", "spare", "result_dtype", "tuning"),
)
def partial_attention(
    q: jax.Array,
    cached: Cached,
    plan: Schedule,
    layer: int | jax.Array,
    *,
    queries: int,
    heads: int,
    scale: float,
    written: int,
    spare: int,
    result_dtype: jnp.dtype,
    tuning: Tuning,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every unit's softmax over its stretch of every row that it reads.

    Unit `p * K + head` is part `p` of a KV head. A row that it reads whole is done. Of others it
    leaves at most two partial results: `2 * unit` of the first row that it reads, and
    `2 * unit + 1` of another, which goes on behind it.

    Args:
        q: `[B, K, queries * heads, H]`, at most 64 rows to a KV head, in the type in which tiles
            are multiplied.
        cached: `k`, `v` `[G, B, S, K, H]`, and scales `[G, B, K, S]` where they are of 8 bits.
        plan: of the rows' lengths, `P` parts.
        layer: of the `G`.
        queries: `T` of a row, the last of which sees `lengths` keys.
        heads: query heads of a KV head.
        scale: of the scores, positive.
        written: rows of a result: those of `q`, or whole tiles of them.
        spare: parts for which there is room behind the `P`.
        result_dtype: of a result.
        tuning: how the work is cut.

    Returns:
        Results `[B * K, written, C]` of what is done alone, `C` the head dim in whole tiles; and
        float32: sums of values `[2 * P * K, R, C]`, `R` the rows in whole tiles, and their largest
        score (times log2 e) and sum of weights, `[2 * P * K, 2, R]`. What nobody has found is not
        written. `spare` parts lie behind them, never written.
    """
    B, K, given, H = q.shape
    rows = tile_rows(given)
    G, _, S = cached.k.shape[:3]
    parts = plan.parts.shape[0]
    units, found = parts * K, 2 * (parts + spare) * K
    block, stages, workers = tuning.block, tuning.stages, tuning.workers
    width = tile_columns(H)
    scale2 = scale * math.log2(math.e)  # exp2 is the GPU's own
    kv_dtype, dtype = cached.k.dtype, q.dtype
    eight_bit = cached.k_scale is not None
    tiles_spare = 1 if tuning.on_device else 2  # of 8 bits: for V, and K where it is not multiplied
    k, v = (a.reshape(G * B, S, K, H) for a in (cached.k, cached.v))
    scales = [a.reshape(G * B, K, S) for a in (cached.k_scale, cached.v_scale) if a is not None]
    tile, by_key, by_row = _TILE, _TILE.reduce(1), _TILE.reduce(0)
    # What is widened lies in registers, which a whole tile would exceed.
    piece = TILE_KEYS if eight_bit else block
    pieces = range(0, block, piece)

    def kernel(*refs: Any) -> None:
        (q_ref, k_ref, v_ref), refs = refs[:3], refs[3:]
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        # The joins are not read here: the second kernel reads them before it waits for this one.
        len_ref, start_ref, part_ref, each_ref, _, layer_ref = refs[:6]
        out_ref, sums_ref, statistics_ref = refs[6:9]
        q_full, q_empty, full, empty, q_s, kv_s, p_s, merging, *spare = refs[9:]
        scale_s: Any = spare[tiles_spare] if eight_bit else None
        unit, wg = lax.axis_index("unit"), lax.axis_index("wg")
        if tuning.on_device:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        # What lies behind an array's end is loaded as zeros; only traced slices may reach there.
        start = lax.rem(wg, jnp.int32(1))
        columns, all_rows = pl.ds(start, width), pl.ds(start, rows)
        part, head = lax.div(unit, jnp.int32(K)), lax.rem(unit, jnp.int32(K))
        begin = part * each_ref[0]
        end = jnp.minimum(begin + each_ref[0], start_ref[B])
        base = layer_ref[0] * B

        def walk(stretch: Callable[..., None]) -> tuple[jax.Array, jax.Array]:
            """Calls `stretch` for each row of the unit; how many they were, and blocks."""

            def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                at, number, before, row, row_start, row_end, length = state
                # Of the row that follows: loaded now, to have arrived by then.
                following = jnp.minimum(row + 1, B - 1)
                next_end, next_length = start_ref[following + 1], len_ref[following]
                blocks = stored_blocks(length, S, block)
                first = at - row_start
                count = jnp.minimum(blocks - first, end - at)
                alone = count == blocks
                stretch(row, length, first, count, alone, before, number)
                row = following, row_end, next_end, next_length
                return row_end, number + 1, before + count, *row

            state = begin, jnp.int32(0), jnp.int32(0), *(part_ref[part, i] for i in range(4))
            _, stretches, blocks, *_ = lax.while_loop(lambda state: state[0] < end, body, state)
            return stretches, blocks

        def multiplied(a: Any, b: Any, out: tuple[int, ...]) -> jax.Array:
            def multiply(accumulator: Any) -> jax.Array:
                plgpu.wgmma(accumulator, a, b)
                return accumulator[...]

            accumulator = plgpu.WGMMAAccumulatorRef((out[0], out[1]), jnp.float32)
            return pl.run_scoped(multiply, accumulator)

        def added(acc: jax.Array, a: Any, b: Any) -> jax.Array:
            if not tuning.on_device:  # the interpreter has no initial accumulators
                return acc + multiplied(a, b, acc.shape)
            multiply = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))
            return cast(jax.Array, multiply(plgpu.WGMMAAccumulatorRef.init(acc)))

        def give(found: tuple[jax.Array, ...], number: jax.Array) -> None:
            """The second worker's share of a stretch, to the first."""
            *places, given, free = merging
            pl.when(number > 0)(functools.partial(plgpu.barrier_wait, free))
            for place, one in zip(places, found, strict=True):
                place[...] = one
            plgpu.barrier_arrive(given)

        def taken(acc: jax.Array, m: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
            """The first worker's share, with the second's."""
            *places, given, free = merging
            plgpu.barrier_wait(given)
            acc_1, m_1, weight_1 = (
                plgpu.load(place, layout=layout)
                for place, layout in zip(places, (tile, by_row, by_row), strict=True)
            )
            plgpu.barrier_arrive(free)
            largest = jnp.maximum(m, m_1)
            factor, factor_1 = jnp.exp2(m - largest), jnp.exp2(m_1 - largest)
            acc = acc * lax.broadcast_in_dim(factor, acc.shape, [1])
            acc = acc + acc_1 * lax.broadcast_in_dim(factor_1, acc.shape, [1])
            return acc, largest, weight * factor + weight_1 * factor_1

        def multiply(worker: int) -> None:
            def stretch(row: Any, length: Any, first: Any, count: Any, alone: Any, before: Any,
                        number: Any) -> None:  # fmt: skip
                slot_q = lax.rem(number, jnp.int32(2))
                plgpu.barrier_wait(q_full.at[slot_q])
                q_t = q_s.at[slot_q].T
                weights = p_s.at[wg]
                offset = lax.rem(before + worker, jnp.int32(workers))

                def step(j: jax.Array, carry: tuple[Any, ...], *, whole: bool) -> tuple[Any, ...]:
                    acc, m, total = carry
                    i = offset + workers * j
                    slot_k = lax.rem(2 * (before + i), jnp.int32(stages))
                    slot_v = lax.rem(2 * (before + i) + 1, jnp.int32(stages))
                    behind = (first + i) * block
                    stored = jnp.minimum(length, S) - behind
                    plgpu.barrier_wait(full.at[slot_k])
                    scores = [scores_of(slot_k, at) for at in pieces]
                    plgpu.barrier_arrive(empty.at[slot_k])
                    if not whole:
                        scores = [
                            masked(x, length - behind - at, stored - at)
                            for at, x in zip(pieces, scores, strict=True)
                        ]
                    m_new = jnp.maximum(m, functools.reduce(jnp.maximum, scores).max(axis=0))
                    if not whole:
                        m_new = jnp.maximum(m_new, -1e30)  # nothing may be visible
                    alpha = jnp.exp2(m - m_new)
                    p = [jnp.exp2(x - lax.broadcast_in_dim(m_new, x.shape, [1])) for x in scores]
                    # Summed over a tile's keys at the end of the stretch.
                    total = total * lax.broadcast_in_dim(alpha, total.shape, [1])
                    for x in p:
                        for part in range(0, piece, TILE_KEYS):
                            total = total + x[part : part + TILE_KEYS]
                    acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [1])
                    plgpu.barrier_wait(full.at[slot_v])
                    values = kv_s.at[slot_v]
                    for at, x in zip(pieces, p, strict=True):
                        here = pl.ds(at, piece)
                        if eight_bit:
                            each = plgpu.load(scale_s.at[slot_v, here], layout=by_key)
                            if not whole:
                                each = upto(stored - at, each, by_key)
                            x = x * lax.broadcast_in_dim(each, x.shape, [0])
                        weights.at[:, here].T[...] = x.astype(dtype)
                    # Rows behind the length may hold anything, and 0 * NaN is NaN.
                    if eight_bit:
                        for at in pieces:
                            here = pl.ds(at, piece)
                            wide = _widened(values.at[here], dtype)
                            if not whole:
                                wide = upto(stored - at, wide, _WIDENED)
                            spare[0].at[wg, here][...] = wide
                        values = spare[0].at[wg]
                    elif not whole:
                        loaded = plgpu.load(values, layout=tile, optimized=False)
                        values[...] = upto(stored, loaded, tile)
                    plgpu.commit_smem()
                    if eight_bit:
                        plgpu.barrier_arrive(empty.at[slot_v])
                    acc = added(acc, values.T, weights.T)
                    if not eight_bit:
                        plgpu.barrier_arrive(empty.at[slot_v])
                    return acc, m_new, total

                def scores_of(slot: Any, at: int) -> jax.Array:
                    """Of the keys of one piece of a tile, `[keys, rows]`."""
                    keys = kv_s.at[slot]
                    if not eight_bit:
                        return scale2 * multiplied(keys, q_t, (block, rows))
                    here = pl.ds(at, piece)
                    wide = _widened(keys.at[here], dtype)
                    if tuning.on_device:
                        keys = plgpu.layout_cast(wide, tile)
                    else:  # the interpreter multiplies from memory alone
                        keys = spare[1].at[wg, here]
                        keys[...] = wide
                        plgpu.commit_smem()
                    x = multiplied(keys, q_t, (piece, rows))
                    each = plgpu.load(scale_s.at[slot, here], layout=by_key)
                    return x * lax.broadcast_in_dim(each * scale2, x.shape, [0])

                def masked(x: jax.Array, length: Any, stored: Any) -> jax.Array:
                    """Scores that are seen, of rows of so many tokens from here."""
                    ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=tile)
                    seen = ids < stored
                    if queries > 1:
                        # Query t of T sees T - 1 - t keys less than the last.
                        row_ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=tile)
                        query = lax.div(row_ids, jnp.int32(heads))
                        seen = seen & (ids <= query + (length - queries))
                    return jnp.where(seen, x, -jnp.inf)

                def upto(stored: Any, x: jax.Array, layout: Any) -> jax.Array:
                    """The first so many keys of `x`; zeros behind."""
                    ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
                    return jnp.where(ids < stored, x, jnp.zeros((), x.dtype))

                def filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
                    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

                # Blocks of which every query sees every key.
                all_see = jnp.minimum(length - (queries - 1), S)
                whole = jnp.clip(lax.div(all_see, jnp.int32(block)) - first, 0, count)
                carry = (
                    filled((width, rows), 0.0, tile),
                    filled((rows,), -jnp.inf, by_row),
                    filled((TILE_KEYS, rows), 0.0, tile),
                )
                whole, mine = (
                    lax.div(number - offset + (workers - 1), jnp.int32(workers))
                    for number in (whole, count)
                )
                carry = lax.fori_loop(0, whole, functools.partial(step, whole=True), carry)
                carry = lax.fori_loop(whole, mine, functools.partial(step, whole=False), carry)
                acc, m, total = carry
                weight = total.sum(axis=0)
                if worker > 0:
                    give((acc, m, weight), number)
                    plgpu.barrier_arrive(q_empty.at[slot_q])
                    return
                if workers > 1:
                    acc, m, weight = taken(acc, m, weight)

                @pl.when(alone)
                def _finish() -> None:
                    # The queries' place takes what they found, if it is of their type.
                    place = q_s.at[slot_q] if result_dtype == dtype else spare[-1]
                    inverse = jnp.where(weight > 0, 1.0 / weight, 0.0)
                    done = acc * lax.broadcast_in_dim(inverse, acc.shape, [1])
                    place.T[...] = done.astype(result_dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(place, out_ref.at[row * K + head, all_rows, columns])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                plgpu.barrier_arrive(q_empty.at[slot_q])

                @pl.when(jnp.logical_not(alone))
                def _leave() -> None:
                    index = 2 * unit + (number > 0).astype(jnp.int32)
                    statistics_ref.at[index, 0][...] = m
                    statistics_ref.at[index, 1][...] = weight
                    sums_ref.at[index].T[...] = plgpu.layout_cast(
                        acc, plgpu.Layout.WGMMA_TRANSPOSED
                    )

            stretches, _ = walk(stretch)
            if worker > 0:  # nobody may leave with an arrival outstanding
                pl.when(stretches > 0)(functools.partial(plgpu.barrier_wait, merging[-1]))

        def load() -> None:
            def stretch(row: Any, length: Any, first: Any, count: Any, alone: Any, before: Any,
                        number: Any) -> None:  # fmt: skip
                slot_q = lax.rem(number, jnp.int32(2))
                wait = functools.partial(plgpu.barrier_wait, q_empty.at[slot_q])
                pl.when(number >= 2)(wait)
                plgpu.copy_gmem_to_smem(
                    q_ref.at[row, head, all_rows, columns], q_s.at[slot_q], q_full.at[slot_q]
                )

                @pl.loop(0, count)
                def _(i: jax.Array) -> None:
                    for part, ref in enumerate((k_ref, v_ref)):
                        index = 2 * (before + i) + part
                        slot = lax.rem(index, jnp.int32(stages))
                        wait = functools.partial(plgpu.barrier_wait, empty.at[slot])
                        pl.when(index >= stages)(wait)
                        keys, at = pl.ds((first + i) * block, block), full.at[slot]
                        plgpu.copy_gmem_to_smem(
                            ref.at[base + row, keys, head, columns], kv_s.at[slot], at
                        )
                        if eight_bit:
                            plgpu.copy_gmem_to_smem(
                                scale_refs[part].at[base + row, head, keys], scale_s.at[slot], at
                            )

            stretches, blocks = walk(stretch)
            # Nor here.
            tiles = 2 * blocks

            @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
            def _(index: jax.Array) -> None:
                plgpu.barrier_wait(empty.at[lax.rem(index, jnp.int32(stages))])

            @pl.loop(jnp.maximum(stretches - 2, 0), stretches)
            def _(index: jax.Array) -> None:
                plgpu.barrier_wait(q_empty.at[lax.rem(index, jnp.int32(2))])

        def others(*_: Any) -> None:
            for worker in range(1, workers):
                pl.when(wg == worker)(functools.partial(multiply, worker))
            pl.when(wg == workers)(load)

        if workers == 1:
            others()
        else:
            # Scratch of reductions lies behind all that is allocated where they are traced: what
            # is allocated here, and not used, gives each worker its own.
            unused = plgpu.SMEM((REDUCTION_BYTES // 4,), jnp.float32)
            pl.run_scoped(others, unused, collective_axes="wg")
        pl.when(wg == 0)(functools.partial(multiply, 0))

    # Operands of one product must be swizzled alike.
    swizzle = plgpu.find_swizzle(H * jnp.dtype(dtype).itemsize * 8) if H > 64 else 128
    swizzle8 = plgpu.find_swizzle(H * 8) if H > 128 else min(width, 128)

    def shared(*shape: int, dtype: Any = dtype, swizzle: int = swizzle) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=_transforms(dtype, swizzle))

    merging = []
    if workers > 1:
        merging = [
            plgpu.SMEM((width, rows), jnp.float32),
            *(plgpu.SMEM((rows,), jnp.float32) for _ in range(2)),
            *(plgpu.Barrier() for _ in range(2)),
        ]
    scratch = [
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2, num_arrivals=workers),
        plgpu.Barrier(num_barriers=stages, num_arrivals=2 if eight_bit else 1),
        plgpu.Barrier(num_barriers=stages),
        shared(2, rows, width),
        shared(stages, block, width, dtype=kv_dtype, swizzle=swizzle8 if eight_bit else swizzle),
        shared(workers, rows, block),
        merging,
    ]
    if eight_bit:
        scratch += [shared(workers, block, width)] * tiles_spare
        scratch += [plgpu.SMEM((stages, block), jnp.float32)]
    if result_dtype != dtype:
        scratch += [shared(rows, width, dtype=result_dtype)]
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((B * K, written, width), result_dtype),
            jax.ShapeDtypeStruct((found, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((found, 2, rows), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(units,),
        grid_names=("unit",),
        num_threads=workers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, *scales, *plan, jnp.asarray(layer, jnp.int32).reshape(1))
