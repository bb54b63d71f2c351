"""What a unit reads, one row after the other: whoever loads and whoever multiplies walk alike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cla_kernels._schedule import Schedule, stored_blocks


class Stretch(NamedTuple):
    """Consecutive blocks of one row, which one unit reads: int32 scalars."""

    row: jax.Array  # of the batch
    length: jax.Array  # its valid tokens
    first: jax.Array  # of the row's blocks
    blocks: jax.Array  # how many
    alone: jax.Array  # bool: these are all of the row's
    before: jax.Array  # blocks that the unit has read before
    number: jax.Array  # stretches that it has read before


class Walk(NamedTuple):
    """A unit's share of the order in which all blocks lie."""

    plan: Schedule  # of references
    part: jax.Array
    begin: jax.Array  # places in the order
    end: jax.Array
    size: int  # of a row's cache
    block: int

    @classmethod
    def of(cls, plan: Any, part: jax.Array, size: int, block: int) -> "Walk":
        """That of a part of the plan."""
        begin = part * plan.each[0]
        end = jnp.minimum(begin + plan.each[0], plan.starts[plan.lengths.shape[0]])
        return cls(plan, part, begin, end, size, block)

    def visit(self, do: Callable[[Stretch], None]) -> tuple[jax.Array, jax.Array]:
        """Does each stretch; returns how many they were, and their blocks."""
        plan = self.plan
        rows = plan.lengths.shape[0]

        def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            at, number, before, row, row_start, row_end, length = state
            # Of the row that follows: loaded now, to have arrived by then.
            following = jnp.minimum(row + 1, rows - 1)
            next_end, next_length = plan.starts[following + 1], plan.lengths[following]
            blocks = stored_blocks(length, self.size, self.block)
            first = at - row_start
            count = jnp.minimum(blocks - first, self.end - at)
            do(Stretch(row, length, first, count, count == blocks, before, number))
            return row_end, number + 1, before + count, following, row_end, next_end, next_length

        none = jnp.int32(0)
        state = self.begin, none, none, *(plan.parts[self.part, i] for i in range(4))
        _, stretches, blocks, *_ = lax.while_loop(lambda state: state[0] < self.end, body, state)
        return stretches, blocks
