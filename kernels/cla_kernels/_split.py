"""Rows that several units read: which these are, and who joins them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cla_kernels._schedule import stored_blocks
from cla_kernels._stretch import Walk

_MOST_JOINERS = 64  # of a row, of all its KV heads


def most_joiners(kv_heads: int) -> int:
    """Units of a KV head that may join one row."""
    return max(_MOST_JOINERS // kv_heads, 1)


def may_wait(multiprocessors: int, kv_heads: int) -> bool:
    """Whether units can wait for one another on such a device (a slice of one, perhaps).

    Units begin in the order of their numbers, and those that do not wait make room for others: all
    goes on where there is more room than a row has joiners.
    """
    return multiprocessors > most_joiners(kv_heads) * kv_heads


class Split(NamedTuple):
    """A row that several parts read, as one of them sees it: int32 scalars.

    Its first parts join it, each a share of the results.
    """

    row: jax.Array  # of the batch
    first: jax.Array  # part that reads of it
    last: jax.Array  # part that does
    behind: jax.Array  # 1 if that first part has read of another row before
    exists: jax.Array  # bool: there is one; else the others mean nothing

    @property
    def parts(self) -> jax.Array:
        """How many read of it."""
        return self.last - self.first + 1

    def joiners(self, kv_heads: int) -> jax.Array:
        """How many of a KV head's units join the row: its first."""
        return jnp.minimum(self.parts, most_joiners(kv_heads))


def splits(walk: Walk) -> tuple[Split, Split]:
    """The row that began in an earlier part, and the one that begins in this and goes on."""
    plan, part, parts = walk.plan, walk.part, walk.plan.parts.shape[0]
    each, busy = plan.each[0], walk.begin < walk.end

    def split(of: Any) -> tuple[jax.Array, Split]:
        row, start, _, length = (plan.parts[of, i] for i in range(4))
        first = lax.div(start, each)
        last = lax.div(start + stored_blocks(length, walk.size, walk.block) - 1, each)
        exists = busy & (first <= part) & (part <= last) & (first < last)
        return start, Split(row, first, last, (start > first * each).astype(jnp.int32), exists)

    start, began = split(part)
    began = began._replace(exists=began.exists & (start < walk.begin))
    # A row that goes on is the first of the next part; if there is no other, none goes on.
    start, begins = split(jnp.minimum(part + 1, parts - 1))
    return began, begins._replace(exists=begins.exists & (start >= walk.begin))
