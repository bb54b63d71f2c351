"""`KVCache`: the keys and values of the layers that own them, and of no others."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from cla_kernels import EIGHT_BIT
from jax.core import Tracer
from jaxtyping import Array, Int

from cla_jax._choices import check_choice
from cla_jax.configs import CacheDtype, ModelConfig
from cla_jax.inference.quantization import StoredKV
from cla_jax.models import KV
from cla_jax.models.sharding import Axes, constrain, on_shards, shards
from cla_jax.sharing import KVSharing

# Logical axes: of a stack `[G', B, S, K, H]`, of its scales `[G', B, K, S]`, and of queries that
# attend to it.
CACHE_AXES = (None, "cache_batch", None, "cache_heads", None)
SCALE_AXES = (None, "cache_batch", "cache_heads", None)
QUERY_AXES = ("cache_batch", None, "cache_heads", None)
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)


def check_dtype(dtype: str) -> None:
    """Whether a cache can be of that dtype, given by name.

    Raises:
        ValueError: it cannot; names the nearest that can.
    """
    if not isinstance(dtype, str):
        raise ValueError(f"cache_dtype={dtype!r}: expected a name, such as 'bfloat16'")
    check_choice("cache_dtype", dtype, CACHE_DTYPES)


def check_widths(widths: Any, rows: int, length: int) -> Int[Array, "b"]:
    """How many of `length` new tokens are each row's, as int32; None: all.

    Raises:
        ValueError: no integer for each row, or one beyond 0 to `length` (traced ones are clipped).
    """
    if widths is None:
        return jnp.full((rows,), length, jnp.int32)
    if not isinstance(widths, Tracer):
        given = np.asarray(widths)
        if given.size and not (given.min() >= 0 and given.max() <= length):
            raise ValueError(
                f"widths {given.tolist()}: each must be 0 to the {length} tokens given"
            )
    widths = jnp.asarray(widths)
    if widths.shape != (rows,) or not jnp.issubdtype(widths.dtype, jnp.integer):
        raise ValueError(
            f"widths are {widths.dtype} {widths.shape}: expected an integer for each of {rows} rows"
        )
    return jnp.clip(widths, 0, length).astype(jnp.int32)


def _check_split(batch: int, kv_heads: int) -> None:
    """Whether the mesh in force divides a cache."""
    for axis, what, size in (("cache_batch", "rows", batch), ("cache_heads", "KV heads", kv_heads)):
        parts = shards(axis)
        if size % parts:
            raise ValueError(
                f"a KV cache of {size} {what} on a mesh that splits them by {parts}: expected a "
                f"multiple of {parts}, the nearest is {max(round(size / parts), 1) * parts}"
            )


def laid_out_stack(stack: jax.Array) -> jax.Array:
    """A stack of a cache, or its scales, where the mesh in force wants it."""
    return constrain(stack, *_axes(stack))


def _axes(stack: jax.Array) -> Axes:
    return CACHE_AXES if stack.ndim == len(CACHE_AXES) else SCALE_AXES


def _put_behind(
    stack: jax.Array, part: jax.Array, lengths: jax.Array, layer: Any, *, first_row: Any
) -> jax.Array:
    """A stack, or scales, with new tokens behind what rows from `first_row` on have."""
    scales = stack.ndim == len(SCALE_AXES)
    b, T = part.shape[1], part.shape[3 if scales else 2]
    rows = first_row + jnp.arange(b, dtype=jnp.int32)
    positions = lengths[rows][:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    # A scatter by rows: rows are of different lengths, and it copies nothing. In scales the heads
    # lie between rows and positions, so that each head is scattered too: all axes up to the last
    # that is indexed, in their order, are what a scatter need not turn.
    at = (rows[:, None], positions)
    if scales:
        heads = jnp.arange(part.shape[2], dtype=jnp.int32)
        at = (rows[:, None, None], heads[None, :, None], positions[:, None])
    return stack.at[layer, *at].set(part[0], mode="drop", unique_indices=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What a batch of sequences has left for its next tokens: K/V of every owner, and lengths.

    A reader owns no bytes, nor scales. An explicit pytree: it is passed in and out, and donated
    (`donate_argnums`), so that it is updated in place.

    The layers' entries lie in *stacks* of shape `[G', B, S, K, H]`. By default every KV layer is a
    stack of its own (`G'` = 1), so that a step can read an entry without slicing it out first;
    `stacked=True` makes one stack of all (`G'` = `G`), which a `scan` over layers can index with a
    traced slot.

    Attributes:
        k: stacks of rotated keys, `[G', B, S, K, H]` each.
        v: stacks of values, alike.
        lengths: int32 `[B]`, how many tokens of each row are cached.
        k_scale: of an 8-bit cache, for each stack float32 `[G', B, K, S]`: a token's key in a KV
            head is `k` times its scale. Empty for other caches.
        v_scale: likewise of the values.
    """

    # Arrays; JAX also rebuilds the cache with shapes and other things as leaves.
    k: tuple[Any, ...]
    v: tuple[Any, ...]
    lengths: Any
    k_scale: tuple[Any, ...] = ()
    v_scale: tuple[Any, ...] = ()

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype: str = "bfloat16",
        *,
        stacked: bool = False,
    ) -> "KVCache":
        """An empty cache of `batch` rows of up to `length` tokens.

        Its K/V take `batch * length * config.sharing.kv_bytes_per_token(K, H, itemsize)` bytes, of
        8 bits with `scale_bytes=4`. On a mesh they are split over all of its devices, by KV heads
        or by rows (call it jitted there, or a device holds the whole of each stack at first).

        Raises:
            ValueError: a size that is not positive, an unknown dtype, rows or KV heads that the
                mesh in force does not divide.
        """
        return cls.of_layers(
            config.sharing, batch, length, kv_heads=config.kv_heads, head_dim=config.head_dim,
            dtype=dtype, stacked=stacked,
        )  # fmt: skip

    @classmethod
    def of_layers(
        cls,
        sharing: KVSharing,
        batch: int,
        length: int,
        *,
        kv_heads: int,
        head_dim: int,
        dtype: str = "bfloat16",
        stacked: bool = False,
    ) -> "KVCache":
        """`create`, for layers that are not a `Decoder`'s: see `extend_layers`.

        Args:
            sharing: the layers' map.
            batch: rows.
            length: tokens that a row has room for.
            kv_heads: `K` of every layer.
            head_dim: `H`.
            dtype: bfloat16, float16 or float32; int8 or float8_e4m3fn, with scales.
            stacked: one stack of all KV layers, rather than one of each.

        Examples:
            >>> sharing = KVSharing.cla(num_layers=6, factor=2)
            >>> cache = KVCache.of_layers(sharing, batch=2, length=16, kv_heads=1, head_dim=64)
            >>> cache.kv_layers, cache.nbytes
            (3, 24576)

        Raises:
            ValueError: a size that is not positive, an unknown dtype.
        """
        sizes = {"batch": batch, "length": length, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in sizes.items():
            if not isinstance(value, int | np.integer):
                raise ValueError(f"a KV cache of {name} {value!r}: expected an integer")
            if value < 1:
                raise ValueError(f"a KV cache of {name} {value}: expected at least 1")
        check_dtype(dtype)
        _check_split(batch, kv_heads)
        in_stack = sharing.kv_layers if stacked else 1
        shape = (in_stack, batch, length, kv_heads, head_dim)

        # Distinct arrays throughout: a donated buffer can be given away only once.
        def stacks(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, ...]:
            return tuple(
                laid_out_stack(jnp.zeros(shape, dtype))
                for _ in range(sharing.kv_layers // in_stack)
            )

        lengths = jnp.zeros((batch,), jnp.int32)
        if dtype not in EIGHT_BIT:
            return cls(stacks(shape, dtype), stacks(shape, dtype), lengths)
        of_scales = (in_stack, batch, kv_heads, length)
        return cls(
            stacks(shape, dtype), stacks(shape, dtype), lengths,
            stacks(of_scales, jnp.float32), stacks(of_scales, jnp.float32),
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Rows, `B`."""
        return self.lengths.shape[0]

    @property
    def length(self) -> int:
        """Tokens that a row has room for, `S`."""
        return self.k[0].shape[2]

    @property
    def kv_layers(self) -> int:
        """Layers that have an entry, `G`."""
        return sum(stack.shape[0] for stack in self.k)

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        return self.k[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, scales included."""
        held = (*self.k, *self.v, *self.k_scale, *self.v_scale)
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in held)

    def check(self, config: ModelConfig) -> None:
        """Whether this is a cache of that model.

        Raises:
            ValueError: it is not; names what differs.
        """
        layers = self.kv_layers
        *_, kv_heads, head_dim = self.k[0].shape
        found = {"KV layers": layers, "KV heads": kv_heads, "head dim": head_dim}
        wanted = {
            "KV layers": config.kv_layers,
            "KV heads": config.kv_heads,
            "head dim": config.head_dim,
        }
        if found != wanted:
            differs = ", ".join(
                f"{n} {there} there, {wanted[n]} here" for n, there in found.items()
                if there != wanted[n]
            )  # fmt: skip
            raise ValueError(f"this is the cache of another model than {config.name}: {differs}")

    def stack(self, slot: int | Int[Array, ""]) -> tuple[int, int | Int[Array, ""]]:
        """Where a KV layer lies: which stack, and where in it.

        Args:
            slot: `KVSharing.cache_slots` of the layer; traced only if all lie in one stack.
        """
        return (0, slot) if len(self.k) == 1 else (int(slot), 0)

    def entry(self, slot: int | Int[Array, ""]) -> tuple[StoredKV, int | Int[Array, ""]]:
        """The stack in which a KV layer lies, and where in it: what attention reads in place."""
        at, layer = self.stack(slot)
        scales = (stacks[at] if stacks else None for stacks in (self.k_scale, self.v_scale))
        return StoredKV(self.k[at], self.v[at], *scales), layer

    def stored(self, kv: KV) -> StoredKV:
        """K/V `[b, T, K, H]` of new tokens as this cache holds them: rounded or quantised.

        Whoever attends to them before they are read from the cache reads these.
        """
        return StoredKV.of(kv, self.dtype.name)

    def write(
        self, slot: int | Int[Array, ""], new: StoredKV, first_row: int | Int[Array, ""] = 0
    ) -> "KVCache":
        """Put K/V of `T` tokens behind what `b` rows have; lengths stay.

        Tokens for which a row has no room are dropped.

        Args:
            slot: of the owner.
            new: `stored` K/V of consecutive rows.
            first_row: the first of those rows.
        """

        def put(stack: Any, layer: Any, part: Any) -> Any:
            behind = functools.partial(_put_behind, first_row=first_row)
            if self._is_all(first_row, part.shape[1]):
                # Every device writes its own rows and heads. XLA does not see that they are its
                # own, and would send all new K/V to all devices.
                axes = _axes(stack)
                behind = on_shards(behind, (axes, axes, CACHE_AXES[1:2], ()), axes)
            return behind(stack, part, self.lengths, layer)

        return self._with(slot, new, put)

    def begin(
        self, slot: int | Int[Array, ""], new: StoredKV, first_row: int | Int[Array, ""] = 0
    ) -> "KVCache":
        """Put K/V of `T` tokens at the beginning of `b` rows; lengths stay.

        Args:
            slot: of the owner.
            new: `stored` K/V of consecutive rows; `T` is at most `S`.
            first_row: the first of those rows.
        """

        def put(stack: Any, layer: Any, part: Any) -> Any:
            start = (layer, first_row, *(0,) * (stack.ndim - 2))
            return jax.lax.dynamic_update_slice(stack, part, start)

        return self._with(slot, new, put)

    def _with(
        self, slot: int | Int[Array, ""], new: StoredKV, put: Callable[[Any, Any, Any], Any]
    ) -> "KVCache":
        """With one KV layer's K/V written: `put(stack, layer, part)` returns the stack."""
        at, layer = self.stack(slot)

        def replaced(stacks: tuple[Any, ...], part: Any) -> tuple[Any, ...]:
            if not stacks:
                return ()
            return (*stacks[:at], laid_out_stack(put(stacks[at], layer, part)), *stacks[at + 1 :])

        return KVCache(
            replaced(self.k, new.k),
            replaced(self.v, new.v),
            self.lengths,
            replaced(self.k_scale, new.k_scale),
            replaced(self.v_scale, new.v_scale),
        )

    def rows(
        self, slot: int | Int[Array, ""], first_row: int | Int[Array, ""], count: int
    ) -> StoredKV:
        """Of some rows of one KV layer, a stack of its own: a copy."""
        stored, layer = self.entry(slot)

        def take(stack: Any) -> Any:
            start = (layer, first_row, *(0,) * (stack.ndim - 2))
            return jax.lax.dynamic_slice(stack, start, (1, count, *stack.shape[2:]))

        return jax.tree.map(take, stored)

    def _is_all(self, first_row: int | Int[Array, ""], rows: int) -> bool:
        """Whether these are known to be all rows, as they are traced."""
        return isinstance(first_row, int) and first_row == 0 and rows == self.batch

    def grown(self, widths: Int[Array, "b"], first_row: int | Int[Array, ""] = 0) -> "KVCache":
        """With the lengths of some rows grown, up to what there is room for."""
        if self._is_all(first_row, widths.shape[0]):  # where they are
            lengths = jnp.minimum(self.lengths + widths, np.int32(self.length))
            return dataclasses.replace(self, lengths=lengths)
        rows = first_row + jnp.arange(widths.shape[0], dtype=jnp.int32)
        lengths = jnp.minimum(self.lengths[rows] + widths, np.int32(self.length))
        return dataclasses.replace(self, lengths=self.lengths.at[rows].set(lengths))
