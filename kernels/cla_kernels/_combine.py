"""The second kernel: every row's partial results become its softmax attention."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._schedule import Schedule
from cla_kernels._tuning import Tuning, tile_rows

_NOTHING = -1e30  # the largest score of a stretch in which nothing is visible
_THREADS = 128  # of a warpgroup
_MOST_REGISTERS = 160  # of a thread, for what is in flight
_AHEAD = 8  # loads in flight: of more, the code itself would take longer to load


class Cut(NamedTuple):
    """How the rows of queries of a row and KV head are shared out."""

    rows: int  # of a result: those wanted, or whole tiles of them
    together: int  # of a program


def cut_rows(batch: int, kv_heads: int, rows: int, columns: int, tuning: Tuning) -> Cut:
    """As few rows a program as fill the warpgroup, or as keep the grid in one wave.

    Args:
        batch: rows of the batch.
        kv_heads: of a row.
        rows: of queries to one.
        columns: of a result.
        tuning: how many programs a wave has.
    """
    all_rows = tile_rows(rows)
    # Where rows are more than parts, most are one unit's, and their programs only end.
    parts = tuning.parts(kv_heads)
    joins, most = (batch * kv_heads, 16) if batch <= parts else (parts * kv_heads, 1)
    # Where results are stored from, rows lie in eights.
    for wanted in (rows, all_rows) if rows < 8 else (all_rows,):
        for together in range(1, wanted + 1):
            width = together * columns
            if wanted % together or all_rows % together or width % _THREADS:
                continue
            fits = joins * (wanted // together) <= most * tuning.units
            if fits or 2 * width > 1024 or wanted % (2 * together):
                return Cut(wanted, together)
    raise AssertionError(f"{rows} rows of {columns} columns")  # eight rows of 64 fit


@functools.partial(jax.jit, static_argnames=("together", "tuning"))
def combine(
    done: jax.Array,
    sums: jax.Array,
    statistics: jax.Array,
    plan: Schedule,
    *,
    together: int,
    tuning: Tuning,
) -> jax.Array:
    """Softmax attention from what the units found.

    Args:
        done: `[B * K, rows, C]`, of what one unit read whole; written in place.
        sums: `[2 * P * K, R, C]`, float32, as `partial_attention` returns them.
        statistics: `[2 * P * K, 2, R]`, likewise.
        plan: by which they were found, of `P` parts.
        together: rows of queries to a program.
        tuning: of the plan.

    Returns:
        `done`, with everything in it.
    """
    stretches, all_rows, columns = sums.shape
    row_heads, rows, _ = done.shape
    parts, B = plan.parts.shape[0], plan.lengths.shape[0]
    K = row_heads // B
    width = together * columns
    sums = sums.reshape(stretches, all_rows // together, width)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // _THREADS, 4))
    # Stretches of a row, where lengths are equal. Many are shared among warpgroups.
    likely = parts // B + 2
    groups = 4 if likely > 32 else 1
    most = _MOST_REGISTERS // (width // _THREADS + 2 * together)
    ahead = max(1, min(-(-likely // groups), most, _AHEAD))

    def join(refs: tuple[Any, ...], row: Any, head: Any, group: Any, first: Any, last: Any) -> None:
        sums_ref, statistics_ref, out, *shared = refs
        began, index = first, row * K + head
        if groups > 1:
            share = lax.div(last - first + groups, jnp.int32(groups))
            first = first + lax.axis_index("wg") * share
            last = jnp.minimum(last, first + share - 1)
        column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)

        def spread(scalars: list[jax.Array]) -> jax.Array:
            """A scalar for each row that is here, to that row's columns."""
            out = plgpu.layout_cast(lax.broadcast_in_dim(scalars[0], (width,), ()), layout)
            for i, scalar in enumerate(scalars[1:], 1):
                out = jnp.where(column < i * columns, out, scalar)
            return out

        def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            acc, tops, totals = carry
            found = []
            for u in range(ahead):
                part = first + i * ahead + u
                unit = jnp.minimum(part, last) * K + head
                stretch = 2 * unit + (part == began).astype(jnp.int32)
                largest, weight = (
                    [statistics_ref[stretch, what, group * together + j] for j in range(together)]
                    for what in range(2)
                )
                largest = [jnp.where(part <= last, one, -jnp.inf) for one in largest]
                loaded = plgpu.load(sums_ref.at[stretch, group], layout=layout)
                found.append((largest, weight, loaded))
            news = list(tops)
            for largest, _, _ in found:
                news = [jnp.maximum(new, one) for new, one in zip(news, largest, strict=True)]
            factors = [jnp.exp2(old - new) for old, new in zip(tops, news, strict=True)]
            acc = acc * spread(factors)
            totals = [total * factor for total, factor in zip(totals, factors, strict=True)]
            for largest, weight, loaded in found:
                # A stretch that saw nothing left its sums as zeros, or nothing at all.
                scales = [
                    jnp.where(one > _NOTHING, jnp.exp2(one - new), 0.0)
                    for one, new in zip(largest, news, strict=True)
                ]
                seen = [one > _NOTHING for one in largest]
                factor = spread(scales)
                acc = acc + jnp.where(factor > 0, loaded, 0.0) * factor
                totals = [
                    t + jnp.where(s, f * w, 0.0)
                    for t, f, w, s in zip(totals, scales, weight, seen, strict=True)
                ]
            return acc, news, totals

        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        nothing = [jnp.float32(_NOTHING)] * together, [jnp.float32(0.0)] * together
        steps = lax.div(last - first + ahead, jnp.int32(ahead))
        acc, tops, totals = lax.fori_loop(0, steps, step, (zero, *nothing))

        def finish(acc: jax.Array, total: jax.Array) -> None:
            inverse = jnp.where(total > 0, 1.0 / total, 0.0)
            out.at[index, group][...] = (acc * inverse).astype(done.dtype)

        if groups == 1:
            finish(acc, spread(totals))
            return
        exchanged, barrier = shared
        me = lax.axis_index("wg")

        @pl.when(me > 0)
        def _give() -> None:
            for what, found in enumerate((acc, spread(tops), spread(totals))):
                exchanged.at[me, what][...] = found
            plgpu.barrier_arrive(barrier)

        @pl.when(me == 0)
        def _take() -> None:
            plgpu.barrier_wait(barrier)
            parts = [(acc, spread(tops), spread(totals))]
            for other in range(1, groups):
                given, top, total = (
                    plgpu.load(exchanged.at[other, what], layout=layout) for what in range(3)
                )
                parts.append((given, top, total))
            largest = functools.reduce(jnp.maximum, (top for _, top, _ in parts))
            whole, weights = zero, zero
            for given, top, total in parts:
                factor = jnp.exp2(top - largest)
                whole, weights = whole + factor * given, weights + factor * total
            finish(whole, weights)

    def kernel(sums_ref: Any, statistics_ref: Any, join_ref: Any, out: Any, *shared: Any) -> None:
        join_number, head, group = (lax.axis_index(name) for name in ("i", "h", "g"))
        # The first kernel has waited for the schedule, and started this one only after.
        row, first, last = (join_ref[join_number, i] for i in range(3))
        if tuning.on_device:
            plgpu.griddepcontrol_launch_dependents()
            # Whoever comes next waits for this kernel alone, so it must not end before the first.
            one = join_number + head + group == 0
            pl.when((first < last) | one)(plgpu.griddepcontrol_wait)
        refs = sums_ref, statistics_ref, out, *shared
        pl.when(first < last)(functools.partial(join, refs, row, head, group, first, last))

    several: dict[str, Any] = {}
    if groups > 1:
        several = {
            "num_threads": groups,
            "thread_name": "wg",
            "scratch_types": [
                plgpu.SMEM((groups, 3, width), jnp.float32),
                plgpu.Barrier(num_arrivals=groups - 1),
            ],
        }
    result = jax.new_ref(done.reshape(row_heads, rows // together, width))
    plgpu.kernel(
        kernel,
        grid=(plan.joins.shape[0], K, rows // together),
        grid_names=("i", "h", "g"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **several,
    )(sums, statistics, plan.joins, result)
    # XLA forgets that it is written in place where a loop stacks the result and nothing is between:
    # it gives the kernel the stack's memory, and whatever lay there stays.
    return lax.optimization_barrier(jax.freeze(result)).reshape(done.shape)
