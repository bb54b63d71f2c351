"""Decode attention on Hopper, in Pallas on Mosaic GPU: two kernels and a schedule.

Every unit, a program on each multiprocessor, reads a contiguous stretch of all rows' valid blocks
of a KV head, whoever's they are: the schedule comes from `lengths` alone, so XLA computes it once a
step for all layers, and rows of any lengths keep the device busy. A row that a unit reads whole is
done; what it finds of others is a partial result (`_partial`). A second, small kernel combines
these (`_combine`), launched while the first still runs.
"""

import jax
import jax.numpy as jnp

from cla_kernels._combine import combine, cut_rows
from cla_kernels._partial import partial_attention
from cla_kernels._schedule import schedule
from cla_kernels._shared import Cached
from cla_kernels._target import gpu_obstacle, target_device
from cla_kernels._tuning import (
    MOST_COLUMNS,
    MOST_ROWS,
    TILE_KEYS,
    Tuning,
    through_registers,
    tile_columns,
    tile_rows,
    tuned,
)

_TINY_BYTES = 2**20  # of a layer's K and V


def obstacle(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why this kernel cannot take these inputs on the target device; empty if it can."""
    device = target_device()
    if no_gpu := gpu_obstacle(device):
        return no_gpu
    if (capability := float(device.compute_capability)) != 9.0:
        return f"it is for compute capability 9.0, this is {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are of {q.dtype}, not of 16 bits"
    eight_bit = k.dtype in (jnp.int8, jnp.float8_e4m3fn)
    if q.dtype != k.dtype and not eight_bit:
        return f"a cache of {k.dtype} under queries of {q.dtype}"
    (_, _, N, H), (_, _, S, K, _) = q.shape, k.shape
    if S % 8:
        return f"a cache of {S} tokens is no multiple of 8"
    if not 32 <= H <= MOST_COLUMNS:
        return f"head dim {H} is not from 32 to {MOST_COLUMNS}"
    step = 16 if eight_bit else 8
    if H % step:
        return f"head dim {H} is no multiple of {step}"
    if N // K > MOST_ROWS:
        return f"{N // K} query heads to a KV head are more than {MOST_ROWS}"
    return ""


def slower(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why others, where they can, take less time than this kernel, which can; empty if they do not.

    Measured: docs/results.md.
    """
    H = q.shape[-1]
    if q.dtype != k.dtype or H <= TILE_KEYS:
        return ""
    if H % 16:
        return f"head dim {H} is loaded in pieces of 16 bytes"
    if H < 128 and H % 32 and q.shape[1] == 1:
        return f"head dim {H} is loaded in pieces of 32 bytes"
    return ""


def tiny(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why XLA's two products take less time than this kernel, which can; empty if they do not.

    Launching and joining is most of so small a call. Of several KV heads XLA's products read more
    than they need (`_xla`). Measured: docs/results.md.
    """
    _, B, S, K, H = k.shape
    if q.dtype != k.dtype or K > 1 or 2 * B * S * H * k.dtype.itemsize > _TINY_BYTES:
        return ""
    return f"{B} rows of {S} tokens of one KV head are at most 1 MiB"


def workspace_bytes(query_heads: int, kv_heads: int, head_dim: int) -> int:
    """What a call of one query a row holds beside inputs and result, whatever the batch.

    Of `T` queries a row at most `T` times that.
    """
    tuning, heads, columns = Tuning(), query_heads // kv_heads, tile_columns(head_dim)
    spare = cut_rows(1, kv_heads, heads, columns, tuning).spare
    stretches = 2 * (tuning.parts(kv_heads) + spare) * kv_heads
    return stretches * tile_rows(heads) * (columns + 2) * 4


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

    @jax.custom_batching.sequential_vmap
    def attend(q: jax.Array, cached: Cached, lengths: jax.Array, layer: jax.Array) -> jax.Array:
        T = q.shape[1]
        at_once = max(MOST_ROWS * cached.k.shape[3] // q.shape[2], 1)
        parts = [
            _attend(
                q[:, t : t + at_once],
                cached,
                lengths - max(T - t - at_once, 0),
                layer,
                scale,
                tuning,
            )
            for t in range(0, T, at_once)
        ]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    return attend(q, Cached(k, v, k_scale, v_scale), lengths, jnp.asarray(layer, jnp.int32))


def _attend(
    q: jax.Array,
    cached: Cached,
    lengths: jax.Array,
    layer: jax.Array,
    scale: float,
    tuning: Tuning | None,
) -> jax.Array:
    """Of so many queries that a KV head's fit in one tile."""
    (B, T, N, H), (S, K) = q.shape, cached.k.shape[2:4]
    heads = N // K
    rows = q.reshape(B, T, K, heads, H).swapaxes(1, 2).reshape(B, K, T * heads, H)
    if (padding := -rows.shape[2] % 8) and rows.shape[2] > 8:  # fewer are padded as they are loaded
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, padding), (0, 0)))
    if cached.k_scale is not None:
        rows = rows.astype(jnp.bfloat16)  # as float16, weights times scales would underflow
    elif through_registers(H, cached.k.dtype):  # K is padded as it is loaded
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, tile_columns(H) - H)))
    apart = rows.dtype != q.dtype
    tuning = tuned(T * heads, H, cached.k.dtype, B * K, S, tuning, result_apart=apart)
    plan = schedule(lengths, tuning.parts(K), S, tuning)
    cut = cut_rows(B, K, T * heads, tile_columns(H), tuning)
    found = partial_attention(
        rows, cached, plan, layer, queries=T, heads=heads, scale=scale, written=cut.rows,
        spare=cut.spare, result_dtype=q.dtype, tuning=tuning,
    )  # fmt: skip
    out = found[0] if tuning.whole else combine(*found, plan, cut=cut, tuning=tuning)
    out = out[:, : T * heads, :H]
    return out.reshape(B, K, T, heads, H).swapaxes(1, 2).reshape(B, T, N, H)
