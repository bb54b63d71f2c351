"""Causal attention of whole sequences on TPU: JAX's splash attention kernels, with our shapes.

No `T x T` scores exist, forward or backward. The kernels (`jax.experimental.pallas.ops.tpu`) take
one row at a time, lengths and head dims in multiples of 128 and scaled queries; they know KV heads
that several query heads read, causal masks and segments.

Axes: `B` batch, `T` length, `N` query heads, `K` KV heads, `H` head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cla_jax.models.sharding import on_shards

LANES = 128
_LARGEST_BLOCK = 512
_ROWS = ("batch", "length", "heads", "head_dim")


def padded(size: int) -> int:
    """The next multiple of a vector register's lanes."""
    return -(-size // LANES) * LANES


def splash_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention: query `t` sees keys `0..t`, of its own document where given.

    Query head `n` reads KV head `n // (N // K)`. Each device runs its own rows and heads: queries
    and K/V are split alike.

    Args:
        q: queries.
        k: keys.
        v: values.
        documents: document of each token.
        interpret: run the kernel's arithmetic anywhere, slowly; for tests.

    Returns:
        `[B, T, N, H]` in the dtype of `q`.
    """
    (_, T, _, H), dtype = q.shape, q.dtype
    more = ((0, 0), (0, padded(T) - T), (0, 0), (0, padded(H) - H))
    # Padded keys lie behind every query that counts.
    q = jnp.pad(q * jnp.asarray(H**-0.5, dtype), more)
    k, v = jnp.pad(k, more), jnp.pad(v, more)
    segments = None if documents is None else jnp.pad(documents, more[:2])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        # The kernels mix float32 statistics with 16-bit inputs on purpose.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return _rows(q, k, v, segments, interpret=interpret)

    axes = (_ROWS, _ROWS, _ROWS, None if segments is None else _ROWS[:2])
    out = on_shards(attend, axes, _ROWS)(q, k, v, segments)
    return out[:, :T, :, :H].astype(dtype)


def _rows(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, heads = q.shape[1], q.shape[2]
    block = next(b for b in (_LARGEST_BLOCK, 256, LANES) if T % b == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = () if segments is None else (splash.SegmentIds(segments, segments),)
    out: Any = jax.vmap(kernel)(q, k, v, *ids)
    return out.swapaxes(1, 2)
