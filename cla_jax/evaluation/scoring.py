"""Log-likelihoods of continuations under a decoder, in a fixed number of compiled shapes.

Inputs are padded to lengths that double (32, 64, ... up to the model's context), and each length
has one batch size, so that whatever is scored compiles at most a handful of programs.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cla_jax.inference import KVCache, extend, prefill
from cla_jax.inference.cache import check_dtype
from cla_jax.models import Decoder

__all__ = ["Request", "Score", "Scorer", "length_buckets", "rolling_windows", "token_scores"]

SHORTEST = 32
BATCH_TOKENS = 8192  # of a pass by default: at 50 k vocabulary entries, 1.6 GB of logits


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to score.

    Attributes:
        context: token ids before it, at least one; no part of the score.
        continuation: token ids, at least one.
    """

    context: Sequence[int] | np.ndarray
    continuation: Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """What a continuation is worth.

    Attributes:
        log_likelihood: sum over its tokens, in nats.
        greedy: whether each token was the likeliest.
        truncated: whether tokens of the context had to be left out.
    """

    log_likelihood: float
    greedy: bool
    truncated: bool


class Scorer:
    """Scores requests under one decoder.

    Args:
        decoder: with its parameters; `unstacked()` if it is not.
        context: tokens that the model reads at most; by default its sequence length.
        batch_size: sequences of that length in one pass; shorter ones go in larger batches of as
            many tokens. By default passes are of 8,192 tokens.
        through_cache: token by token through a KV cache, as text is generated, rather than by
            prefill. Slow; the scores are the same to rounding.
        cache_dtype: of the cache, whose K/V prefill reads too; by default the decoder's compute
            dtype.

    Attributes:
        context: tokens read at most.
        cache_dtype: of the cache.
        compile_seconds: spent on compiling so far.
        shapes: `(batch, length)` that were compiled.

    Raises:
        ValueError: a context or batch size out of range, an unknown dtype.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        context: int | None = None,
        batch_size: int | None = None,
        through_cache: bool = False,
        cache_dtype: str | None = None,
    ) -> None:
        longest = decoder.config.sequence_length
        self.context = longest if context is None else context
        if not 1 <= self.context <= longest:
            raise ValueError(
                f"context={context}: {decoder.config.name} reads 1 to {longest} tokens"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.cache_dtype = decoder.execution.compute_dtype if cache_dtype is None else cache_dtype
        check_dtype(self.cache_dtype)
        self.decoder, self._through_cache = decoder.unstacked(), through_cache
        self._tokens = BATCH_TOKENS if batch_size is None else batch_size * self.context
        self._compiled: dict[tuple[int, int], Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """`(batch, length)` that were compiled."""
        return tuple(self._compiled)

    def score(
        self, requests: Sequence[Request], on_done: Callable[[int], None] | None = None
    ) -> list[Score]:
        """Scores of requests, in their order.

        A request longer than the context loses the beginning of its own context. A continuation
        that is longer by itself is scored in windows, as a text is (`rolling_windows`).

        Args:
            requests: any number.
            on_done: told how many requests each pass has finished.

        Raises:
            ValueError: a request without context or continuation, a token outside the vocabulary;
                a model that gives no finite likelihoods; a device whose memory does not suffice.
        """
        pieces = [p for n, r in enumerate(requests) for p in self._pieces(n, r)]
        left = np.bincount([p.request for p in pieces], minlength=len(requests))
        sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)

        def take(batch: list[_Piece], found: tuple[jax.Array, jax.Array]) -> None:
            log_likelihoods, likeliest = (np.asarray(array) for array in found)
            finished = 0
            for row, piece in enumerate(batch):
                scored = slice(len(piece.tokens) - 1 - piece.scored, len(piece.tokens) - 1)
                sums[piece.request] += log_likelihoods[row, scored].sum(dtype=np.float64)
                greedy[piece.request] &= likeliest[row, scored].all()
                left[piece.request] -= 1
                finished += left[piece.request] == 0
            if on_done is not None:
                on_done(int(finished))

        running = None
        for length, batch in self._batches(pieces):
            # The next pass is begun before the last one's results are waited for.
            begun = batch, self._run(length, batch)
            if running is not None:
                take(*running)
            running = begun
        if running is not None:
            take(*running)
        if not np.isfinite(sums).all():
            number = int(np.flatnonzero(~np.isfinite(sums))[0])
            raise ValueError(
                f"{self.decoder.config.name} gives request {number + 1} of {len(requests)} the "
                f"log-likelihood {sums[number]}: its parameters are not finite, or its activations "
                f"overflow {self.decoder.execution.compute_dtype}"
            )
        return [
            Score(float(s), bool(g), len(r.context) + len(r.continuation) - 1 > self.context)
            for s, g, r in zip(sums, greedy, requests, strict=True)
        ]

    def _pieces(self, number: int, request: Request) -> "Iterator[_Piece]":
        context, continuation = _ids(request.context), _ids(request.continuation)
        for name, ids in (("context", context), ("continuation", continuation)):
            if not ids.size:
                raise ValueError(f"request {number + 1} has no token of {name}: expected some")
            vocabulary = self.decoder.config.vocab_size
            if ids.min() < 0 or ids.max() >= vocabulary:
                raise ValueError(
                    f"request {number + 1} has token ids from {ids.min()} to {ids.max()}; "
                    f"{self.decoder.config.name} takes 0 to {vocabulary - 1}"
                )
        if len(continuation) > self.context:
            for window in rolling_windows(continuation, int(context[-1]), self.context):
                yield _Piece(number, _joined(window), len(window.continuation))
        else:
            whole = np.concatenate([context, continuation])[-(self.context + 1) :]
            yield _Piece(number, whole, len(continuation))

    def _batches(self, pieces: "list[_Piece]") -> "Iterator[tuple[int, list[_Piece]]]":
        """Batches of one length each, the longest first: memory that does not suffice shows."""
        upper = len(pieces)
        by_length = sorted(pieces, key=lambda p: len(p.tokens))
        lengths = [len(p.tokens) - 1 for p in by_length]
        buckets = length_buckets(self.context)
        for below, length in reversed(list(zip((0, *buckets), buckets, strict=False))):
            lower = int(np.searchsorted(lengths, below, side="right"))
            rows = self._rows(length)
            for start in range(lower, upper, rows):
                yield length, by_length[start : min(start + rows, upper)]
            upper = lower

    def _rows(self, length: int) -> int:
        return max(self._tokens // length, 1)

    def _run(self, length: int, batch: "list[_Piece]") -> tuple[jax.Array, jax.Array]:
        tokens = np.zeros((self._rows(length), length), np.int32)
        targets = np.zeros_like(tokens)
        for row, piece in enumerate(batch):
            tokens[row, : len(piece.tokens) - 1] = piece.tokens[:-1]
            targets[row, : len(piece.tokens) - 1] = piece.tokens[1:]
        try:
            if tokens.shape not in self._compiled:
                started = time.perf_counter()
                program = token_scores.lower(
                    self.decoder, tokens, targets, self.cache_dtype,
                    through_cache=self._through_cache,
                )  # fmt: skip
                self._compiled[tokens.shape] = program.compile()
                self.compile_seconds += time.perf_counter() - started
            return self._compiled[tokens.shape](self.decoder, tokens, targets)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"{self.decoder.config.name}: the device's memory did not suffice for "
                f"{tokens.shape[0]} x {length} tokens: give a smaller batch size than "
                f"{max(self._tokens // self.context, 1)}"
            ) from None


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Tokens of which the last `scored` count for a request; the last one is only predicted."""

    request: int
    tokens: np.ndarray
    scored: int


@functools.partial(jax.jit, static_argnames=("cache_dtype", "through_cache"))
def token_scores(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    cache_dtype: str,
    *,
    through_cache: bool = False,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """How likely `targets` are, each after the tokens up to its position.

    Args:
        decoder: with its parameters.
        tokens: rows from position 0 on; padding on the right changes nothing before it.
        targets: of each position.
        cache_dtype: of the cache.
        through_cache: one token at a time through the cache, instead of prefill.

    Returns:
        Log-likelihoods, float32, and whether the target is the likeliest token.
    """
    batch, length = tokens.shape
    cache = KVCache.create(decoder.config, batch, length, cache_dtype)
    if not through_cache:
        return _of_targets(prefill(decoder, tokens, cache, all_logits=True)[0], targets)

    def step(cache: KVCache, column: tuple[jax.Array, jax.Array]) -> tuple[KVCache, Any]:
        token, target = column
        logits, cache = extend(decoder, token[:, None], cache)
        return cache, _of_targets(logits, target)

    _, (found, likeliest) = jax.lax.scan(step, cache, (tokens.T, targets.T))
    return found.T, likeliest.T


def _of_targets(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    likeliest = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return chosen - jax.nn.logsumexp(logits, axis=-1), likeliest


def length_buckets(context: int) -> tuple[int, ...]:
    """Lengths that inputs are padded to: 32, doubling, up to the context.

    >>> length_buckets(100)
    (32, 64, 100)
    """
    lengths, length = list[int](), SHORTEST
    while length < context:
        lengths.append(length)
        length *= 2
    return (*lengths, context)


def rolling_windows(
    tokens: Sequence[int] | np.ndarray, prefix: int, context: int, stride: int | None = None
) -> list[Request]:
    """A text as requests that score each of its tokens once.

    The first window predicts up to `context` tokens behind `prefix`. Each next one predicts
    `stride` more, behind as many of those before them as fit.

    Args:
        tokens: of the text; none give no window.
        prefix: what the first token follows, such as an end-of-text token.
        context: tokens that the model reads.
        stride: tokens that a window adds, 1 to `context`: fewer give each token more context and
            take longer. Default: `context`, disjoint windows, as lm-evaluation-harness has them.

    Raises:
        ValueError: a stride out of range.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be 1 to the context of {context} tokens")
    ids = _ids(tokens)
    if not ids.size:
        return []
    done = min(context, len(ids))
    windows = [Request(np.array([prefix], np.int32), ids[:done])]
    while done < len(ids):
        end = min(done + stride, len(ids))
        windows.append(Request(ids[end - context - 1 : done], ids[done:end]))
        done = end
    return windows


def _ids(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def _joined(request: Request) -> np.ndarray:
    return np.concatenate([_ids(request.context), _ids(request.continuation)])
