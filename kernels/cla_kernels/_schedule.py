"""Who reads which K/V: equal stretches of all rows' valid blocks, from their lengths alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cla_kernels._tuning import Tuning

_MOST_IDLE = 16  # one in so many units, where stretches end as rows do


class Schedule(NamedTuple):
    """Who reads what, from the rows' lengths alone: int32 arrays.

    All `(row, KV head, block)` are in one order; a unit reads `each` of them. A row and KV head may
    have places in the order behind its blocks, so that the next begins with a stretch. Rows of
    `starts` and `lengths` are the batch's; those of `units` are a unit's first: its batch row, that
    row's start and end in the order, and length. What several units read is in `joins`: the index
    `row * K + head`, its first unit and its last; the same one where there is nothing to join.
    """

    lengths: jax.Array  # [B]
    starts: jax.Array  # [B + 1]
    units: jax.Array  # [units, 4]
    each: jax.Array  # [1]
    joins: jax.Array  # [min(B * K, units), 3]


def schedule(lengths: jax.Array, kv_heads: int, size: int, tuning: Tuning) -> Schedule:
    """Cut the valid blocks of all rows into equal stretches.

    Where rows are equally long and it leaves few units idle, a stretch is a whole number of a row
    and KV head's, or these are cut alike: fewer partial results, and units that read a row's KV
    heads side by side stay side by side.
    """
    units = tuning.units
    lengths = lengths.astype(jnp.int32)
    blocks = stored_blocks(lengths, size, tuning.block)
    row_heads = lengths.shape[0] * kv_heads
    total = jnp.sum(blocks, dtype=jnp.int32) * kv_heads
    each = (total + (units - 1)) // units
    longest = jnp.max(blocks)
    if row_heads >= units:
        alike, padded = longest * -(-row_heads // units), longest
    else:
        alike = (longest + (units // row_heads - 1)) // (units // row_heads)
        padded = alike * ((longest + alike - 1) // alike)
    snap = (longest == jnp.min(blocks)) & (alike * _MOST_IDLE <= each * (_MOST_IDLE + 1))
    each = jnp.where(snap, alike, each)
    ends = jnp.cumsum(jnp.where(snap, padded, blocks) * kv_heads, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])

    def row_at(place: jax.Array) -> jax.Array:
        row = jnp.sum(place[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        return jnp.minimum(row, lengths.shape[0] - 1)

    unit = jnp.arange(units, dtype=jnp.int32)
    row = row_at(unit * each)
    first_rows = jnp.stack([row, starts[row], starts[row + 1], lengths[row]], axis=1)

    if row_heads <= units:
        index = jnp.arange(row_heads, dtype=jnp.int32)
        row, head = index // kv_heads, index % kv_heads
    else:  # no more are split than there are units: that in which a unit ends
        end = (unit + 1) * each - 1
        row = row_at(end)
        head = (end - starts[row]) // ((ends[row] - starts[row]) // kv_heads)
    begin = starts[row] + head * ((ends[row] - starts[row]) // kv_heads)
    first, last = begin // each, (begin + blocks[row] - 1) // each
    if row_heads > units:  # and that only once
        last = jnp.where((first == unit) & (end < ends[-1]), last, first)
    joins = jnp.stack([row * kv_heads + head, first, last], axis=1)
    return Schedule(lengths, starts, first_rows, each[None], joins)


def stored_blocks(lengths: jax.Array, size: int, block: int) -> jax.Array:
    """How many blocks hold so many tokens; one of no tokens, in which nothing is visible."""
    return jnp.maximum((jnp.minimum(lengths, size) + (block - 1)) // block, 1)
