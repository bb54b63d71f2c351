"""Two matrix products over the cache as it lies, for every backend.

A product batched over KV heads makes XLA rewrite the cache with the heads outermost, which costs
more than the product. So the queries are spread out instead: each is laid into its own KV head's
columns of an otherwise empty `K * H`, and one product a row, with no axis of heads, meets the whole
cache. That is `K` times the arithmetic, where decoding has arithmetic to spare. (Measured with the
cache batched instead: docs/results.md.)

An 8-bit cache meets the products as it is, in the queries' dtype: all its values are exact in 16
bits. The scales are put on the scores and the softmax weights, which are float32 and have no `H`.
"""

import jax
import jax.numpy as jnp


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    lengths: jax.Array,
    layer: int | jax.Array,
    scale: float,
) -> jax.Array:
    """See `cla_kernels.decode_attention`."""
    (B, T, N, H), S, K = q.shape, k.shape[2], k.shape[3]
    k = jax.lax.dynamic_index_in_dim(k, layer, 0, keepdims=False).reshape(B, S, K * H)
    v = jax.lax.dynamic_index_in_dim(v, layer, 0, keepdims=False).reshape(B, S, K * H)
    if k_scale is not None:
        compute = q.dtype
    else:
        with jax.numpy_dtype_promotion("standard"):  # a narrower cache: in the queries' dtype
            compute = jnp.promote_types(q.dtype, k.dtype)
    k, v = k.astype(compute), v.astype(compute)

    own_head = jnp.eye(K, dtype=bool)[None, None, :, None, :, None]  # [1, 1, K, 1, K, 1]
    spread = jnp.where(own_head, q.reshape(B, T, K, N // K, 1, H), jnp.zeros((), q.dtype))
    spread = spread.reshape(B, T * N, K * H).astype(compute)
    scores = scale * jnp.einsum("BMX,BSX->BMS", spread, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, T, N, S)
    if k_scale is not None:
        scores = scores * _of_query_heads(k_scale, layer, N)
    positions = lengths.astype(jnp.int32)[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    visible = jnp.arange(S, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]
    scores = jnp.where(visible[:, :, None, :], scores, -jnp.inf)
    # A row that sees nothing: its maximum is -inf, and -inf less -inf is no number.
    largest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    if v_scale is not None:
        weights = weights * _of_query_heads(v_scale, layer, N)
    # A float16 weight has few bits where it is small: the largest stays 1 there, and the result is
    # divided. Otherwise the weights are, which takes a kernel less: the product writes the result.
    after = compute == jnp.float16
    if after:
        top = weights.max(-1, keepdims=True)
        top = jnp.where(top > 0, top, 1.0)
        weights, total = weights / top, total / top
    else:
        weights = weights / total
    weights = weights.astype(compute).reshape(B, T * N, S)
    exact = jnp.float32 if after or K > 1 else compute
    out = jnp.einsum("BMS,BSX->BMX", weights, v, preferred_element_type=exact)
    if K > 1:
        out = jnp.where(own_head, out.reshape(B, T, K, N // K, K, H), 0).sum(4)
    out = out.reshape(B, T, N, H)
    return (out / total if after else out).astype(q.dtype)


def _of_query_heads(scale: jax.Array, layer: int | jax.Array, heads: int) -> jax.Array:
    """A layer's scales `[B, 1, N, S]`: a query head's are those of the KV head that it reads."""
    scale = jax.lax.dynamic_index_in_dim(scale, layer, 0, keepdims=False)
    return jnp.repeat(scale, heads // scale.shape[1], axis=1)[:, None]
