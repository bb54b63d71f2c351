"""The second kernel: every row's partial results become its softmax attention."""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._join import Cut, Found, by_group, join
from cla_kernels._schedule import Schedule
from cla_kernels._tuning import Tuning


@functools.partial(jax.jit, static_argnames=("cut", "tuning"))
def combine(found: Found, plan: Schedule, *, cut: Cut, tuning: Tuning) -> jax.Array:
    """Softmax attention from what the units found.

    Args:
        found: as `partial_attention` returns it.
        plan: by which they were found, of `P` parts.
        cut: by which rows are shared out.
        tuning: of the plan.

    Returns:
        `found.done`, with everything in it; written in place.
    """
    B = plan.lengths.shape[0]
    shape = found.done.shape
    K = shape[0] // B
    likely = plan.parts.shape[0] // B + 2
    found, groups = by_group(found, K, cut)

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
            views = Found(out, sums_ref, statistics_ref)
            join(views, row, head, group, first, last, behind, kv_heads=K, cut=cut, likely=likely)

    result = jax.new_ref(found.done)
    plgpu.kernel(
        kernel,
        grid=(plan.joins.shape[0], K, groups),
        grid_names=("i", "h", "g"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(found.sums, found.statistics, plan.joins, result)
    # XLA forgets that it is written in place where a loop stacks the result and nothing is between:
    # it gives the kernel the stack's memory, and whatever lay there stays.
    return lax.optimization_barrier(jax.freeze(result)).reshape(shape)
