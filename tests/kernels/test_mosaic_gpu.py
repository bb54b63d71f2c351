"""The Mosaic GPU kernel without a GPU: interpreted, with race detection, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cla_kernels import _mosaic_gpu as mosaic
from cla_kernels._schedule import Tuning, schedule
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.test_decode_attention import Shape, inputs, softmax_attention

SMALL = Tuning(programs=2, stages=3, on_device=False)

# Tile edges and one beside them, an empty row, a full one, lengths beyond the cache.
INTERPRETED = {
    "tile edges": (Shape(B=4, T=1, N=8, K=1, H=64, S=136, G=2), [64, 65, 127, 0], SMALL),
    "causal over two tiles": (
        Shape(B=2, T=3, N=4, K=2, H=64, S=136, G=1), [130, 138],
        dataclasses.replace(SMALL, workers=1),
    ),
    "tiles of 128": (
        Shape(B=3, T=1, N=16, K=1, H=128, S=264, G=1), [264, 1, 129],
        dataclasses.replace(SMALL, block=128, programs=1),
    ),
    "wide heads, idle workers": (
        Shape(B=2, T=2, N=2, K=1, H=256, S=72, G=1), [66, 3],
        dataclasses.replace(SMALL, programs=4),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "tile edges")) for n in INTERPRETED]
)
def test_interpreted_it_is_softmax_attention_without_races(name: str):
    shape, lengths, tuning = INTERPRETED[name]
    q, k, v = inputs(shape, "bfloat16", "bfloat16")
    layer = shape.G - 1
    expected = softmax_attention(q, k, v, lengths, layer)
    # Whatever lies behind the lengths, not a number included, must not be seen.
    behind = jnp.arange(shape.S)[None] >= jnp.array(lengths)[:, None]
    k, v = (jnp.where(behind[None, :, :, None, None], jnp.nan, a).astype(a.dtype) for a in (k, v))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = mosaic.decode_attention(
            q, k, v, None, None, jnp.array(lengths, jnp.int32), layer, shape.H**-0.5, tuning
        )
    found = np.asarray(found.astype(jnp.float32), np.float64)
    assert np.linalg.norm(found - expected) <= 3e-3 * np.linalg.norm(expected)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (1, 64), (8, 8), (3, 5)])
def test_every_configuration_lowers_for_cuda(head_dim: int, dtype: str, queries: int, heads: int):
    shape = Shape(B=3, T=queries, N=heads, K=1, H=head_dim, S=1024, G=2)
    q, k, v = jax.eval_shape(lambda: inputs(shape, dtype, dtype))
    lengths = jax.ShapeDtypeStruct((shape.B,), jnp.int32)

    def call(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        return mosaic.decode_attention(q, k, v, None, None, lengths, 1, 0.1)

    traced = jax.jit(call).trace(q, k, v, lengths)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 7),
    st.sampled_from([64, 128]), st.integers(1, 3),
)  # fmt: skip
def test_every_block_is_read_once(
    lengths: list[int], kv_heads: int, programs: int, block: int, fewest: int
):
    """The schedule against a list of all blocks, cut by hand."""
    tuning = Tuning(block=block, programs=programs, workers=1, fewest=fewest)
    plan = schedule(jnp.array(lengths, jnp.int32), kv_heads, 256, tuning)
    order = [
        row
        for row, length in enumerate(lengths)
        for _ in range(kv_heads * max(-(-min(length, 256) // block), 1))
    ]
    each = int(plan.each[0])
    assert each >= fewest
    assert each * tuning.units >= len(order)
    assert int(plan.starts[-1]) == len(order)
    for unit, (row, start, end, length) in enumerate(np.asarray(plan.units)):
        if unit * each < len(order):
            assert row == order[unit * each]
            assert (start, end) == (order.index(row), len(order) - order[::-1].index(row))
            assert length == lengths[row]
