"""Two matrix products over the cache as it lies, for every backend.

A product batched over KV heads makes XLA rewrite the cache with the heads outermost, which costs
more than the product. So the queries are spread out instead: each is laid into its own KV head's
columns of an otherwise empty `K * H`, and one product a row, with no axis of heads, meets the whole
cache. That is `K` times the arithmetic, where decoding has arithmetic to spare. (Measured with the
cache batched instead: docs/results.md.)
"""

import jax
import jax.numpy as jnp


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    layer: int | jax.Array,
    scale: float,
) -> jax.Array:
    """See `cla_kernels.decode_attention`."""
    (B, T, N, H), S, K = q.shape, k.shape[2], k.shape[3]
    k = jax.lax.dynamic_index_in_dim(k, layer, 0, keepdims=False).reshape(B, S, K * H)
    v = jax.lax.dynamic_index_in_dim(v, layer, 0, keepdims=False).reshape(B, S, K * H)
    with jax.numpy_dtype_promotion("standard"):  # a narrower cache is read in the queries' dtype
        compute = jnp.promote_types(q.dtype, k.dtype)
    k, v = k.astype(compute), v.astype(compute)

    own_head = jnp.eye(K, dtype=bool)[None, None, :, None, :, None]  # [1, 1, K, 1, K, 1]
    spread = jnp.where(own_head, q.reshape(B, T, K, N // K, 1, H), jnp.zeros((), q.dtype))
    spread = spread.reshape(B, T * N, K * H).astype(compute)
    scores = scale * jnp.einsum("BMX,BSX->BMS", spread, k, preferred_element_type=jnp.float32)
    positions = lengths.astype(jnp.int32)[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    visible = jnp.arange(S, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]
    scores = jnp.where(visible[:, :, None, :], scores.reshape(B, T, N, S), -jnp.inf)
    # A row that sees nothing: its maximum is -inf, and -inf less -inf is no number.
    largest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1)
    weights = weights.astype(compute).reshape(B, T * N, S)
    out = jnp.einsum("BMS,BSX->BMX", weights, v, preferred_element_type=jnp.float32)
    out = jnp.where(own_head, out.reshape(B, T, K, N // K, K, H), 0.0).sum(4).reshape(B, T, N, H)
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype)
