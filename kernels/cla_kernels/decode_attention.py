"""Attention of a few new queries over a cache: the signature, its checks and the choice."""

import difflib
import operator
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cla_kernels import _cudnn, _mosaic_gpu, _reference, _xla

__all__ = [
    "EIGHT_BIT",
    "IMPLEMENTATIONS",
    "Implementation",
    "choose_implementation",
    "decode_attention",
]

Implementation = Literal["reference", "xla", "cudnn", "mosaic_gpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

EIGHT_BIT = ("int8", "float8_e4m3fn")  # of a cache with scales

_FUNCTIONS = {
    "reference": _reference.decode_attention,
    "xla": _xla.decode_attention,
    "cudnn": _cudnn.decode_attention,
    "mosaic_gpu": _mosaic_gpu.decode_attention,
}
_OBSTACLES = {"cudnn": _cudnn.obstacle, "mosaic_gpu": _mosaic_gpu.obstacle}
_NAMES = {"cudnn": "cuDNN", "mosaic_gpu": "Mosaic GPU"}


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: int | jax.Array = 0,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax attention of the last `T` queries of each row over one layer of a stacked cache.

    `lengths[b]` counts the keys that row `b`'s *last* query sees; query `t` sits at position
    `lengths[b] - T + t` and sees the keys from 0 up to its own position (causal, aligned at the
    end). A length may exceed `S`, where the last queries are padding; a query that sees no key
    gives zeros. Keys are already rotated. Query head `n` reads KV head `n // (N // K)`.

    What lies in a row's cache behind its length is not seen. `mosaic_gpu` never lets it into a
    product: it may be anything, NaN included. The other implementations multiply it by zero: it
    must be finite, scales included, and a key that is not finite may spoil the row's other heads.

    Works under `jax.jit`, `jax.vmap` and in a scan over layers.

    Args:
        q: queries `[B, T, N, H]`, floating.
        k: cached keys `[G, B, S, K, H]`, floating; may be narrower than `q`, as a bfloat16 cache
            under float32 queries. Or int8 or float8_e4m3fn, with scales.
        v: cached values, like `k`.
        lengths: int32 `[B]`.
        k_scale: of an 8-bit cache, float32 `[G, B, K, S]`: a token's key in a KV head is `k` times
            its scale.
        v_scale: likewise of the values.
        layer: which of the `G` layers; a Python int or a traced int32 scalar. A traced one outside
            the stack is not noticed: `mosaic_gpu` reads zeros there, the others the nearest layer
            (a negative one counts from the end).
        scale: of the scores; default `H ** -0.5`.
        implementation: one of `IMPLEMENTATIONS`; default `choose_implementation`'s.

    Returns:
        `[B, T, N, H]` in the dtype of `q`. Scores and softmax are float32.

    Examples:
        >>> q = jnp.ones((2, 1, 16, 64))  # a new query of 16 heads in each of two rows
        >>> k = v = jnp.ones((3, 2, 128, 1, 64))  # three KV layers of one KV head, 128 tokens
        >>> decode_attention(q, k, v, jnp.array([100, 128]), layer=2).shape
        (2, 1, 16, 64)

    Raises:
        ValueError: shapes or dtypes that do not go together, an 8-bit cache without scales or
            another with them, a `layer` outside the stack, an unknown implementation, or one that
            cannot take these inputs (says why).
    """
    if not isinstance(layer, jax.Array):
        layer = _index(layer)
    _check(q, k, v, lengths, layer)
    _check_scales(k, k_scale, v_scale)
    if implementation is None:
        implementation, _ = choose_implementation(q, k)
    elif implementation not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(str(implementation), IMPLEMENTATIONS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown implementation {implementation!r} of decode_attention; expected one of "
            f"{', '.join(IMPLEMENTATIONS)}; the nearest is {near[0]!r}"
        )
    elif implementation in _OBSTACLES and (obstacle := _OBSTACLES[implementation](q, k)):
        name = _NAMES[implementation]
        raise ValueError(f"decode_attention cannot run on {name} here: {obstacle}")
    scale_ = q.shape[-1] ** -0.5 if scale is None else scale
    layer = layer if isinstance(layer, int) else layer.astype(jnp.int32)
    with jax.named_scope(f"decode_attention_{implementation}"):
        return _FUNCTIONS[implementation](q, k, v, k_scale, v_scale, lengths, layer, scale_)


def choose_implementation(
    q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct
) -> tuple[Implementation, str]:
    """The fastest implementation for these inputs, and why in one line.

    On the devices of the mesh in force, which may be of another machine, or the default device.

    Args:
        q: queries `[B, T, N, H]`, or their shape and dtype.
        k: cached keys `[G, B, S, K, H]`, or their shape and dtype.
    """
    if not (mosaic := _mosaic_gpu.obstacle(q, k) or _mosaic_gpu.slower(q, k)):
        if tiny := _mosaic_gpu.tiny(q, k):
            return "xla", f"faster than Mosaic GPU: {tiny}"
        return "mosaic_gpu", "our own kernel: a Hopper GPU, and shapes and dtypes that it takes"
    if not (cudnn := _cudnn.obstacle(q, k)):
        return "cudnn", f"not Mosaic GPU: {mosaic}"
    return "xla", f"not Mosaic GPU: {mosaic}; not cuDNN: {cudnn}"


def _index(layer: object) -> int:
    try:
        return operator.index(layer)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(f"layer {layer!r}: expected an integer") from None


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, layer: int | jax.Array
) -> None:
    if q.ndim != 4 or k.ndim != 5:
        raise ValueError(
            f"q is {q.shape} and k {k.shape}: expected q [B, T, N, H] and k [G, B, S, K, H]"
        )
    B, T, N, H = q.shape
    G, cache_rows, _, K, cache_dim = k.shape
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k {k.shape} {k.dtype} and v {v.shape} {v.dtype} must be alike")
    if (cache_rows, cache_dim) != (B, H):
        raise ValueError(
            f"q {q.shape} has batch {B} and head dim {H}; the cache {k.shape} has batch "
            f"{cache_rows} and head dim {cache_dim}"
        )
    if K < 1 or N % K:
        raise ValueError(f"{N} query heads are no multiple of {K} KV heads")
    if T < 1:
        raise ValueError("T is 0: expected at least one query a row")
    if not _is_float(q.dtype):
        raise ValueError(f"q is {q.dtype}: expected a floating dtype of 16 bits or more")
    if not _is_float(k.dtype) and k.dtype.name not in EIGHT_BIT:
        raise ValueError(
            f"k is {k.dtype}: expected a floating dtype of 16 bits or more, or one of "
            f"{', '.join(EIGHT_BIT)} with scales"
        )
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths are {lengths.dtype} {lengths.shape}: expected an integer for each of {B} rows"
        )
    if isinstance(layer, int) and not 0 <= layer < G:
        raise ValueError(f"layer {layer}: the cache has {G}, expected 0 to {G - 1}")


def _is_float(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def _check_scales(k: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    G, B, S, K, _ = k.shape
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k.dtype.name not in EIGHT_BIT:
            if given is not None:
                raise ValueError(
                    f"{name} is given, but k is {k.dtype}: only {' and '.join(EIGHT_BIT)} caches "
                    "have scales"
                )
        elif given is None:
            raise ValueError(
                f"k is {k.dtype}, but {name} is missing: expected float32 {(G, B, K, S)}"
            )
        elif given.shape != (G, B, K, S) or given.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {given.dtype} {given.shape}: expected float32 [G, B, K, S], "
                f"{(G, B, K, S)} for k {k.shape}"
            )
