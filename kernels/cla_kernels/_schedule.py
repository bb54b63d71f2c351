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
    lengths = lengths.astype(jnp.int32)
    blocks = stored_blocks(lengths, size, tuning.block)
    each, places = _cut(blocks, kv_heads, tuning.units)
    ends = jnp.cumsum(places * kv_heads, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    row = _row_at(jnp.arange(tuning.units, dtype=jnp.int32) * each, ends)
    units = jnp.stack([row, starts[row], starts[row + 1], lengths[row]], axis=1)
    joins = _joins(blocks, places, starts, each, kv_heads, tuning.units)
    return Schedule(lengths, starts, units, each[None], joins)


def _cut(blocks: jax.Array, kv_heads: int, units: int) -> tuple[jax.Array, jax.Array]:
    """Places of a unit, and of each batch row and KV head."""
    row_heads = blocks.shape[0] * kv_heads
    each = (jnp.sum(blocks, dtype=jnp.int32) * kv_heads + (units - 1)) // units
    longest = jnp.max(blocks)
    if row_heads >= units:
        whole, places = longest * -(-row_heads // units), longest
    else:
        parts = units // row_heads
        whole = (longest + (parts - 1)) // parts
        places = (longest + (whole - 1)) // whole * whole
    snap = (longest == jnp.min(blocks)) & (whole * _MOST_IDLE <= each * (_MOST_IDLE + 1))
    return jnp.where(snap, whole, each), jnp.where(snap, places, blocks)


def _row_at(places: jax.Array, ends: jax.Array) -> jax.Array:
    row = jnp.sum(places[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    return jnp.minimum(row, ends.shape[0] - 1)


def _joins(
    blocks: jax.Array, places: jax.Array, starts: jax.Array, each: jax.Array, kv_heads: int,
    units: int,
) -> jax.Array:  # fmt: skip
    def readers(row: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        begin = starts[row] + head * places[row]
        return begin // each, (begin + blocks[row] - 1) // each

    row_heads = blocks.shape[0] * kv_heads
    if row_heads <= units:
        row, head = jnp.divmod(jnp.arange(row_heads, dtype=jnp.int32), kv_heads)
        first, last = readers(row, head)
    else:
        # Whatever is split is what a unit ends in, and the first that does joins it.
        unit = jnp.arange(units, dtype=jnp.int32)
        end = (unit + 1) * each - 1
        row = _row_at(end, starts[1:])
        head = (end - starts[row]) // places[row]
        first, last = readers(row, head)
        last = jnp.where((first == unit) & (end < starts[-1]), last, first)
    return jnp.stack([row * kv_heads + head, first, last], axis=1)


def stored_blocks(lengths: jax.Array, size: int, block: int) -> jax.Array:
    """How many blocks hold so many tokens; one of no tokens, in which nothing is visible."""
    return jnp.maximum((jnp.minimum(lengths, size) + (block - 1)) // block, 1)
