"""The second kernel: every row's partial results become its softmax attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._schedule import Schedule, Tuning

_NOTHING = -1e30  # the largest score of a stretch in which nothing is visible


@functools.partial(jax.jit, static_argnames=("kv_heads", "dtype", "tuning"))
def combine(
    sums: jax.Array,
    statistics: jax.Array,
    plan: Schedule,
    kv_heads: int,
    dtype: jnp.dtype,
    tuning: Tuning,
) -> jax.Array:
    """Softmax attention from what the units found.

    Args:
        sums: `[stretches, R, H]`, float32, as `partial_attention` returns them.
        statistics: `[stretches, 2, 64]`, likewise.
        plan: by which they were found.
        kv_heads: `K`.
        dtype: of the result.
        tuning: of the plan.

    Returns:
        `[B, K, R, H]`.
    """
    stretches, rows, head_dim = sums.shape
    batch = plan.lengths.shape[0]
    # A warpgroup's threads hold several rows of a short head.
    width = max(head_dim, 128)
    together = width // head_dim
    groups = rows // together
    sums = sums.reshape(stretches, groups, width)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // 128)
    # Loads that are in flight at once; their latency is what this kernel costs.
    ahead = 8 if tuning.units <= 8 * batch * kv_heads else 32

    def kernel(sums_ref: Any, statistics_ref: Any, start_ref: Any, each_ref: Any, out: Any) -> None:
        if tuning.on_device:
            plgpu.griddepcontrol_wait()
        index, group = lax.axis_index("i"), lax.axis_index("g")
        row = lax.div(index, jnp.int32(kv_heads))
        row_start, each = start_ref[row], each_ref[0]
        blocks = lax.div(start_ref[row + 1] - row_start, jnp.int32(kv_heads))
        begin = row_start + (index - row * kv_heads) * blocks
        first, last = lax.div(begin, each), lax.div(begin + blocks - 1, each)
        column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)

        def spread(scalars: list[jax.Array]) -> jax.Array:
            """A scalar for each row that is here, to that row's columns."""
            out = plgpu.layout_cast(lax.broadcast_in_dim(scalars[0], (width,), ()), layout)
            for i, scalar in enumerate(scalars[1:], 1):
                out = jnp.where(column < i * head_dim, out, scalar)
            return out

        def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            acc, tops, totals = carry
            found = []
            for u in range(ahead):
                unit = first + i * ahead + u
                stretch = index + jnp.minimum(unit, last)
                largest, weight = (
                    [statistics_ref[stretch, what, group * together + j] for j in range(together)]
                    for what in range(2)
                )
                largest = [jnp.where(unit <= last, one, -jnp.inf) for one in largest]
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
                acc = acc + loaded * spread(scales)
                totals = [t + s * w for t, s, w in zip(totals, scales, weight, strict=True)]
            return acc, news, totals

        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        nothing = [jnp.float32(_NOTHING)] * together, [jnp.float32(0.0)] * together
        steps = lax.div(last - first + ahead, jnp.int32(ahead))
        acc, _, totals = lax.fori_loop(0, steps, step, (zero, *nothing))
        inverses = [jnp.where(total > 0, 1.0 / total, 0.0) for total in totals]
        out.at[index, group][...] = (acc * spread(inverses)).astype(dtype)

    result = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch * kv_heads, groups, width), dtype),
        grid=(batch * kv_heads, groups),
        grid_names=("i", "g"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(sums, statistics, plan.starts, plan.each)
    return result.reshape(batch, kv_heads, rows, head_dim)
