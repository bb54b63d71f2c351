"""Rows that several units read: who joins them, and who tells whom that its part is there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cla_kernels._schedule import stored_blocks
from cla_kernels._stretch import Walk

_MOST_JOINERS = 32  # of a row, of all its KV heads


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

    Its first parts join it, each some of the rows of queries; all tell each of these.
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


class Told(NamedTuple):
    """The flags that a part raises for a row's joiners: int32 scalars."""

    first: jax.Array  # that of the first joiner
    others: jax.Array  # where those of the others would begin, `step` apart, if it were one of them
    step: int


class Meeting(NamedTuple):
    """Where flags lie: of each part of each KV head, those by which it hears of two rows' parts.

    The first `parts` are of a row that began in an earlier part, the others of one that began in
    this.
    """

    parts: int
    kv_heads: int

    @property
    def flags(self) -> int:
        """In all."""
        return 2 * self.parts * self.parts * self.kv_heads

    def joiners(self, split: Split) -> jax.Array:
        """How many of a KV head's units join the row: its first."""
        return jnp.minimum(split.parts, most_joiners(self.kv_heads))

    def told(self, split: Split, part: jax.Array, head: jax.Array) -> Told:
        """What `part` raises for the joiners."""
        others = 2 * self.parts * (split.first * self.kv_heads + head) + part - split.first
        return Told(others + self.parts, others, 2 * self.parts * self.kv_heads)

    def heard(self, split: Split, part: jax.Array, head: jax.Array) -> jax.Array:
        """The first of `split.parts` flags in a row that a joiner waits for."""
        own = (part == split.first).astype(jnp.int32)
        return self.parts * (2 * (part * self.kv_heads + head) + own)


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
