"""Attention over K/V that are handed in: a pure function, an owner's projection, a query side.

Axes: `B` batch, `T` query length, `S` key length, `N` query heads, `K` KV heads, `H` head dim,
`D` model dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from cla_kernels import gpu_obstacle, target_device
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cla_jax.configs import AttentionConfig, ExecutionConfig
from cla_jax.models import splash
from cla_jax.models.rotary import Rotary, rotate
from cla_jax.models.sharding import constrain, named, platform, shards

_CUDNN_HEAD_DIM_MULTIPLE = 8


@runtime_checkable
class Appendable[E](Protocol):
    """What an owner's new K/V can be put behind: an entry of a cache."""

    def append(self, kv: "KV", /) -> E:
        """With the K/V of new tokens behind those that are there."""
        ...


class KV(NamedTuple):
    """Keys, already rotated, and values of one owner.

    What an owner hands to its readers when whole sequences are run; decoding hands them an entry of
    the cache (`cla_jax.inference.CacheEntry`), which is read by the same `attend`.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    def behind[E](self, cached: Appendable[E] | None) -> "KV | E":
        """These K/V, put behind what is cached: the owner's line of a layer `(x, kv) -> (x, kv)`.

        Args:
            cached: what the owner was given: None in a forward pass over whole sequences, which
                returns these K/V as they are, or an entry of a cache, which is returned with them
                appended. Attend to what is returned: these K/V alone are the new tokens'.

        Raises:
            ValueError: a reader, which was given its owner's K/V, puts others behind them.
        """
        if isinstance(cached, KV):
            raise ValueError("only an owner puts K/V behind what it was given, this is a reader")
        return self if cached is None else cached.append(self)

    def attend(self, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Causal attention of whole sequences over these K/V: see `cla_jax.models.attend`."""
        return attend(q, self)


type Attend = Callable[[Float[Array, "B T N H"]], Float[Array, "B T N H"]]
"""From rotated queries to attention outputs, over K/V that it knows."""


class LayerContext(NamedTuple):
    """What every layer of a forward pass reads beside its input and its K/V.

    Attributes:
        rotary: angles of the positions.
        documents: document of each token; attention stays within one. None: one document a row.
    """

    rotary: Rotary
    documents: Int[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class AttentionPath:
    """Which implementation `attend` takes, and why.

    Attributes:
        implementation: `cudnn` or `xla`, of `jax.nn.dot_product_attention`; `splash`, JAX's kernel
            for TPU, for whole sequences alone.
        head_dim: that it runs with: heads are zero-padded up to it inside the call.
        reason: one line for logs.
    """

    implementation: Literal["cudnn", "xla", "splash"]
    head_dim: int
    reason: str


def attention_path(
    head_dim: int, dtype: jnp.dtype, masked_length: int | None = None
) -> AttentionPath:
    """The implementation for a head dim and dtype on the mesh in force, or the default device.

    cuDNN's fused attention on NVIDIA GPUs from compute capability 8.0, for 16-bit types and head
    dims up to 256 (128 before Hopper), in multiples of 8; splash attention on TPU, where lengths
    and head dims are padded to multiples of 128; XLA for everything else, which materialises the
    scores.

    Args:
        head_dim: `H`.
        dtype: of queries, keys and values.
        masked_length: `T`, where a document mask is used: cuDNN takes masks of even length.
    """
    if platform() == "tpu":
        lanes = splash.padded(head_dim)
        why = "fused" if lanes == head_dim else f"fused, head dim {head_dim} zero-padded to {lanes}"
        return AttentionPath("splash", lanes, why)
    device = target_device()
    if no_gpu := gpu_obstacle(device):
        return AttentionPath("xla", head_dim, no_gpu)
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return AttentionPath("xla", head_dim, f"cuDNN needs capability 8.0, this is {capability}")
    if dtype not in (jnp.bfloat16, jnp.float16):
        return AttentionPath("xla", head_dim, f"cuDNN takes 16-bit types, this is {dtype}")
    if head_dim > largest:
        return AttentionPath(
            "xla", head_dim, f"cuDNN takes head dims up to {largest} here, this is {head_dim}"
        )
    if masked_length is not None and masked_length % 2:
        why = f"cuDNN takes masks of even length, this is {masked_length}"
        return AttentionPath("xla", head_dim, why)
    padded = -(-head_dim // _CUDNN_HEAD_DIM_MULTIPLE) * _CUDNN_HEAD_DIM_MULTIPLE
    why = "fused" if padded == head_dim else f"fused, head dim {head_dim} zero-padded to {padded}"
    return AttentionPath("cudnn", padded, why)


def attend(
    q: Float[Array, "B T N H"], kv: KV, documents: Int[Array, "B T"] | None = None
) -> Float[Array, "B T N H"]:
    """Causal softmax attention of whole sequences: query `t` sees keys `0..t`.

    Query head `n` reads KV head `n // (N // K)`. With `documents`, a query sees the keys of its own
    document only; that route passes an explicit mask, which cuDNN reads from memory. Splash
    attention, on TPU, takes documents as they are.

    Returns:
        `[B, T, N, H]` in the dtype of `q`.
    """
    if platform() == "tpu":
        _check_ranks(q, kv)
        return splash.splash_attend(q, *_for_every_shard(kv), documents)
    mask: Bool[Array, "B 1 T T"] | None = None
    if documents is not None:
        mask = documents[:, None, :, None] == documents[:, None, None, :]
    return _attention(q, kv, mask, is_causal=True)


def attend_behind(
    q: Float[Array, "B T N H"], kv: KV, starts: Int[Array, "B"]
) -> Float[Array, "B T N H"]:
    """Causal attention of a chunk of each row: query `t` sees keys `0..starts[b] + t`.

    `jax.nn` aligns its causal mask at the first key, so a chunk that does not begin its row passes
    an explicit mask.

    Args:
        q: queries of the chunk.
        kv: keys and values `[B, S, K, H]` of the row so far, the chunk's included.
        starts: position of each row's first query.

    Returns:
        `[B, T, N, H]` in the dtype of `q`.
    """
    positions = starts[:, None] + jnp.arange(q.shape[1], dtype=starts.dtype)[None, :]
    keys = jnp.arange(kv.k.shape[1], dtype=starts.dtype)
    mask = keys[None, None, None, :] <= positions[:, None, :, None]
    return _attention(q, kv, mask, is_causal=False)


def _attention(
    q: Float[Array, "B T N H"], kv: KV, mask: Bool[Array, "B 1 T S"] | None, *, is_causal: bool
) -> Float[Array, "B T N H"]:
    _check_ranks(q, kv)
    kv = _for_every_shard(kv)
    head_dim = q.shape[-1]
    # cuDNN's masks are of even length in both directions.
    odd = None if mask is None else next((n for n in mask.shape[2:] if n % 2), mask.shape[2])
    path = attention_path(head_dim, q.dtype, odd)
    # Splash attention takes no mask: on TPU this is a chunk of a row.
    takes, size = path.implementation, path.head_dim
    implementation, size = ("xla", head_dim) if takes == "splash" else (takes, size)
    if mask is not None and implementation == "cudnn" and shards("layers") > 1:
        # A pipeline's stages run under jax.vmap, where JAX takes a mask for cuDNN only whole.
        mask = jnp.broadcast_to(mask, (len(mask), q.shape[2], *mask.shape[2:]))
    padding = ((0, 0), (0, 0), (0, 0), (0, size - head_dim))
    if size != head_dim:
        q, kv = jnp.pad(q, padding), KV(jnp.pad(kv.k, padding), jnp.pad(kv.v, padding))
    # jax.nn mixes float32 softmax statistics with 16-bit inputs on purpose.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q, kv.k, kv.v, mask=mask, is_causal=is_causal, scale=head_dim**-0.5,
            implementation=implementation,
        )  # fmt: skip
    return out[..., :head_dim]


def _check_ranks(q: jax.Array, kv: KV) -> None:
    for name, array in (("queries", q), ("keys", kv.k), ("values", kv.v)):
        if array.ndim != 4:  # jax.nn would take [B, T, D] for one row of B tokens
            raise ValueError(
                f"{name} are {array.shape}: expected [batch, length, heads, head dim]; a single "
                "head is x[:, :, None]"
            )


def _for_every_shard(kv: KV) -> KV:
    """K/V with a head for each shard of the query heads, where there are more of these.

    Every shard's queries read one of the heads, which its device has made for itself: nothing is
    sent. Queries and K/V are then split alike, as the fused kernel wants them.
    """
    parts, heads = shards("heads"), kv.k.shape[2]
    if heads % parts == 0:
        return kv
    axes = ("batch", "length", "heads", "head_dim")
    k, v = (constrain(jnp.repeat(a, parts // heads, axis=2), *axes) for a in kv)
    return KV(k, v)


class KVProjection(nnx.Module):
    """What makes a layer an owner: projects its input to keys and values and rotates the keys.

    The keys are rotated here, once, before anything reads or caches them.

    Args:
        config: the sizes.
        execution: of which the compute dtype is used.
        rngs: random streams for the initial parameters.
    """

    def __init__(
        self, config: AttentionConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs
    ) -> None:
        shape = (config.d_model, 2, config.kv_heads, config.head_dim)
        self.projection = nnx.Einsum(
            "BTD,DCKH->BTCKH",
            shape,
            shape[1:] if config.use_bias else None,
            dtype=jnp.dtype(execution.compute_dtype),
            kernel_init=nnx.initializers.normal(config.init_std),
            kernel_metadata=named("embed", "pair", "kv_heads", "head_dim"),
            bias_metadata=named("pair", "kv_heads", "head_dim"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"], angles: Rotary | None = None) -> KV:
        """Keys and values `[B, T, K, H]` of a (normalised) input.

        Args:
            x: the input.
            angles: by which the keys are rotated; None: not at all.
        """
        kv = self.projection(x)
        k, v = kv[:, :, 0], kv[:, :, 1]
        if angles is not None:
            k = rotate(k, angles)
        axes = ("batch", "length", "kv_heads", "head_dim")
        return KV(constrain(k, *axes), constrain(v, *axes))


class QueryAttention(nnx.Module):
    """The query side, which every layer has: projects queries, attends to given K/V, projects back.

    `N * H` need not equal `D`.

    Args:
        config: the sizes.
        execution: of which the compute dtype is used.
        rngs: random streams for the initial parameters.

    Examples:
        >>> mqa = AttentionConfig(d_model=64, query_heads=4, kv_heads=1, head_dim=16)
        >>> execution = ExecutionConfig(compute_dtype="float32")
        >>> owner = KVProjection(mqa, execution, rngs=nnx.Rngs(0))
        >>> reader = QueryAttention(mqa, execution, rngs=nnx.Rngs(1))
        >>> h = jnp.ones((2, 10, 64))
        >>> kv = owner(h)
        >>> kv.k.shape, reader(h, kv.attend).shape
        ((2, 10, 1, 16), (2, 10, 64))
    """

    def __init__(
        self, config: AttentionConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs
    ) -> None:
        heads, dtype = (config.query_heads, config.head_dim), jnp.dtype(execution.compute_dtype)
        init = nnx.initializers.normal(config.init_std)
        self.query = nnx.Einsum(
            "BTD,DNH->BTNH",
            (config.d_model, *heads),
            heads if config.use_bias else None,
            dtype=dtype,
            kernel_init=init,
            kernel_metadata=named("embed", "heads", "head_dim"),
            bias_metadata=named("heads", "head_dim"),
            rngs=rngs,
        )
        self.out = nnx.Einsum(
            "BTNH,NHD->BTD",
            (*heads, config.d_model),
            (config.d_model,) if config.use_bias else None,
            dtype=dtype,
            kernel_init=init,
            kernel_metadata=named("heads", "head_dim", "embed"),
            bias_metadata=named("embed"),
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T D"], attend: Attend, angles: Rotary | None = None
    ) -> Float[Array, "B T D"]:
        """Attention output `[B, T, D]` of a (normalised) input.

        Args:
            x: the input.
            attend: reads an owner's K/V, such as `kv.attend`.
            angles: by which the queries are rotated; None: not at all.
        """
        axes = ("batch", "length", "heads", "head_dim")
        q = self.query(x)
        if angles is not None:
            q = rotate(q, angles)
        q = constrain(q, *axes)
        return self.out(constrain(attend(q), *axes))
