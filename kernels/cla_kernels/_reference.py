"""The definition, a row and a head at a time, in float32: slow, and for comparison only."""

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
    (B, T, N, _), S, K = q.shape, k.shape[2], k.shape[3]
    k, v = (_dequantised(*cached, layer) for cached in ((k, k_scale), (v, v_scale)))
    rows: list[jax.Array] = []
    for b in range(B):
        positions = lengths[b].astype(jnp.int32) - T + jnp.arange(T, dtype=jnp.int32)
        visible = jnp.arange(S, dtype=jnp.int32)[None, :] <= positions[:, None]
        heads: list[jax.Array] = []
        for n in range(N):
            keys, values = k[b, :, n // (N // K)], v[b, :, n // (N // K)]
            scores = jnp.where(visible, scale * q[b, :, n].astype(jnp.float32) @ keys.T, -jnp.inf)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0.0))
            total = weights.sum(-1, keepdims=True)
            heads.append((weights @ values) / jnp.where(total > 0, total, 1.0))
        rows.append(jnp.stack(heads, axis=1))
    return jnp.stack(rows).astype(q.dtype)


def _dequantised(values: jax.Array, scale: jax.Array | None, layer: int | jax.Array) -> jax.Array:
    """One layer `[B, S, K, H]` in float32."""
    values = jax.lax.dynamic_index_in_dim(values, layer, 0, keepdims=False).astype(jnp.float32)
    if scale is None:
        return values
    of_layer = jax.lax.dynamic_index_in_dim(scale, layer, 0, keepdims=False)
    return values * of_layer.swapaxes(1, 2)[..., None]
