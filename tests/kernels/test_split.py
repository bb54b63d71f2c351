"""Which rows several units read, and who joins them: against lists made by hand."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
from cla_kernels import _split
from cla_kernels._schedule import schedule
from cla_kernels._split import Split, may_wait, splits
from cla_kernels._stretch import Walk
from cla_kernels._tuning import Tuning
from hypothesis import given
from hypothesis import strategies as st

SIZE = 800  # tokens of a row's cache

lengths_of_rows = st.lists(st.integers(0, 900), min_size=1, max_size=6) | st.builds(
    lambda length, rows: [length] * rows, st.integers(0, 900), st.integers(1, 6)
)


@given(lengths_of_rows, st.integers(1, 9), st.integers(1, 2), st.integers(1, 4))
def test_every_part_of_a_row_that_several_read_knows_it(
    lengths: list[int], parts: int, kv_heads: int, most_joiners: int
):
    block, kept = 64, _split._MOST_JOINERS
    plan = schedule(jnp.array(lengths, jnp.int32), parts, SIZE, Tuning(block=block))
    starts, each = np.asarray(plan.starts), int(plan.each[0])
    blocks = [max(-(-min(length, SIZE) // block), 1) for length in lengths]
    readers = {  # of every row, its parts
        row: sorted({place // each for place in range(start, start + blocks[row])})
        for row, start in enumerate(starts[:-1])
    }
    shared = {row: found for row, found in readers.items() if len(found) > 1}

    seen, joined = Counter(), Counter()
    try:
        _split._MOST_JOINERS = most_joiners
        for part in range(parts):
            walk = Walk.of(plan, jnp.int32(part), SIZE, block)
            for began_before, split in zip((True, False), splits(walk), strict=True):
                if not split.exists:
                    continue
                row = int(split.row)
                seen[row, part] += 1
                found = shared[row]
                assert (split.first, split.last) == (found[0], found[-1])
                assert began_before == (part > found[0])
                assert bool(split.behind) == (starts[row] > found[0] * each)
                joiners = int(split.joiners(kv_heads))
                assert joiners == min(len(found), max(most_joiners // kv_heads, 1))
                if part - found[0] < joiners:
                    joined[row, part - found[0]] += 1
    finally:
        _split._MOST_JOINERS = kept
    assert seen == Counter((row, part) for row, found in shared.items() for part in found)
    # Each share of a row has one unit that joins it.
    assert joined == Counter(
        (row, number)
        for row, found in shared.items()
        for number in range(min(len(found), max(most_joiners // kv_heads, 1)))
    )


@given(st.integers(2, 132), st.integers(1, 80), st.integers(0, 132))
def test_units_wait_only_where_all_joiners_of_a_row_leave_room(
    parts: int, kv_heads: int, multiprocessors: int
):
    none = jnp.int32(0)
    split = Split(none, none, jnp.int32(parts - 1), none, jnp.bool_(True))
    joiners = int(split.joiners(kv_heads)) * kv_heads
    assert joiners < multiprocessors or not may_wait(multiprocessors, kv_heads)
    assert not may_wait(0, kv_heads)  # of a device that does not say how many it has
