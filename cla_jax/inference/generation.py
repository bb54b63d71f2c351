"""Greedy continuation of a prompt, by whole forward passes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cla_jax.configs import ModelConfig
from cla_jax.models import Decoder


def greedy(
    decoder: Decoder, prompt: Sequence[int] | np.ndarray, new_tokens: int, end_of_text: int
) -> list[int]:
    """The likeliest next token, again and again.

    Args:
        decoder: with its parameters.
        prompt: token ids, at least one.
        new_tokens: how many to add at most.
        end_of_text: the id after which generation stops; it is not returned.

    Returns:
        The added tokens.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a negative `new_tokens`, or more
            tokens in all than the model's sequence length.
    """
    ids = check_prompt(decoder.config, prompt, new_tokens)
    buffer = np.zeros((1, ids.size + new_tokens), np.int32)
    buffer[0, : ids.size] = ids
    filled = np.asarray(_fill(decoder, jnp.asarray(buffer), jnp.int32(ids.size)))[0, ids.size :]
    stops = np.flatnonzero(filled == end_of_text)
    return filled[: stops[0] if stops.size else None].tolist()


def check_prompt(
    config: ModelConfig, prompt: Sequence[int] | np.ndarray, new_tokens: int
) -> np.ndarray:
    """The prompt as int32 ids `[T]`, if `greedy` will take it: for callers with long work before.

    Raises:
        ValueError: as `greedy`.
    """
    ids = np.asarray(prompt, np.int32)
    if not ids.size:
        raise ValueError("the prompt is empty: give at least one token")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"the prompt has token ids from {ids.min()} to {ids.max()}; {config.name} takes 0 to "
            f"{config.vocab_size - 1}"
        )
    if new_tokens < 0:
        raise ValueError(f"new_tokens={new_tokens} must be at least 0")
    if ids.size + new_tokens > config.sequence_length:
        raise ValueError(
            f"{ids.size} prompt tokens and {new_tokens} new ones exceed {config.name}'s sequence "
            f"length of {config.sequence_length}; at most "
            f"{max(config.sequence_length - ids.size, 0)} can be added to this prompt"
        )
    return ids


@functools.partial(jax.jit, donate_argnums=1)
def _fill(decoder: Decoder, tokens: Int[Array, "1 T"], length: Int[Array, ""]) -> Int[Array, "1 T"]:
    def add(position: jax.Array, tokens: jax.Array) -> jax.Array:
        last = jax.lax.dynamic_slice_in_dim(decoder.hidden(tokens), position - 1, 1, axis=1)
        token = decoder.unembed(last).argmax(-1).astype(jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(tokens, token, position, axis=1)

    return jax.lax.fori_loop(length, tokens.shape[1], add, tokens)
