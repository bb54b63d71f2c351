"""The first kernel: every unit's softmax attention over its stretches of a KV head's K/V.

One warpgroup issues the loads (TMA) into a ring of tiles; one or two others multiply (wgmma) and
keep the running softmax (`_softmax`). A stretch's queries are loaded while the one before is worked
on.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._schedule import Schedule
from cla_kernels._shared import Cached, Problem, Shared, scratch
from cla_kernels._softmax import attend, give, normalised, take
from cla_kernels._stretch import Stretch, Walk
from cla_kernels._tuning import REDUCTION_BYTES, Tuning


class _Inputs(NamedTuple):
    """References in the GPU's memory: rows of K/V are those of all layers, one after the other."""

    q: Any  # [B, K, R or fewer, H]
    kv: tuple[Any, Any]  # [G * B, S, K, H]
    scales: tuple[Any, ...]  # [G * B, K, S], of 8-bit K and V
    plan: Schedule
    layer: Any  # [1]


class _Outputs(NamedTuple):
    """Likewise; see `partial_attention`."""

    done: Any
    sums: Any
    statistics: Any


# Jitted, so that a model's layers trace and lower it once.
@functools.partial(
    jax.jit,
    static_argnames=("queries", "heads", "scale", "written", "spare", "result_dtype", "tuning"),
)
def partial_attention(
    q: jax.Array,
    cached: Cached,
    plan: Schedule,
    layer: int | jax.Array,
    *,
    queries: int,
    heads: int,
    scale: float,
    written: int,
    spare: int,
    result_dtype: jnp.dtype,
    tuning: Tuning,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every unit's softmax over its stretch of every row that it reads.

    Unit `p * K + head` is part `p` of a KV head. A row that it reads whole is done. Of others it
    leaves at most two partial results: `2 * unit` of the first row that it reads, and
    `2 * unit + 1` of another, which goes on behind it.

    Args:
        q: `[B, K, queries * heads, H]`, at most 64 rows to a KV head, in the type in which tiles
            are multiplied; `C` columns where no 16 divides `H`, which is over 64.
        cached: `k`, `v` `[G, B, S, K, H]`, and scales `[G, B, K, S]` where they are of 8 bits.
        plan: of the rows' lengths, `P` parts.
        layer: of the `G`.
        queries: `T` of a row, the last of which sees `lengths` keys.
        heads: query heads of a KV head.
        scale: of the scores, positive.
        written: rows of a result: those of `q`, or whole tiles of them.
        spare: parts for which there is room behind the `P`.
        result_dtype: of a result.
        tuning: how the work is cut.

    Returns:
        Results `[B * K, written, C]` of what is done alone, `C` the head dim in whole tiles; and
        float32: sums of values `[2 * P * K, R, C]`, `R` the rows in whole tiles, and their largest
        score (times log2 e) and sum of weights, `[2 * P * K, 2, R]`. What nobody has found is not
        written. `spare` parts lie behind them, never written.
    """
    B, K = q.shape[:2]
    G, _, S, _, H = cached.k.shape
    problem = Problem(
        queries=queries, heads=heads, head_dim=H, size=S, scale=scale, dtype=q.dtype,
        kv_dtype=cached.k.dtype, result_dtype=jnp.dtype(result_dtype), tuning=tuning,
    )  # fmt: skip
    rows, width, workers = problem.rows, problem.width, tuning.workers
    parts = plan.parts.shape[0]
    found = 2 * (parts + spare) * K
    k, v = (a.reshape(G * B, S, K, H) for a in (cached.k, cached.v))
    scales = [a.reshape(G * B, K, S) for a in (cached.k_scale, cached.v_scale) if a is not None]

    def kernel(*refs: Any) -> None:
        # The joins are not read here: the second kernel reads them before it waits for this one.
        n = 3 + len(scales)
        m = n + len(plan) + 1
        inputs = _Inputs(refs[0], refs[1:3], refs[3:n], Schedule(*refs[n : m - 1]), refs[m - 1])
        outputs, shared = _Outputs(*refs[m : m + 3]), refs[m + 3]
        unit, wg = lax.axis_index("unit"), lax.axis_index("wg")
        if tuning.on_device:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        # What lies behind an array's end is loaded as zeros; only traced slices may reach there.
        start = lax.rem(wg, jnp.int32(1))
        box = pl.ds(start, rows), pl.ds(start, width)
        part, head = lax.div(unit, jnp.int32(K)), lax.rem(unit, jnp.int32(K))
        walk = Walk.of(inputs.plan, part, S, tuning.block)
        multiply = functools.partial(
            _multiply, problem, shared, outputs, walk, unit=unit, head=head, heads=K, box=box, wg=wg
        )

        def others(*_: Any) -> None:
            for worker in range(1, workers):
                pl.when(wg == worker)(functools.partial(multiply, worker))
            load = functools.partial(_load, problem, shared, inputs, walk, head=head, box=box)
            pl.when(wg == workers)(load)

        if workers == 1:
            others()
        else:
            # Scratch of reductions lies behind all that is allocated where they are traced: what
            # is allocated here, and not used, gives each worker its own.
            unused = plgpu.SMEM((REDUCTION_BYTES // 4,), jnp.float32)
            pl.run_scoped(others, unused, collective_axes="wg")
        pl.when(wg == 0)(functools.partial(multiply, 0))

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((B * K, written, width), result_dtype),
            jax.ShapeDtypeStruct((found, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((found, 2, rows), jnp.float32),
        ),
        scratch_types=[scratch(problem)],
        grid=(parts * K,),
        grid_names=("unit",),
        num_threads=workers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, *scales, *plan, jnp.asarray(layer, jnp.int32).reshape(1))


def _multiply(
    problem: Problem, shared: Shared, outputs: _Outputs, walk: Walk, worker: int, *,
    unit: jax.Array, head: jax.Array, heads: int, box: tuple[Any, Any], wg: jax.Array,
) -> None:  # fmt: skip
    """A multiplying warpgroup; the first of them writes what is found."""

    def stretch(stretch: Stretch) -> None:
        slot = lax.rem(stretch.number, jnp.int32(2))
        plgpu.barrier_wait(shared.q_full.at[slot])
        found = attend(problem, shared, stretch, shared.q.at[slot].T, worker, wg)
        if worker > 0:
            assert shared.merging is not None
            give(shared.merging, found, stretch.number)
            plgpu.barrier_arrive(shared.q_empty.at[slot])
            return
        if shared.merging is not None:
            found = take(shared.merging, found)

        @pl.when(stretch.alone)
        def _finish() -> None:
            # The queries' place takes what they found, if it is of their type.
            place = shared.q.at[slot] if shared.result is None else shared.result
            place.T[...] = normalised(found).astype(problem.result_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, outputs.done.at[stretch.row * heads + head, *box])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.barrier_arrive(shared.q_empty.at[slot])

        @pl.when(jnp.logical_not(stretch.alone))
        def _leave() -> None:
            index = 2 * unit + (stretch.number > 0).astype(jnp.int32)
            outputs.statistics.at[index, 0][...] = found.largest
            outputs.statistics.at[index, 1][...] = found.weight
            outputs.sums.at[index].T[...] = plgpu.layout_cast(
                found.sums, plgpu.Layout.WGMMA_TRANSPOSED
            )

    stretches, _ = walk.visit(stretch)
    if worker > 0:  # nobody may leave with an arrival outstanding
        assert shared.merging is not None
        pl.when(stretches > 0)(functools.partial(plgpu.barrier_wait, shared.merging.free))


def _load(
    problem: Problem, shared: Shared, inputs: _Inputs, walk: Walk, *,
    head: jax.Array, box: tuple[Any, Any],
) -> None:  # fmt: skip
    """The loading warpgroup."""
    stages, block = jnp.int32(problem.tuning.stages), problem.tuning.block
    rows, columns = box
    base = inputs.layer[0] * inputs.q.shape[0]

    def stretch(stretch: Stretch) -> None:
        slot = lax.rem(stretch.number, jnp.int32(2))
        wait = functools.partial(plgpu.barrier_wait, shared.q_empty.at[slot])
        pl.when(stretch.number >= 2)(wait)
        plgpu.copy_gmem_to_smem(
            inputs.q.at[stretch.row, head, rows, columns], shared.q.at[slot], shared.q_full.at[slot]
        )
        row = base + stretch.row

        @pl.loop(0, stretch.blocks)
        def _(i: jax.Array) -> None:
            keys = pl.ds((stretch.first + i) * block, block)
            for which, ref in enumerate(inputs.kv):
                tile = 2 * (stretch.before + i) + which
                slot = lax.rem(tile, stages)
                wait = functools.partial(plgpu.barrier_wait, shared.empty.at[slot])
                pl.when(tile >= stages)(wait)
                full = shared.full.at[slot]
                plgpu.copy_gmem_to_smem(ref.at[row, keys, head, columns], shared.kv.at[slot], full)
                if inputs.scales:
                    scales = inputs.scales[which].at[row, head, keys]
                    plgpu.copy_gmem_to_smem(scales, shared.scales.at[slot], full)

    stretches, blocks = walk.visit(stretch)
    # Nobody may leave with an arrival outstanding.
    tiles = 2 * blocks

    @pl.loop(jnp.maximum(tiles - stages, 0), tiles)
    def _(tile: jax.Array) -> None:
        plgpu.barrier_wait(shared.empty.at[lax.rem(tile, stages)])

    @pl.loop(jnp.maximum(stretches - 2, 0), stretches)
    def _(number: jax.Array) -> None:
        plgpu.barrier_wait(shared.q_empty.at[lax.rem(number, jnp.int32(2))])
