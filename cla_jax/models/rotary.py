"""Rotary position embeddings (Su et al. 2021), whole or partial, in the half-split layout.

The two halves of the rotating dimensions form the pairs, as in Llama and GPT-NeoX checkpoints.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cla_jax.configs import RopeScaling


class Rotary(NamedTuple):
    """Cosines and sines of every position's angles, float32 `[B or 1, T, R / 2]`."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary(
    positions: Int[Array, "B T"], dim: int, theta: float, scaling: RopeScaling | None
) -> Rotary:
    """The angles of `positions` for `dim` rotating dimensions (even, may be 0).

    Every setting is asked for, so that no caller can leave the scaling out unawares.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / max(dim, 1))
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def _stretched(frequencies: Float[Array, " half"], scaling: RopeScaling) -> Float[Array, " half"]:
    """Frequencies (radians per token) as Llama 3.1 stretches them: see `RopeScaling`."""
    turns = frequencies * (scaling.original_max_position_embeddings / (2 * math.pi))
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def rotate(x: Float[Array, "B T N H"], angles: Rotary) -> Float[Array, "B T N H"]:
    """Rotate the leading dimensions of each head; the others pass. Keeps the dtype of `x`."""
    half = angles.cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = angles.cos[:, :, None, :], angles.sin[:, :, None, :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate((*(r.astype(x.dtype) for r in rotated), rest), axis=-1)


def positions_in_documents(documents: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 where the document id changes along a row."""
    index = jnp.arange(documents.shape[1], dtype=jnp.int32)[None, :]
    starts = documents != jnp.roll(documents, 1, axis=1)
    starts = starts.at[:, 0].set(True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
