"""cuDNN's fused attention through `jax.nn`, one query a row, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from cla_kernels._target import gpu_obstacle, target_device

_MULTIPLE = 8
MOST_ROWS = 65_535


def obstacle(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Why cuDNN cannot take these inputs on the target device; empty if it can."""
    device = target_device()
    if no_gpu := gpu_obstacle(device):
        return no_gpu
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return f"compute capability 8.0 is needed, this is {capability}"
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries and cache must share a 16-bit type, these are {q.dtype} and {k.dtype}"
    if q.shape[-1] > largest or q.shape[-1] % _MULTIPLE:
        return f"head dim {q.shape[-1]} is no multiple of {_MULTIPLE} up to {largest}"
    if q.shape[0] > MOST_ROWS:
        return f"{q.shape[0]} rows are more than the {MOST_ROWS} of a CUDA grid"
    if q.shape[1] != 1:
        return f"{q.shape[1]} queries a row would need a mask in memory"
    return ""


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
    k = jax.lax.dynamic_index_in_dim(k, layer, 0, keepdims=False)
    v = jax.lax.dynamic_index_in_dim(v, layer, 0, keepdims=False)
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, k.shape[1])
    # jax.nn mixes float32 softmax statistics with 16-bit inputs on purpose.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=jnp.maximum(lengths, 1), scale=scale,
            implementation="cudnn",
        )  # fmt: skip
    return jnp.where((lengths > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))
