"""A cache for layers of the form `(x, kv) -> (x, kv)`, whoever wrote them.

`extend_layers` is to decoding what `scan_layers` is to whole sequences: it hands every layer the
K/V that the sharing map gives it. These are now entries of a cache. An owner puts the new tokens'
K/V behind its entry (`KV(...).behind(kv)`), and it and its readers attend to what it returns
(`kv.attend(q)`), by the same lines that run whole sequences.
"""

import dataclasses
import functools
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from cla_kernels import decode_attention
from jaxtyping import Array, Float, Int

from cla_jax.inference.cache import CACHE_AXES, QUERY_AXES, SCALE_AXES, KVCache, check_widths
from cla_jax.inference.quantization import StoredKV
from cla_jax.models import KV, attend_behind, scan_layers, unstack_layer
from cla_jax.models.sharding import on_shards
from cla_jax.models.stack import LayerFn, Layers, check_kept, check_layers
from cla_jax.sharing import KVSharing

# Queries a row up to which attention reads the cache as it lies; more are a chunk of a prompt,
# which is bound by arithmetic and goes through the fused kernel of whole sequences.
DECODE_QUERIES = 8


def attend_cached(
    q: Float[Array, "B T N H"],
    stored: StoredKV,
    seen: Int[Array, "B"],
    layer: int | Int[Array, ""] = 0,
) -> Float[Array, "B T N H"]:
    """Causal attention of the last `T` of `seen` tokens of each row over a stack of cached K/V.

    On a mesh every device attends to the K/V that it holds. Queries that lie elsewhere, by heads
    where the cache is split by rows, are sent there, and outputs back (all-to-all); K/V stay.
    """
    of_scales = None if stored.k_scale is None else SCALE_AXES
    axes = (QUERY_AXES, CACHE_AXES, CACHE_AXES, of_scales, of_scales, QUERY_AXES[:1])
    if isinstance(layer, jax.Array):
        return on_shards(_attend_cached, (*axes, ()), QUERY_AXES)(q, *stored, seen, layer)
    read = functools.partial(_attend_cached, layer=layer)
    return on_shards(read, axes, QUERY_AXES)(q, *stored, seen)


def _attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    seen: jax.Array,
    layer: int | jax.Array,
) -> jax.Array:
    if q.shape[1] <= DECODE_QUERIES:
        return decode_attention(q, k, v, seen, k_scale=k_scale, v_scale=v_scale, layer=layer)
    kv = StoredKV(k, v, k_scale, v_scale).layer(layer, q.dtype.name)
    return attend_behind(q, kv, seen - jnp.int32(q.shape[1]))


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """K/V of one owner in a cache: what an owner is given, appends to and hands to its readers.

    Attributes:
        cache: in which it lies, with what was appended; its lengths do not count that yet.
        slot: which of the cache's KV layers it is (`KVSharing.cache_slots`).
        appended: tokens of each row that were appended.
    """

    cache: KVCache
    slot: int
    appended: int = 0

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each row that were cached before: the position of its first new token."""
        return self.cache.lengths

    def append(self, kv: KV, /) -> "CacheEntry":
        """With the K/V `[B, T, K, H]` of new tokens, rounded to the cache's dtype, or quantised.

        Raises:
            ValueError: K/V of other rows, heads or head dim than the cache's; a second time.
        """
        if self.appended:
            raise ValueError("K/V were appended to this entry before: an owner appends once a call")
        _, rows, length, heads, head_dim = self.cache.k[0].shape
        tokens = kv.k.shape[1] if kv.k.ndim == 4 else 0
        if kv.k.shape != (rows, tokens, heads, head_dim) or kv.v.shape != kv.k.shape:
            raise ValueError(
                f"K/V {kv.k.shape} and {kv.v.shape} for a cache of {rows} rows, {heads} KV heads "
                f"and head dim {head_dim}: expected [{rows}, T, {heads}, {head_dim}] for both"
            )
        if not 0 < tokens <= length:
            raise ValueError(f"{tokens} tokens a row for a cache with room for {length}")
        cache = self.cache.write(self.slot, self.cache.stored(kv))
        return dataclasses.replace(self, cache=cache, appended=tokens)

    def attend(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Causal attention of the new tokens' queries over all that the entry holds.

        Raises:
            ValueError: the K/V of the queries' tokens were not appended.
        """
        if q.shape[1] != self.appended:
            raise ValueError(
                f"{q.shape[1]} queries a row attend to an entry to which {self.appended} were "
                "appended: an owner returns KV(k, v).behind(kv), and attends to that"
            )
        stored, layer = self.cache.entry(self.slot)
        return attend_cached(q, stored, self.lengths + jnp.int32(self.appended), layer)


@overload
def extend_layers[X](
    layer: LayerFn[X, Any], sharing: KVSharing, layers: Layers, x: X, cache: None
) -> tuple[X, None]: ...
@overload
def extend_layers[X](
    layer: LayerFn[X, Any],
    sharing: KVSharing,
    layers: Layers,
    x: X,
    cache: KVCache,
    widths: Int[Array, "B"] | np.ndarray | list[int] | None = None,
) -> tuple[X, KVCache]: ...
def extend_layers[X](
    layer: LayerFn[X, Any],
    sharing: KVSharing,
    layers: Layers,
    x: X,
    cache: KVCache | None,
    widths: Int[Array, "B"] | np.ndarray | list[int] | None = None,
) -> tuple[X, KVCache | None]:
    """Run new tokens through every layer, behind those that are cached: prefill or decoding.

    The layers are those of `scan_layers`, but an owner is given its `CacheEntry` rather than None.
    A token's position in its row is `cache.lengths[b] + t`. Jit it, and donate the cache. The
    layers are unrolled: that decodes faster than a scan, and compiles longer.

    Args:
        layer: `layer(parameters, x, kv) -> (x, kv)`.
        sharing: the map.
        layers: stacked parameters, as for `scan_layers`.
        x: of `T` new tokens a row; any pytree.
        cache: `KVCache.of_layers`, with room for them: tokens for which a row has none are dropped.
            None: `x` is whole sequences, and `scan_layers` runs them.
        widths: how many of the `T` tokens are the row's, 0 to `T`, where rows are padded on the
            right; default all. Only with a cache.

    Examples:
        >>> def layer(parameters, x, kv):  # a head of dim 8, no query projection
        ...     h = x[:, :, None]
        ...     if "key" in parameters:  # an owner
        ...         kv = KV(h @ parameters["key"], h @ parameters["value"]).behind(kv)
        ...     return x + kv.attend(h)[:, :, 0], kv
        >>> sharing = KVSharing.cla(num_layers=4, factor=2)
        >>> matrices = jax.random.normal(jax.random.key(0), (2, 8, 8))
        >>> layers = [[{"key": matrices, "value": matrices}, {}]]
        >>> x = jax.random.normal(jax.random.key(1), (1, 6, 8))
        >>> whole, _ = extend_layers(layer, sharing, layers, x, None)
        >>> cache = KVCache.of_layers(sharing, 1, 6, kv_heads=1, head_dim=8, dtype="float32")
        >>> _, cache = extend_layers(layer, sharing, layers, x[:, :5], cache)
        >>> last, cache = extend_layers(layer, sharing, layers, x[:, 5:], cache)
        >>> bool(jnp.allclose(last, whole[:, 5:], atol=1e-5))
        True

    Returns:
        `x` after the last layer, and the cache with the new tokens' K/V in it, or None.

    Raises:
        ValueError: a cache of another number of KV layers; an owner that returns anything but its
            entry with new K/V appended; widths out of range; see `scan_layers` too.
    """
    if cache is None:
        if widths is not None:
            raise ValueError("widths without a cache: whole sequences have none")
        return scan_layers(layer, sharing, layers, x), None
    check_layers(sharing, layers)
    if cache.kv_layers != sharing.kv_layers:
        raise ValueError(
            f"a cache of {cache.kv_layers} KV layers for a map with {sharing.kv_layers} owners"
        )
    entries: dict[int, CacheEntry] = {}
    appended = 0
    for index, slot in enumerate(sharing.cache_slots):
        parameters = unstack_layer(layers, sharing, index)
        owns, before = sharing.owns(index), x
        # In the cache as it is now: an older one kept alive would be a copy of it.
        given = CacheEntry(cache, slot, 0 if owns else entries[slot].appended)
        with jax.named_scope(f"layer_{index}"):
            x, entry = layer(parameters, before, given)
        check_kept(before, x)
        if not owns:
            continue
        if not isinstance(entry, CacheEntry) or not entry.appended:
            what = "its entry as it was" if isinstance(entry, CacheEntry) else type(entry).__name__
            raise ValueError(
                f"layer {index} is an owner but returned {what}: with a cache it returns "
                "KV(k, v).behind(kv)"
            )
        if appended not in (0, entry.appended):
            raise ValueError(
                f"layer {index} appended {entry.appended} tokens a row, those before it {appended}"
            )
        entries[slot], cache, appended = entry, entry.cache, entry.appended
    return x, cache.grown(check_widths(widths, cache.batch, appended))
