"""Decode attention on Hopper, in Pallas on Mosaic GPU.

Every worker reads a contiguous stretch of all rows' valid K/V blocks, whoever's they are: the
schedule comes from `lengths` alone, so XLA computes it once a step for all layers. One of its
warpgroups issues the loads (TMA), the other multiplies (wgmma) and keeps the running softmax. The
queries of a KV head fill rows of one 64-row tile: most of it is idle for few query heads, which
costs nothing where memory is the limit. What a worker finds in a row and KV head is a partial
result; a second, small kernel combines them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._combine import combine
from cla_kernels._schedule import Schedule, Tuning, schedule

TILE_ROWS = 64  # of queries: what wgmma multiplies at a time
_REGISTERS = 216  # for each thread that multiplies, of two workers; those that load keep 40
_MOST_STRETCHES = 8192  # rows x KV heads: each leaves a partial result in memory
_TUNED = {
    64: Tuning(block=128, stages=5),
    128: Tuning(block=128, stages=5, workers=1),
    256: Tuning(block=64, stages=4, workers=1),
}


def _transforms(
    dtype: jnp.dtype, columns: int
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    # Their base class declares methods that they get elsewhere.
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


# Jitted, so that a model's layers trace and lower it once.
@functools.partial(jax.jit, static_argnames=("queries", "heads", "scale", "tuning"))
def partial_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: Schedule,
    layer: int | jax.Array,
    *,
    queries: int,
    heads: int,
    scale: float,
    tuning: Tuning,
) -> tuple[jax.Array, jax.Array]:
    """Every unit's softmax over its stretch of every row and KV head that it reads.

    Stretch `i` of the order has index `row * K + head + unit`.

    Args:
        q: `[B, K, R, H]`, `R` a multiple of 8, at most 64: `queries` times as many heads, padded.
        k: `[G, B, S, K, H]`.
        v: like `k`.
        plan: of the rows' lengths.
        layer: of the `G`.
        queries: `T` of a row, the last of which sees `lengths` keys.
        heads: query heads of a KV head.
        scale: of the scores, positive.
        tuning: how the work is cut.

    Returns:
        float32: sums of values `[B * K + units, R, H]`, and their largest score (times log2 e) and
        sum of weights, `[B * K + units, 2, 64]`. Entries of no stretch are not written.
    """
    B, K, rows, H = q.shape
    G, _, S = k.shape[:3]
    block, stages, workers = tuning.block, tuning.stages, tuning.workers
    chunk = min(H, 32)
    scale2 = scale * math.log2(math.e)  # exp2 is the GPU's own
    dtype = k.dtype
    k, v = k.reshape(G * B, S, K, H), v.reshape(G * B, S, K, H)
    row_layout, tile = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, len_ref: Any, start_ref: Any, unit_ref: Any,
        each_ref: Any, layer_ref: Any, sums_ref: Any, statistics_ref: Any,
        q_s: Any, kv_s: Any, sums_s: Any, statistics_s: Any,
        q_full: Any, q_empty: Any, full: Any, empty: Any, *spare: Any,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        worker = lax.rem(wg, jnp.int32(workers))
        unit = lax.axis_index("p") * workers + worker
        q_s, kv_s, sums_s, statistics_s, q_full, q_empty = (
            ref.at[worker] for ref in (q_s, kv_s, sums_s, statistics_s, q_full, q_empty)
        )
        own = worker * stages
        if tuning.on_device:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        begin = unit * each_ref[0]
        end = jnp.minimum(begin + each_ref[0], start_ref[B])
        base = layer_ref[0] * B

        def walk(stretch: Callable[..., None]) -> None:
            """Calls `stretch` for each row and head of the unit."""

            def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                at, number, row, row_start, row_end, length = state
                blocks = lax.div(row_end - row_start, jnp.int32(K))
                head = lax.div(at - row_start, blocks)
                first = at - row_start - head * blocks
                count = jnp.minimum(blocks - first, end - at)
                stretch(row, head, length, first, count, at - begin, number)
                at = at + count
                following = jnp.where(at >= row_end, jnp.minimum(row + 1, B - 1), row)
                return (
                    at, number + 1, following,
                    start_ref[following], start_ref[following + 1], len_ref[following],
                )  # fmt: skip

            state = begin, jnp.int32(0), *(unit_ref[unit, i] for i in range(4))
            lax.while_loop(lambda state: state[0] < end, body, state)

        @pl.when(wg < workers)
        def _multiply() -> None:
            if workers > 1:
                plgpu.set_max_registers(_REGISTERS, action="increase")

            def stretch(row: Any, head: Any, length: Any, first: Any, count: Any, before: Any,
                        number: Any) -> None:  # fmt: skip
                plgpu.barrier_wait(q_full)
                m = plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), row_layout)
                total = plgpu.layout_cast(jnp.full((TILE_ROWS,), 0, jnp.float32), row_layout)
                acc = plgpu.layout_cast(jnp.full((TILE_ROWS, H), 0, jnp.float32), tile)

                def step(i: jax.Array, carry: tuple[Any, ...], *, whole: bool) -> tuple[Any, ...]:
                    acc, m, total = carry
                    slot_k = lax.rem(2 * (before + i), jnp.int32(stages))
                    slot_v = lax.rem(2 * (before + i) + 1, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[own + slot_k])

                    def scores(a: Any) -> jax.Array:
                        plgpu.wgmma(a, q_s, kv_s.at[slot_k].T)
                        return a[...]

                    x = scale2 * pl.run_scoped(
                        scores, plgpu.WGMMAAccumulatorRef((TILE_ROWS, block), jnp.float32)
                    )
                    plgpu.barrier_arrive(empty.at[own + slot_k])
                    behind = (first + i) * block
                    stored = jnp.minimum(length, S) - behind
                    if not whole:
                        ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=tile)
                        seen = ids < stored
                        if queries > 1:
                            # Query t of T sees T - 1 - t keys less than the last.
                            row_ids = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=tile)
                            query = lax.div(row_ids, jnp.int32(heads))
                            seen = seen & (ids <= query + (length - queries - behind))
                        x = jnp.where(seen, x, -jnp.inf)
                    m_new = jnp.maximum(m, x.max(axis=1))
                    if not whole:
                        m_new = jnp.maximum(m_new, -1e30)  # nothing may be visible
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(x - lax.broadcast_in_dim(m_new, x.shape, [0]))
                    total = total * alpha + p.sum(axis=1)
                    acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
                    p16 = p.astype(dtype)
                    plgpu.barrier_wait(full.at[own + slot_v])
                    if not whole:
                        # Rows behind the length may hold anything, and 0 * NaN is NaN.
                        ids = plgpu.broadcasted_iota(jnp.int32, (block, H), 0, layout=tile)
                        loaded = plgpu.load(kv_s.at[slot_v], layout=tile, optimized=False)
                        kv_s.at[slot_v][...] = jnp.where(ids < stored, loaded, jnp.zeros((), dtype))
                        plgpu.commit_smem()

                    def values(a: Any) -> None:
                        plgpu.wgmma(a, p16, kv_s.at[slot_v])

                    if tuning.on_device:
                        acc = pl.run_state(values)(plgpu.WGMMAAccumulatorRef.init(acc))
                    else:
                        p_s = spare[0].at[worker]
                        p_s[...] = p16
                        plgpu.commit_smem()

                        def added(a: Any) -> jax.Array:
                            plgpu.wgmma(a, p_s, kv_s.at[slot_v])
                            return a[...]

                        acc = acc + pl.run_scoped(
                            added, plgpu.WGMMAAccumulatorRef((TILE_ROWS, H), jnp.float32)
                        )
                    plgpu.barrier_arrive(empty.at[own + slot_v])
                    return acc, m_new, total

                # Blocks of which every query sees every key.
                all_see = jnp.minimum(length - (queries - 1), S)
                whole = jnp.clip(lax.div(all_see, jnp.int32(block)) - first, 0, count)
                carry = acc, m, total
                carry = lax.fori_loop(0, whole, functools.partial(step, whole=True), carry)
                carry = lax.fori_loop(whole, count, functools.partial(step, whole=False), carry)
                acc, m, total = carry
                plgpu.barrier_arrive(q_empty)
                index = row * K + head + unit
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                statistics_s[0] = m
                statistics_s[1] = total
                for c in range(H // chunk):
                    if c:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    sums_s[...] = acc[:, c * chunk : (c + 1) * chunk]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        sums_s.at[pl.ds(0, rows)], sums_ref.at[index, :, pl.ds(c * chunk, chunk)]
                    )
                plgpu.copy_smem_to_gmem(statistics_s, statistics_ref.at[index])

            walk(stretch)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg >= workers)
        def _load() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def stretch(row: Any, head: Any, length: Any, first: Any, count: Any, before: Any,
                        number: Any) -> None:  # fmt: skip
                pl.when(number > 0)(lambda: plgpu.barrier_wait(q_empty))
                plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_s.at[pl.ds(0, rows)], q_full)

                @pl.loop(0, count)
                def _(i: jax.Array) -> None:
                    for part, ref in enumerate((k_ref, v_ref)):
                        index = 2 * (before + i) + part
                        slot = lax.rem(index, jnp.int32(stages))
                        wait = functools.partial(plgpu.barrier_wait, empty.at[own + slot])
                        pl.when(index >= stages)(wait)
                        keys = pl.ds((first + i) * block, block)
                        plgpu.copy_gmem_to_smem(
                            ref.at[base + row, keys, head], kv_s.at[slot], full.at[own + slot]
                        )

            walk(stretch)
            # Nobody may leave with an arrival outstanding.
            tiles = 2 * jnp.maximum(end - begin, 0)

            @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
            def _(index: jax.Array) -> None:
                plgpu.barrier_wait(empty.at[own + lax.rem(index, jnp.int32(stages))])

            pl.when(tiles > 0)(lambda: plgpu.barrier_wait(q_empty))

    weights = plgpu.SMEM((workers, TILE_ROWS, block), dtype, transforms=_transforms(dtype, block))
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((B * K + tuning.units, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((B * K + tuning.units, 2, TILE_ROWS), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((workers, TILE_ROWS, H), q.dtype, transforms=_transforms(q.dtype, H)),
            plgpu.SMEM((workers, stages, block, H), dtype, transforms=_transforms(dtype, H)),
            plgpu.SMEM(
                (workers, TILE_ROWS, chunk), jnp.float32, transforms=_transforms(jnp.float32, chunk)
            ),
            plgpu.SMEM((workers, 2, TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=workers),
            plgpu.Barrier(num_barriers=workers),
            plgpu.Barrier(num_barriers=workers * stages),
            plgpu.Barrier(num_barriers=workers * stages),
            *(() if tuning.on_device else (weights,)),
        ],
        grid=(tuning.programs,),
        grid_names=("p",),
        num_threads=2 * workers,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, *plan, jnp.asarray(layer, jnp.int32).reshape(1))


def obstacle(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why this kernel cannot take these inputs on the default device; empty if it can."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"{device.platform} is no NVIDIA GPU"
    if (capability := float(device.compute_capability)) != 9.0:
        return f"it is for compute capability 9.0, this is {capability}"
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries and cache must share a 16-bit type, these are {q.dtype} and {k.dtype}"
    (B, T, N, H), (_, _, S, K, _) = q.shape, k.shape
    if S % 8:
        return f"a cache of {S} tokens is no multiple of 8"
    if H not in _TUNED:
        return f"head dim {H} is none of {', '.join(map(str, _TUNED))}"
    if T * (N // K) > TILE_ROWS:
        return f"{T} queries of {N // K} heads to a KV head are more than {TILE_ROWS} rows"
    if B * K > _MOST_STRETCHES:
        return f"{B} rows of {K} KV heads are more than {_MOST_STRETCHES} in all"
    return ""


def faster_than_cudnn(q: jax.Array | jax.ShapeDtypeStruct, kv_heads: int) -> bool:
    """Whether it was measured to be (docs/results.md): for short heads, and for few rows."""
    return q.shape[-1] == 64 or (q.shape[-1] == 128 and kv_heads == 1 and q.shape[0] <= 4)


def tuned(q: jax.Array | jax.ShapeDtypeStruct) -> Tuning:
    """The cut for these queries, by head dim (measured: docs/results.md)."""
    return _TUNED[q.shape[-1]]


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    lengths: jax.Array,
    layer: int | jax.Array,
    scale: float,
    tuning: Tuning | None = None,
) -> jax.Array:
    """See `cla_kernels.decode_attention`."""
    tuning = tuned(q) if tuning is None else tuning

    @jax.custom_batching.sequential_vmap
    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, layer: jax.Array
    ) -> jax.Array:
        (B, T, N, H), S, K = q.shape, k.shape[2], k.shape[3]
        heads = N // K
        rows = q.reshape(B, T, K, heads, H).swapaxes(1, 2).reshape(B, K, T * heads, H)
        padding = -(T * heads) % 8  # loads come in eights
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding), (0, 0)))
        plan = schedule(lengths, K, S, tuning)
        found = partial_attention(
            rows, k, v, plan, layer, queries=T, heads=heads, scale=scale, tuning=tuning
        )
        out = combine(*found, plan, K, q.dtype, tuning)[:, :, : T * heads]
        return out.reshape(B, K, T, heads, H).swapaxes(1, 2).reshape(B, T, N, H)

    return attend(q, k, v, lengths, jnp.asarray(layer, jnp.int32))
