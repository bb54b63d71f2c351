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
_AHEAD = 17  # loads in flight: where several rows share 132 units, most take two turns
_TILE = plgpu.Layout.WGMMA
_TILE_PARTS = 64  # which a tile in this layout has at least
_TILE_COLUMNS = 64
_FEW = 40  # parts of a row, as far as they are joined one after the other


class Cut(NamedTuple):
    """How the rows of queries of a row and KV head are shared out."""

    rows: int  # of a result: those wanted, or whole tiles of them
    together: int  # of a program
    spare: int  # parts behind all others, which tiles of parts may reach


def cut_rows(batch: int, kv_heads: int, rows: int, columns: int, tuning: Tuning) -> Cut:
    """As few rows a program as fill the warpgroup, or as keep the grid small.

    Args:
        batch: rows of the batch.
        kv_heads: of a row.
        rows: of queries to one.
        columns: of a result.
        tuning: how many programs a wave has.
    """
    all_rows = tile_rows(rows)
    parts = tuning.parts(kv_heads)
    # Where results are stored from, rows lie in eights.
    wanted_rows = (rows, all_rows) if rows < 8 else (all_rows,)
    if parts // batch > _FEW:  # if lengths are equal
        return Cut(wanted_rows[0], 1, _TILE_PARTS)
    # Where rows are more than parts, most are one unit's, and their programs only end.
    joins, most = (batch * kv_heads, 16) if batch <= parts else (parts * kv_heads, 1)
    for wanted in wanted_rows:
        for together in range(1, wanted + 1):
            width = together * columns
            if wanted % together or all_rows % together or width % _THREADS:
                continue
            fits = joins * (wanted // together) <= most * tuning.units
            if fits or 2 * width > 1024 or wanted % (2 * together):
                return Cut(wanted, together, 0)
    raise AssertionError(f"{rows} rows of {columns} columns")  # eight rows of 64 fit


@functools.partial(jax.jit, static_argnames=("cut", "tuning"))
def combine(
    done: jax.Array,
    sums: jax.Array,
    statistics: jax.Array,
    plan: Schedule,
    *,
    cut: Cut,
    tuning: Tuning,
) -> jax.Array:
    """Softmax attention from what the units found.

    Args:
        done: `[B * K, rows, C]`, of what one unit read whole; written in place.
        sums: `[2 * (P + spare) * K, R, C]`, float32, as `partial_attention` returns them.
        statistics: `[2 * (P + spare) * K, 2, R]`, likewise.
        plan: by which they were found, of `P` parts.
        cut: by which rows are shared out.
        tuning: of the plan.

    Returns:
        `done`, with everything in it.
    """
    _, all_rows, columns = sums.shape
    row_heads, rows, _ = done.shape
    B = plan.lengths.shape[0]
    K = row_heads // B
    sums = sums.reshape(-1, K, 2, all_rows, columns)
    statistics = statistics.reshape(-1, K, 2, 2, all_rows)
    if cut.spare:
        join, shape = _join_many, done.shape
        groups = rows * (columns // _TILE_COLUMNS)
    else:
        together, likely = cut.together, plan.parts.shape[0] // B + 2
        join = functools.partial(_join_few, together=together, likely=likely)
        groups = rows // together
        shape = row_heads, groups, together * columns
        sums = sums.reshape(-1, K, 2, all_rows // together, together * columns)

    def kernel(sums_ref: Any, statistics_ref: Any, join_ref: Any, out: Any) -> None:
        number, head, group = (lax.axis_index(name) for name in ("i", "h", "g"))
        # The first kernel has waited for the schedule, and started this one only after.
        row, first, last, behind = (join_ref[number, i] for i in range(4))
        if tuning.on_device:
            plgpu.griddepcontrol_launch_dependents()
            # Whoever comes next waits for this kernel alone, so it must not end before the first.
            one = number + head + group == 0
            pl.when((first < last) | one)(plgpu.griddepcontrol_wait)

        @pl.when(first < last)
        def _join() -> None:
            place = out.at[row * K + head]
            join(
                sums_ref.at[:, head], statistics_ref.at[:, head], place, group, first, last, behind
            )

    result = jax.new_ref(done.reshape(shape))
    plgpu.kernel(
        kernel,
        grid=(plan.joins.shape[0], K, groups),
        grid_names=("i", "h", "g"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(sums, statistics, plan.joins, result)
    # XLA forgets that it is written in place where a loop stacks the result and nothing is between:
    # it gives the kernel the stack's memory, and whatever lay there stays.
    return lax.optimization_barrier(jax.freeze(result)).reshape(done.shape)


def _join_few(
    sums: Any, statistics: Any, out: Any, group: Any, first: Any, last: Any, behind: Any, *,
    together: int, likely: int,
) -> None:  # fmt: skip
    """One part after the other, `together` rows of queries at once.

    Args:
        sums: of a KV head, `[parts, 2, R // together, together * C]`.
        statistics: of it, `[parts, 2, 2, R]`.
        out: of the row, `[rows // together, together * C]`.
        group: of rows of queries.
        first: part.
        last: part.
        behind: whether what the first part found is its second stretch.
        together: rows of queries.
        likely: parts.
    """
    width = sums.shape[-1]
    columns = width // together
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // _THREADS, 4))
    ahead = min(likely, _AHEAD)
    column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)

    def spread(scalars: list[jax.Array]) -> jax.Array:
        """A scalar for each row that is here, to that row's columns."""
        found = plgpu.layout_cast(lax.broadcast_in_dim(scalars[0], (width,), ()), layout)
        for i, scalar in enumerate(scalars[1:], 1):
            found = jnp.where(column < i * columns, found, scalar)
        return found

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        acc, tops, totals = carry
        found = []
        for u in range(ahead):
            part = first + i * ahead + u
            stretch = jnp.minimum(part, last), jnp.where(part == first, behind, 0)
            largest, weight = (
                [statistics[*stretch, what, group * together + j] for j in range(together)]
                for what in range(2)
            )
            largest = [jnp.where(part <= last, one, -jnp.inf) for one in largest]
            loaded = plgpu.load(sums.at[*stretch, group], layout=layout)
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
    acc, _, totals = lax.fori_loop(0, steps, step, (zero, *nothing))
    total = spread(totals)
    out.at[group][...] = (acc * jnp.where(total > 0, 1.0 / total, 0.0)).astype(out.dtype)


def _join_many(
    sums: Any, statistics: Any, out: Any, group: Any, first: Any, last: Any, behind: Any
) -> None:
    """One row of queries and `_TILE_COLUMNS` columns; `_TILE_PARTS` parts at once, side by side.

    Args:
        sums: of a KV head, `[parts, 2, R, C]`.
        statistics: of it, `[parts, 2, 2, R]`.
        out: of the row, `[rows, C]`.
        group: of columns, of rows of queries.
        first: part.
        last: part.
        behind: whether what the first part found is its second stretch.
    """
    shares = jnp.int32(sums.shape[-1] // _TILE_COLUMNS)
    row = lax.div(group, shares)
    columns = pl.ds(lax.rem(group, shares) * _TILE_COLUMNS, _TILE_COLUMNS)
    by_part = _TILE.reduce(1)
    here = plgpu.broadcasted_iota(jnp.int32, (_TILE_PARTS,), 0, layout=by_part)

    def taken(carry: tuple[Any, ...], at: Any, stretch: Any, valid: jax.Array) -> tuple[Any, ...]:
        """The next of every place in the tile."""
        acc, tops, totals = carry
        parts = pl.ds(at, _TILE_PARTS)
        largest, weight = (
            plgpu.load(statistics.at[parts, stretch, what, row], layout=by_part, optimized=False)
            for what in range(2)
        )
        loaded = plgpu.load(sums.at[parts, stretch, row, columns], layout=_TILE, optimized=False)
        # A stretch that saw nothing left its sums as zeros, or nothing at all.
        largest = jnp.where(valid, largest, _NOTHING)
        seen = largest > _NOTHING
        new = jnp.maximum(tops, largest)
        factor = jnp.exp2(tops - new)
        scale = jnp.where(seen, jnp.exp2(largest - new), 0.0)
        totals = totals * factor + jnp.where(seen, scale * weight, 0.0)
        scale = lax.broadcast_in_dim(scale, acc.shape, [0])
        acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
        return acc + jnp.where(scale > 0, loaded, 0.0) * scale, new, totals

    def filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    carry = (
        filled((_TILE_PARTS, _TILE_COLUMNS), 0.0, _TILE),
        filled((_TILE_PARTS,), _NOTHING, by_part),
        filled((_TILE_PARTS,), 0.0, by_part),
    )
    # Only the first part's may be its second stretch.
    carry = lax.fori_loop(0, behind, lambda _, c: taken(c, first, 1, here == 0), carry)
    at = first + behind
    steps = lax.div(last - at + _TILE_PARTS, jnp.int32(_TILE_PARTS))
    acc, tops, totals = lax.fori_loop(
        0,
        steps,
        lambda i, c: taken(c, at + i * _TILE_PARTS, 0, here <= last - at - i * _TILE_PARTS),
        carry,
    )
    factor = jnp.exp2(tops - jnp.max(tops))
    total = jnp.sum(totals * factor)
    sums_of_values = (acc * lax.broadcast_in_dim(factor, acc.shape, [0])).sum(axis=0)
    inverse = jnp.where(total > 0, 1.0 / total, 0.0)
    out.at[row, columns][...] = (sums_of_values * inverse).astype(out.dtype)
