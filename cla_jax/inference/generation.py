"""Continue prompts: ragged batches, prefilled in groups, decoded in blocks on the device."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from cla_jax.configs import ModelConfig
from cla_jax.inference.cache import KVCache, check_dtype
from cla_jax.inference.forward import extend, prefill
from cla_jax.inference.planning import check_fits
from cla_jax.inference.sampling import Sampling, SamplingArrays, row_keys, sample, step_keys
from cla_jax.inference.stopping import Decode, RowText, check_stop_strings
from cla_jax.models import Decoder, UnstackedDecoder
from cla_jax.models.sharding import shards

_NO_TOKEN = -1
_SHORTEST_BUCKET = 16

type Finished = Literal["stop_token", "stop_string", "length"]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How prompts are continued.

    Attributes:
        max_new_tokens: that each row gets at most.
        sampling: how a token is chosen.
        stop_tokens: ids that end their row; they are not returned.
        stop_strings: texts that end their row; the text ends before them.
        cache_dtype: of the K/V cache: `bfloat16`, `float16`, `float32`, `int8` or
            `float8_e4m3fn`; None is the decoder's compute dtype.
        prefill_tokens: tokens, padding included, that one prefill call takes: a larger one
            prefills faster and needs more memory. On a mesh that splits the rows, so many for each
            part of them.
        room: tokens of a row, prompt and new ones, to make room for at least: with that of the
            longest of many prompts, batch after batch is of one shape and compiles once.
        block: decoding steps on the device between two looks by the host, which streams what there
            is and finds stop strings.

    Raises:
        ValueError: a count out of range, a stop string that is empty.
    """

    max_new_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    cache_dtype: str | None = None
    prefill_tokens: int = 8192
    block: int = 16
    room: int = 0

    def __post_init__(self) -> None:
        check_stop_strings(self.stop_strings)
        if self.cache_dtype is not None:
            check_dtype(self.cache_dtype)
        for field, least in (
            ("max_new_tokens", 0), ("prefill_tokens", 1), ("block", 1), ("room", 0)
        ):  # fmt: skip
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)} must be at least {least}")
        if not all(isinstance(stop, int) and stop >= 0 for stop in self.stop_tokens):
            raise ValueError(f"stop_tokens={self.stop_tokens!r}: expected token ids, 0 or more")


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a prompt was continued with.

    Attributes:
        tokens: the new ids, without the token or the tokens of the text that ended them.
        finished: what ended them; `length` is `max_new_tokens`.
        text: of the new tokens; None without a `decode`.
    """

    tokens: tuple[int, ...]
    finished: Finished
    text: str | None


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    config: GenerateConfig = GenerateConfig(),
    *,
    decode: Decode | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    first_row: int = 0,
) -> list[Continuation]:
    """Continue a batch of prompts of any lengths.

    Each row has its own random stream, from `sampling.seed` and its number: its sample does not
    depend on its neighbours. Lengths are rounded up to a few sizes, so that prompts of other
    lengths compile nothing anew.

    Args:
        decoder: with its parameters; `Decoder.unstacked()`, made once, saves doing it here.
        prompts: token ids, at least one each.
        config: how.
        decode: tokens to text, as a tokenizer's; needed for texts and stop strings.
        on_tokens: called with a row's number and its new tokens as they come, in blocks, perhaps
            with tokens of a stop string at the end.
        on_text: called with a row's number and its new text as it comes, which holds nothing that
            turns out to belong to a stop string.
        first_row: number of the first prompt, where a long list is continued batch by batch.

    Raises:
        ValueError: no prompts, or one that `check_prompts` refuses; stop strings or `on_text`
            without `decode`; a batch that does not fit into the device's memory (names the batch
            and the context that do).
    """
    ids = check_prompts(decoder.config, prompts, config.max_new_tokens)
    if not 0 <= first_row < 2**31:
        raise ValueError(f"first_row={first_row} must be at least 0 and below 2**31")
    if decode is None and (config.stop_strings or on_text):
        what = "stop strings" if config.stop_strings else "on_text"
        raise ValueError(f"{what} need texts: give decode, as in decode=tokenizer.decode")
    rows = [_Row(prompt, config, decode) for prompt in ids]
    # A mesh that splits the rows divides them: the last parts are filled up with finished ones.
    filling = -len(ids) % shards("cache_batch")
    ids += [ids[0][:1]] * filling
    fillers = [_Row(prompt, config, None) for prompt in ids[len(rows) :]]
    for row in fillers:
        row.finished = "length"
    if config.max_new_tokens:
        length = _cache_length(decoder.config, ids, config)
        with _memory_advice(decoder.config, len(ids), length):
            for number, new in _decoded(decoder, ids, config, rows + fillers, length, first_row):
                text = rows[number].add(new)
                if on_tokens and new:
                    on_tokens(number, new)
                if on_text and text:
                    on_text(number, text)
    return [row.continuation() for row in rows]


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int
) -> list[np.ndarray]:
    """The prompts as int32 ids, if `generate` will take them: for callers with long work before.

    Raises:
        ValueError: there is none; one is empty, is no row of token ids, has an id outside the
            vocabulary, or is, with `max_new_tokens`, longer than the model's sequence length.
    """
    if not len(prompts):
        raise ValueError("no prompts: give at least one")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    checked = [np.asarray(prompt) for prompt in prompts]
    for number, ids in enumerate(checked, start=1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if not ids.size:
            raise ValueError(f"{which} is empty: give at least one token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{which} is {ids.dtype} of shape {ids.shape}: expected a row of token ids, as in "
                "[[1, 2, 3]] for one prompt"
            )
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ValueError(
                f"{which} has token ids from {ids.min()} to {ids.max()}; {config.name} takes 0 to "
                f"{config.vocab_size - 1}"
            )
        if ids.size > config.sequence_length:
            raise ValueError(
                f"{which} has {ids.size} tokens; {config.name}'s sequence length is "
                f"{config.sequence_length}"
            )
        if ids.size + max_new_tokens > config.sequence_length:
            raise ValueError(
                f"{which}: {ids.size} tokens and {max_new_tokens} new ones exceed "
                f"{config.name}'s sequence length of {config.sequence_length}; at most "
                f"{config.sequence_length - ids.size} can be added to this prompt"
            )
    return [ids.astype(np.int32) for ids in checked]


class _Row:
    """What the host keeps of a row."""

    def __init__(self, prompt: np.ndarray, config: GenerateConfig, decode: Decode | None) -> None:
        self._config = config
        self._tokens: list[int] = []
        self._text = RowText(decode, config.stop_strings, prompt.tolist()) if decode else None
        self.finished: Finished | None = None

    def add(self, new: list[int]) -> str:
        """Take new tokens, and give the text that is certain."""
        stops = [i for i, token in enumerate(new) if token in self._config.stop_tokens]
        if stops:
            del new[stops[0] :]
            self.finished = "stop_token"
        self._tokens += new
        if self._text is None:
            return ""
        if self._text.add(new):
            self.finished = "stop_string"
        elif self.finished or len(self._tokens) == self._config.max_new_tokens:
            self._text.finish()
        return self._text.take()

    def continuation(self) -> Continuation:
        if self._text is None:
            return Continuation(tuple(self._tokens), self.finished or "length", None)
        self._text.finish()
        tokens = tuple(self._text.tokens)
        return Continuation(tokens, self.finished or "length", self._text.text)


def _decoded(
    decoder: Decoder,
    prompts: list[np.ndarray],
    config: GenerateConfig,
    rows: list[_Row],
    length: int,
    first_row: int,
) -> Iterator[tuple[int, list[int]]]:
    """New tokens of the rows, block by block, until every row is finished."""
    decoder = decoder.unstacked()
    cache_dtype = config.cache_dtype or decoder.execution.compute_dtype
    check_fits(
        decoder.config,
        len(prompts),
        length,
        cache_dtype=cache_dtype,
        prefill_tokens=config.prefill_tokens,
        memory_bytes=_free_memory(decoder),
        compute_dtype=decoder.execution.compute_dtype,
        sampling=config.sampling.temperature > 0,
    )
    # Rows of like lengths are prefilled together. `order[i]` is the prompt in row i of the cache.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    cache = _create(decoder.config, len(order), length, cache_dtype)
    keys = row_keys(config.sampling.seed, [first_row + i for i in order])
    sampling = config.sampling.arrays()
    stops = jnp.asarray(config.stop_tokens or (_NO_TOKEN,), jnp.int32)

    logits, cache = _prefilled(decoder, [prompts[i] for i in order], cache, config.prefill_tokens)
    token, done = _first_tokens(logits, cache.lengths, keys, sampling, stops)
    del logits
    block = np.asarray(token)[:, None]
    left = config.max_new_tokens - 1
    while True:
        for row, number in enumerate(order):
            new = block[row]
            if rows[number].finished is None:
                yield number, new[new != _NO_TOKEN].tolist()
        over = np.array([rows[i].finished is not None for i in order])
        if left == 0 or over.all():
            return
        steps = min(config.block, left)
        block, token, done, cache = decode_block(
            decoder, cache, token, done | over, keys, sampling, stops, jnp.int32(steps),
            size=config.block,
        )  # fmt: skip
        block = np.asarray(block)
        left -= steps


def _prefilled(
    decoder: UnstackedDecoder, prompts: list[np.ndarray], cache: KVCache, budget: int
) -> tuple[jax.Array, KVCache]:
    """Logits `[B, V]` of each prompt's last token, and the cache that holds the prompts."""
    parts: list[jax.Array] = []
    at = 0
    if (split := shards("cache_batch")) > 1:  # all rows together, so that none leaves its device
        width = min(bucket(len(prompts[0])), cache.length)
        chunk = min(width, max(budget * split // len(prompts), 1))
        return _prefill_group(decoder, prompts, cache, None, chunk)
    while at < len(prompts):
        width = min(bucket(len(prompts[at])), cache.length)  # the longest of those that are left
        group = prompts[at : at + max(budget // width, 1)]
        logits, cache = _prefill_group(decoder, group, cache, at, min(width, budget))
        parts.append(logits)
        at += len(group)
    return jnp.concatenate(parts), cache


def _prefill_group(
    decoder: UnstackedDecoder,
    prompts: list[np.ndarray],
    cache: KVCache,
    first: int | None,
    chunk: int,
) -> tuple[jax.Array, KVCache]:
    lengths = np.array([len(prompt) for prompt in prompts])
    # None: from the first row on, known to the compiler.
    place = {} if first is None else {"first_row": np.int32(first)}
    logits = None
    for start in range(0, int(lengths.max()), chunk):
        widths = np.clip(lengths - start, 0, chunk).astype(np.int32)
        tokens = np.zeros((len(prompts), chunk), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : widths[row]] = prompt[start : start + chunk]
        call = _prefill if start == 0 else _extend
        new, cache = call(decoder, tokens, cache, widths, **place)
        logits = new if logits is None else jnp.where((widths > 0)[:, None], new, logits)
    assert logits is not None
    return logits, cache


# What is compiled, once for each (batch, cache length, bucket).
_create = jax.jit(KVCache.create, static_argnums=(0, 1, 2, 3))
_prefill = jax.jit(prefill, donate_argnums=2)
_extend = jax.jit(extend, donate_argnums=2)


@jax.jit
def _first_tokens(
    logits: jax.Array,
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    sampling: SamplingArrays,
    stops: Int[Array, "n"],
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    token = sample(logits, step_keys(keys, lengths), sampling)
    return token, jnp.isin(token, stops)


@functools.partial(jax.jit, donate_argnums=1, static_argnames="size")
def decode_block(
    decoder: UnstackedDecoder,
    cache: KVCache,
    token: Int[Array, "B"],
    done: Bool[Array, "B"],
    keys: Key[Array, "B"],
    sampling: SamplingArrays,
    stops: Int[Array, "n"],
    steps: Int[Array, ""],
    *,
    size: int,
) -> tuple[Int[Array, "B size"], Int[Array, "B"], Bool[Array, "B"], KVCache]:
    """Up to `steps` decoding steps on the device, fewer when every row is done.

    Args:
        decoder: to decode with.
        cache: of the rows so far; donated.
        token: each row's newest token, not yet in the cache.
        done: rows that are finished: they get no more tokens.
        keys: of the rows.
        sampling: how a token is chosen.
        stops: ids that end their row.
        steps: how many, at most `size`.
        size: of the result, so that fewer steps compile nothing anew.

    Returns:
        The new tokens, -1 behind each row's end; the last of them; the rows that are done; the
        cache.
    """

    def going(state: tuple[Any, ...]) -> jax.Array:
        step, _, done, _, _ = state
        return (step < steps) & ~done.all()

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, out, cache = state
        logits, cache = extend(decoder, token[:, None], cache, (~done).astype(jnp.int32))
        with jax.named_scope("sample"):
            token = sample(logits, step_keys(keys, cache.lengths), sampling)
        out = out.at[:, step].set(jnp.where(done, _NO_TOKEN, token))
        return step + 1, token, done | jnp.isin(token, stops), out, cache

    out = jnp.full((token.shape[0], size), _NO_TOKEN, jnp.int32)
    _, token, done, out, cache = jax.lax.while_loop(
        going, body, (jnp.int32(0), token, done, out, cache)
    )
    return out, token, done, cache


def bucket(length: int) -> int:
    """The size that a length is rounded up to: four sizes to an octave, so at most 25 % more."""
    if length <= _SHORTEST_BUCKET:
        return _SHORTEST_BUCKET
    step = 1 << max((length - 1).bit_length() - 3, 0)
    return -(-length // step) * step


def _cache_length(config: ModelConfig, prompts: list[np.ndarray], options: GenerateConfig) -> int:
    needed = max(max(prompt.size for prompt in prompts) + options.max_new_tokens, options.room)
    return min(bucket(needed), config.sequence_length)


def _free_memory(decoder: UnstackedDecoder) -> int | None:
    """Bytes for these weights, a cache and workspace, on all devices; None where one is silent."""
    free = 0
    for device in jax.tree.leaves(decoder)[0].devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        free += stats["bytes_limit"] - stats["bytes_in_use"]
    return free + sum(array.nbytes for array in jax.tree.leaves(decoder))


@contextlib.contextmanager
def _memory_advice(config: ModelConfig, batch: int, length: int) -> Iterator[None]:
    """Says what helps where the device's memory did not suffice after all."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{config.name}: the device's memory did not suffice for batch {batch} at context "
            f"{length}. What helps: a smaller batch, a shorter context, a cache dtype of fewer "
            "bits, fewer prefill_tokens, or a model that shares K/V over more layers (`cla-jax "
            f"plan` says what fits). {str(error).splitlines()[0][:200]}"
        ) from None
