"""What fits: the memory and the least time of decoding, by arithmetic alone.

A device's memory holds the weights, the K/V cache and the workspace of the call that runs. Weights
and cache are exact; the workspace is an upper estimate (`workspace_bytes`). From their sum follow
the largest batch at a context and the longest context at a batch. No array is built here.

`context` counts the positions that a cache holds for each row, prompt and new tokens together. It
may exceed the length that a model was trained on: memory alone is planned here.

Axes: `B` batch, `S` cache length, `L` layers, `G` KV layers, `N` query heads, `K` KV heads, `H`
head dim, `D` model dim, `F` FFN dim, `V` vocabulary.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from cla_kernels import CUDNN_MOST_ROWS, EIGHT_BIT, decode_workspace_bytes

from cla_jax._choices import check_choice
from cla_jax.configs import ModelConfig
from cla_jax.inference.sizes import format_size
from cla_jax.models.feedforward import padded_width

__all__ = [
    "MemoryPlan",
    "MemorySettings",
    "StepReads",
    "cache_bytes",
    "check_fits",
    "largest_batch",
    "longest_context",
    "step_reads",
    "total_bytes",
    "weight_bytes",
    "workspace_bytes",
]

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_CACHE_BYTES = {**_DTYPE_BYTES, **dict.fromkeys(EIGHT_BIT, 1)}
_SCALE_BYTES = 4
_FUSED_HEAD_DIM, _FUSED_MULTIPLE = 256, 8  # as in cla_jax.models.attention_path, on Hopper
_LIBRARY_BYTES = 64 * 2**20


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """What memory depends on beside model, batch and context.

    Attributes:
        cache_dtype: of the K/V cache: `bfloat16`, `float16` or `float32`; `int8` or
            `float8_e4m3fn`, with a float32 scale for each token's keys and values in a KV head.
        compute_dtype: that weights (norms stay float32) and activations are held in.
        prefill_tokens: tokens that one prefill call takes, over all rows.
        sampling: tokens are drawn; greedy decoding needs fewer copies of the logits.

    Raises:
        ValueError: an unknown dtype (names the nearest), or `prefill_tokens` below 1.
    """

    cache_dtype: str = "bfloat16"
    compute_dtype: str = "bfloat16"
    prefill_tokens: int = 8192
    sampling: bool = True

    def __post_init__(self) -> None:
        check_choice("cache_dtype", self.cache_dtype, _CACHE_BYTES)
        check_choice("compute_dtype", self.compute_dtype, _DTYPE_BYTES)
        _check_positive(prefill_tokens=self.prefill_tokens)

    @property
    def cache_element(self) -> int:
        """Bytes of one element of the cache."""
        return _CACHE_BYTES[self.cache_dtype]

    @property
    def cache_scale(self) -> int:
        """Bytes of the scale that a token's key or value has in each KV head."""
        return _SCALE_BYTES if self.cache_dtype in EIGHT_BIT else 0

    @property
    def compute_element(self) -> int:
        """Bytes of one weight or activation."""
        return _DTYPE_BYTES[self.compute_dtype]


_DEFAULT = MemorySettings()


class StepReads(NamedTuple):
    """Bytes that one decode step must read.

    Attributes:
        weights: every weight once; of the embedding, unless it is tied, a row per sequence.
        kv: every layer's K/V: a reader reads its owner's again (CLA section 2.3).
    """

    weights: int
    kv: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.kv

    def seconds(self, bandwidth: int) -> float:
        """The least time of the step at `bandwidth` bytes per second.

        A floor as long as readers find their owner's K/V in memory: where it stays in the chip's
        cache between layers (small batches of short contexts), a step may beat it.
        """
        return self.total / bandwidth


def weight_bytes(config: ModelConfig, settings: MemorySettings = _DEFAULT) -> int:
    """Bytes of the weights as decoding holds them: in the compute dtype, norms in float32.

    The FFN's width is padded to whole tiles (`cla_jax.models.UnstackedDecoder`).
    """
    return _parameter_bytes(config, settings) + _padding_bytes(config, settings)


def _padding_bytes(config: ModelConfig, settings: MemorySettings) -> int:
    fan = 2 if config.swiglu else 1
    column = (fan + 1) * config.d_model + (fan if config.use_bias else 0)
    more = padded_width(config.ffn_dim) - config.ffn_dim
    return config.num_layers * more * column * settings.compute_element


def _parameter_bytes(config: ModelConfig, settings: MemorySettings) -> int:
    per_norm = config.d_model * (1 if config.rms_norm else 2)
    norms = 2 * config.num_layers + 1 + (config.kv_layers if config.separate_kv_norm else 0)
    in_norms = norms * per_norm
    return (config.parameters - in_norms) * settings.compute_element + in_norms * 4


def cache_bytes(
    config: ModelConfig, batch: int, context: int, settings: MemorySettings = _DEFAULT
) -> int:
    """Bytes of a cache's K and V, `2 * G * B * S * K * H` elements, and of their scales.

    Readers own none.
    """
    _check_positive(batch=batch, context=context)
    return batch * context * _kv_bytes_per_token(config, settings)


def workspace_bytes(
    config: ModelConfig, batch: int, context: int, settings: MemorySettings = _DEFAULT
) -> int:
    """An upper estimate of what a decode step or a prefill call needs beside weights and cache.

    The larger of the two, since they do not run at once. It grows with batch and with context. Its
    terms are set by XLA's memory analyses of both calls (docs/results.md): a fused kernel's
    attention holds at most partial results, any other its scores.
    """
    _check_positive(batch=batch, context=context)
    N, K, H = config.query_heads, config.kv_heads, config.head_dim
    D, F, V = config.d_model, config.ffn_dim, config.vocab_size
    compute, cache = settings.compute_element, settings.cache_element
    # A prefill call reads K/V in the compute dtype; a decode step, as they lie in the cache.
    fused = compute == 2 >= cache and H <= _FUSED_HEAD_DIM
    fused_decode = fused and cache == 2 and H % _FUSED_MULTIPLE == 0 and batch <= CUDNN_MOST_ROWS
    # A call takes a column of every row at least, and no more than there is.
    prefilled = min(batch * context, max(settings.prefill_tokens, batch))

    # Logits are float32; sampling also holds them scaled, sorted and summed up.
    logits = batch * V * 4
    step_logits = logits * (6 if settings.sampling else 1)
    # Scores are float32, and so are their exponentials.
    scores_per_query = 2 * N * context * 4
    mask_per_query = context * (1 + compute)
    # One layer's K/V of a key, in another layout or in the compute dtype.
    key = 2 * K * H * max(compute, cache)
    # Weights that XLA lays out anew for the whole loop of decoding.
    relaid = weight_bytes(config, settings) // 4
    # Activations of a token in one layer: residual stream, norm, attention and feed-forward
    # outputs; queries before and after the rotation, attended heads; K/V; gate, up and product.
    residual = 4 * D * compute
    heads = 3 * N * H * compute
    projected_kv = 2 * 2 * K * H * compute
    feed_forward = (3 if config.swiglu else 2) * F * compute
    statistics = (D + 2 * H) * 4  # a norm in float32, and the angles
    per_token = residual + heads + projected_kv + feed_forward + statistics

    decode = relaid + max(step_logits, batch * per_token)  # one behind the other
    if fused_decode:
        decode += decode_workspace_bytes(N, K, H)
    else:
        decode += batch * (scores_per_query + context * key)
    keys = min(batch * context, max(settings.prefill_tokens, context))  # of one prefill call
    prefill = logits + keys * key
    prefill += prefilled * (per_token + (mask_per_query if fused else scores_per_query))
    bookkeeping = 64 * batch  # lengths, random keys, last tokens
    # An allocator cannot fill memory to the brim.
    held = weight_bytes(config, settings) + cache_bytes(config, batch, context, settings)
    return max(decode, prefill) + bookkeeping + held // 100 + _LIBRARY_BYTES


def total_bytes(
    config: ModelConfig, batch: int, context: int, settings: MemorySettings = _DEFAULT
) -> int:
    """Weights, cache and workspace. It grows with batch and with context.

    Raises:
        ValueError: a batch or context below 1, here and in all that follows.
    """
    held = weight_bytes(config, settings) + cache_bytes(config, batch, context, settings)
    return held + workspace_bytes(config, batch, context, settings)


def largest_batch(
    config: ModelConfig, context: int, memory: int, settings: MemorySettings = _DEFAULT
) -> int:
    """The most sequences of `context` tokens that fit into `memory` bytes; 0 if not one does."""
    _check_positive(context=context, memory=memory)
    row = context * _kv_bytes_per_token(config, settings)
    most = (memory - weight_bytes(config, settings)) // row
    return _largest(most, memory, lambda batch: total_bytes(config, batch, context, settings))


def longest_context(
    config: ModelConfig, batch: int, memory: int, settings: MemorySettings = _DEFAULT
) -> int:
    """The most tokens that each of `batch` sequences can have in `memory` bytes; 0 if not one."""
    _check_positive(batch=batch, memory=memory)
    column = batch * _kv_bytes_per_token(config, settings)
    most = (memory - weight_bytes(config, settings)) // column
    return _largest(most, memory, lambda context: total_bytes(config, batch, context, settings))


def step_reads(
    config: ModelConfig, batch: int, context: int, settings: MemorySettings = _DEFAULT
) -> StepReads:
    """What one decode step of `batch` sequences reads when each sees `context` keys."""
    _check_positive(batch=batch, context=context)
    weights = _parameter_bytes(config, settings)
    if not config.tied_embeddings:
        weights -= config.vocab_size * config.d_model * settings.compute_element
    weights += batch * config.d_model * settings.compute_element
    per_key = (
        2 * config.kv_heads * (config.head_dim * settings.cache_element + settings.cache_scale)
    )
    return StepReads(weights, config.num_layers * batch * context * per_key)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """A model, a batch and a context in a device's memory.

    Attributes:
        config: the model.
        batch: sequences, `B`.
        context: tokens of each, `S`.
        memory: bytes that weights, cache and workspace may take together.
        settings: dtypes and the size of a prefill call.

    Raises:
        ValueError: a size below 1.
    """

    config: ModelConfig
    batch: int
    context: int
    memory: int
    settings: MemorySettings = _DEFAULT

    def __post_init__(self) -> None:
        _check_positive(batch=self.batch, context=self.context, memory=self.memory)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the cache, in its dtype."""
        return _kv_bytes_per_token(self.config, self.settings)

    @property
    def weights(self) -> int:
        """Bytes, as all that follow."""
        return weight_bytes(self.config, self.settings)

    @property
    def cache(self) -> int:
        """Of the whole batch."""
        return cache_bytes(self.config, self.batch, self.context, self.settings)

    @property
    def workspace(self) -> int:
        """An upper estimate."""
        return workspace_bytes(self.config, self.batch, self.context, self.settings)

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.cache + self.workspace

    @functools.cached_property
    def largest_batch(self) -> int:
        """At this context."""
        return largest_batch(self.config, self.context, self.memory, self.settings)

    @functools.cached_property
    def longest_context(self) -> int:
        """At this batch."""
        return longest_context(self.config, self.batch, self.memory, self.settings)

    def reads(self, batch: int | None = None) -> StepReads:
        """Of a decode step at this context, of this batch or another."""
        batch = self.batch if batch is None else batch
        return step_reads(self.config, batch, self.context, self.settings)


def check_fits(
    config: ModelConfig,
    batch: int,
    length: int,
    *,
    cache_dtype: str = "bfloat16",
    prefill_tokens: int = 8192,
    memory_bytes: int | None,
    compute_dtype: str = "bfloat16",
    sampling: bool = True,
) -> None:
    """Refuses a batch that will not fit, before anything is allocated.

    Args:
        config: the model.
        batch: sequences.
        length: positions of each in the cache.
        cache_dtype: of the cache.
        prefill_tokens: of one prefill call.
        memory_bytes: what weights, cache and workspace may take together; None where the device
            does not say: nothing is refused then.
        compute_dtype: of weights and activations.
        sampling: tokens are drawn.

    Raises:
        ValueError: it does not fit; names what it needs and has, the largest batch, the longest
            context, and what else makes it smaller. Also an argument out of range.
    """
    settings = MemorySettings(cache_dtype, compute_dtype, prefill_tokens, sampling)
    if memory_bytes is None:
        _check_positive(batch=batch, length=length)
        return
    plan = MemoryPlan(config, batch, length, memory_bytes, settings)
    if plan.total <= memory_bytes:
        return
    if plan.weights >= memory_bytes:
        raise ValueError(weights_do_not_fit(plan))
    knobs = ["a smaller batch", "a shorter context"]
    if settings.cache_element > 2:
        knobs.append("cache dtype bfloat16 (half the cache)")
    elif settings.cache_element == 2:
        knobs.append("cache dtype int8 (about half the cache, less exact)")
    if plan.workspace > workspace_bytes(config, batch, length, dataclasses.replace(
        settings, prefill_tokens=1
    )):  # fmt: skip
        knobs.append(f"fewer than {prefill_tokens:,} tokens per prefill call")
    knobs.append(
        f"a model that shares K/V over more layers (this one has {config.kv_layers} KV layers for "
        f"{config.num_layers})"
    )
    raise ValueError(
        f"{config.name}: batch {batch} at context {length:,} needs {format_size(plan.total)} "
        f"(weights {format_size(plan.weights)}, {settings.cache_dtype} cache "
        f"{format_size(plan.cache)}, workspace {format_size(plan.workspace)}), but "
        f"{format_size(memory_bytes)} are available. The largest batch that fits at this context "
        f"is {plan.largest_batch:,}, the longest context at this batch {plan.longest_context:,}. "
        f"What helps: {', '.join(knobs[:-1])}, or {knobs[-1]}"
    )


def weights_do_not_fit(plan: MemoryPlan) -> str:
    """The message where no sequence fits, since the weights do not."""
    return (
        f"{plan.config.name}: 0 sequences fit into {format_size(plan.memory)}: the weights alone "
        f"need {format_size(plan.weights)} in {plan.settings.compute_dtype}"
    )


def _kv_bytes_per_token(config: ModelConfig, settings: MemorySettings) -> int:
    return config.sharing.kv_bytes_per_token(
        config.kv_heads, config.head_dim, settings.cache_element, settings.cache_scale
    )


def _largest(most: int, memory: int, needed: Callable[[int], int]) -> int:
    """The largest of 1 to `most` that needs at most `memory`, 0 if none; `needed` grows."""
    return bisect.bisect_right(range(1, most + 1), memory, key=needed)
