"""Who reads which K/V: equal stretches of all rows' valid blocks, from their lengths alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cla_kernels._tuning import Tuning


class Schedule(NamedTuple):
    """Who reads what, from the rows' lengths alone: int32 arrays.

    All `(row, KV head, block)` are in one order; a unit reads `each` of them. Rows of `starts` and
    `lengths` are the batch's; those of `units` are a unit's first: its batch row, that row's start
    and end in the order, and length.
    """

    lengths: jax.Array  # [B]
    starts: jax.Array  # [B + 1]
    units: jax.Array  # [units, 4]
    each: jax.Array  # [1]


def schedule(lengths: jax.Array, kv_heads: int, size: int, tuning: Tuning) -> Schedule:
    """Cut the valid blocks of all rows into equal stretches."""
    lengths = lengths.astype(jnp.int32)
    # A row of no tokens has a block too, in which nothing is visible.
    blocks = jnp.maximum((jnp.minimum(lengths, size) + (tuning.block - 1)) // tuning.block, 1)
    ends = jnp.cumsum(blocks * kv_heads, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    each = (ends[-1] + (tuning.units - 1)) // tuning.units
    first = jnp.arange(tuning.units, dtype=jnp.int32) * each
    row = jnp.sum(first[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, lengths.shape[0] - 1)
    units = jnp.stack([row, starts[row], starts[row + 1], lengths[row]], axis=1)
    return Schedule(lengths, starts, units, each[None])
