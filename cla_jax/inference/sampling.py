"""The next token from logits: greedy, or drawn with temperature, top-k and top-p."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Sampling", "SamplingArrays", "row_keys", "sample", "step_keys"]

_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The order is Hugging Face's: logits are divided by the temperature, then all but the `top_k`
    likeliest are dropped, then, of what is left and renormalised, the tail beyond `top_p`.

    Attributes:
        temperature: 0 is greedy: the likeliest token, the lowest id among equals.
        top_k: how many of the likeliest tokens may be drawn; 0 is all. Tokens as likely as the last
            of them stay too.
        top_p: the fewest of the likeliest tokens that hold this share of the probability may be
            drawn (nucleus sampling, Holtzman et al. 2020); 1 is all. Tokens as likely as the last
            of them stay too.
        seed: of the random streams; every row has its own.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that a NaN is refused too.
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or a positive number; the "
                "nearest is 0"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must be above 0 and at most 1; the nearest is "
                f"{'1, which keeps every token' if self.top_p > 1 else 'a small positive number'}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**32")

    def arrays(self) -> "SamplingArrays":
        """What `sample` takes."""
        temperature = min(max(self.temperature, float(_FLOAT32.tiny)), float(_FLOAT32.max))
        # Numpy, not JAX: numbers of the host until a jitted function takes them.
        return SamplingArrays(
            np.float32(temperature),
            np.int32(min(self.top_k, 2**31 - 1)),
            # Not rounded to 0, which keeps nothing.
            np.float32(max(self.top_p, float(_FLOAT32.tiny))),
            greedy=self.temperature == 0,
            truncates=self.top_k > 0 or self.top_p < 1,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` for a jitted function: other numbers compile nothing anew.

    Attributes:
        temperature: float32 scalar, positive; unused when greedy.
        top_k: int32 scalar.
        top_p: float32 scalar.
        greedy: static; sampling is an argmax.
        truncates: static; false when neither top-k nor top-p drops a token, which saves the sort.
    """

    temperature: Any  # a scalar; JAX rebuilds the dataclass with tracers and placeholders
    top_k: Any
    top_p: Any
    greedy: bool = dataclasses.field(metadata={"static": True})
    truncates: bool = dataclasses.field(metadata={"static": True})


def row_keys(seed: int, rows: Sequence[int] | np.ndarray | Int[Array, "B"]) -> Key[Array, "B"]:
    """A random key for each row, whatever rows stand beside it.

    Args:
        seed: of them all.
        rows: each row's number, such as `range(B)`.
    """
    ids = jnp.asarray(np.asarray(rows), jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), ids)


def step_keys(keys: Key[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """Each row's key for one token, from the row's key and the token's position."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: SamplingArrays
) -> Int[Array, "B"]:
    """A token for each row, int32; row b depends on its own logits and key alone.

    Args:
        logits: float32; -inf excludes a token.
        keys: of this step (`step_keys`); unused when greedy.
        sampling: `Sampling(...).arrays()`.
    """
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest becomes 0, so that no temperature, however low, makes an infinity of it.
    scaled = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    if sampling.truncates:
        scaled = jnp.where(_kept(scaled, sampling.top_k, sampling.top_p), scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _kept(logits: Float[Array, "B V"], top_k: Any, top_p: Any) -> Bool[Array, "B V"]:
    """Which tokens top-k and then top-p leave.

    Both are thresholds on the logits, taken from one sort, so equal logits are kept or dropped
    together and the order in which a sort leaves them does not matter.
    """
    V = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    last = jnp.where(top_k == 0, V, jnp.minimum(top_k, V)) - 1
    lowest = jnp.take_along_axis(ordered, jnp.full((logits.shape[0], 1), last), axis=-1)
    left = jnp.where(ordered >= lowest, ordered, -jnp.inf)
    share = jax.nn.softmax(left, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    # A sum of many shares may round to 1 before its end: top_p = 1 must drop nothing all the same.
    nucleus = ((before < top_p) | (top_p >= 1)) & (left > -jnp.inf)
    lowest = jnp.where(nucleus, left, jnp.inf).min(-1, keepdims=True)
    return logits >= lowest
