"""Who reads which K/V: equal stretches of all rows' valid blocks, from their lengths alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cla_kernels._tuning import Tuning

_MOST_IDLE = 16  # one in so many parts, where stretches end as rows do


class Schedule(NamedTuple):
    """Who reads what of a KV head, from the rows' lengths alone: int32 arrays.

    All `(row, block)` are in one order; each of `P` parts reads `each` of them. A row may have
    places in the order behind its blocks, so that the next begins with a part. Rows of `starts` and
    `lengths` are the batch's; those of `parts` are a part's first: its batch row, that row's start
    and end in the order, and length. What several parts read is in `joins`: the row, its first part
    and its last (the same one where there is nothing to join), and whether that first part has read
    of other rows before.

    Every KV head is cut alike, so that those of one part read side by side what lies side by side
    in memory. (Cut in the order of `(row, KV head, block)`, 64 rows of 8 KV heads took 2 % more.)
    """

    lengths: jax.Array  # [B]
    starts: jax.Array  # [B + 1]
    parts: jax.Array  # [P, 4]
    each: jax.Array  # [1]
    joins: jax.Array  # [min(B, P), 4]


def schedule(lengths: jax.Array, parts: int, size: int, tuning: Tuning) -> Schedule:
    """Cut the valid blocks of all rows into equal stretches.

    Where rows are equally long and it leaves few parts idle, a stretch is a whole number of rows,
    or rows are cut alike: fewer partial results. With `tuning.whole` it always is a number of rows.
    """
    lengths = lengths.astype(jnp.int32)
    blocks = stored_blocks(lengths, size, tuning.block)
    if tuning.whole:
        most = -(-size // tuning.block)
        each, places = jnp.int32(most * -(-len(lengths) // parts)), jnp.full_like(blocks, most)
    else:
        each, places = _cut(blocks, parts)
    ends = jnp.cumsum(places, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    row = _row_at(jnp.arange(parts, dtype=jnp.int32) * each, ends)
    firsts = jnp.stack([row, starts[row], starts[row + 1], lengths[row]], axis=1)
    return Schedule(lengths, starts, firsts, each[None], _joins(blocks, starts, each, parts))


def _cut(blocks: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Places of a part, and of each row."""
    rows = blocks.shape[0]
    each = (jnp.sum(blocks, dtype=jnp.int32) + (parts - 1)) // parts
    longest = jnp.max(blocks)
    if rows >= parts:
        whole, places = longest * -(-rows // parts), longest
    else:
        cuts = parts // rows
        whole = (longest + (cuts - 1)) // cuts
        places = (longest + (whole - 1)) // whole * whole
    snap = (longest == jnp.min(blocks)) & (whole * _MOST_IDLE <= each * (_MOST_IDLE + 1))
    return jnp.where(snap, whole, each), jnp.where(snap, places, blocks)


def _row_at(places: jax.Array, ends: jax.Array) -> jax.Array:
    row = jnp.sum(places[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    return jnp.minimum(row, ends.shape[0] - 1)


def _joins(blocks: jax.Array, starts: jax.Array, each: jax.Array, parts: int) -> jax.Array:
    def readers(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return starts[row] // each, (starts[row] + blocks[row] - 1) // each

    rows = blocks.shape[0]
    if rows <= parts:
        row = jnp.arange(rows, dtype=jnp.int32)
        first, last = readers(row)
    else:
        # Whatever is split is what a part ends in, and the first that does joins it.
        part = jnp.arange(parts, dtype=jnp.int32)
        end = (part + 1) * each - 1
        row = _row_at(end, starts[1:])
        first, last = readers(row)
        last = jnp.where((first == part) & (end < starts[-1]), last, first)
    behind = (starts[row] > first * each).astype(jnp.int32)
    return jnp.stack([row, first, last, behind], axis=1)


def stored_blocks(lengths: jax.Array, size: int, block: int) -> jax.Array:
    """How many blocks hold so many tokens; one of no tokens, in which nothing is visible."""
    return jnp.maximum((jnp.minimum(lengths, size) + (block - 1)) // block, 1)
