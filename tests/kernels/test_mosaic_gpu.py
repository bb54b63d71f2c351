"""The Mosaic GPU kernel without a GPU: interpreted, with race detection, and lowered for CUDA."""

import dataclasses
import faulthandler
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cla_kernels import EIGHT_BIT, decode_attention
from cla_kernels import _mosaic_gpu as mosaic
from cla_kernels._schedule import schedule
from cla_kernels._shared import Problem, scratch
from cla_kernels._tuning import REDUCTION_BYTES, Tuning, _shared_bytes, tuned
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.test_decode_attention import Shape, inputs, scales, softmax_attention

SMALL = Tuning(units=2, stages=3, on_device=False)

# Tile edges and one beside them, an empty row, a full one, lengths beyond the cache.
INTERPRETED = {
    "more KV heads than units": (Shape(B=2, T=1, N=6, K=3, H=64, S=136, G=1), [136, 70], SMALL),
    "tile edges": (Shape(B=4, T=1, N=8, K=1, H=64, S=136, G=2), [64, 65, 127, 0], SMALL),
    "causal over two tiles": (Shape(B=2, T=3, N=4, K=2, H=64, S=136, G=1), [130, 138], SMALL),
    "tiles of 128": (
        Shape(B=3, T=1, N=16, K=1, H=128, S=264, G=1), [264, 1, 129],
        dataclasses.replace(SMALL, block=128, units=1),
    ),
    "wide heads, idle units": (
        Shape(B=2, T=2, N=2, K=1, H=256, S=72, G=1), [66, 3],
        dataclasses.replace(SMALL, units=4),
    ),
    "many units to a row": (
        Shape(B=1, T=1, N=2, K=1, H=64, S=1024, G=1), [1000],
        dataclasses.replace(SMALL, units=41),
    ),
    "many units to a row, which another began": (
        Shape(B=2, T=1, N=3, K=1, H=64, S=3200, G=1), [3130, 3190],  # 49 blocks, two a unit
        dataclasses.replace(SMALL, units=82),
    ),
    "rows shared by parts of two heads": (
        Shape(B=3, T=1, N=4, K=2, H=64, S=456, G=1), [70, 456, 200],
        dataclasses.replace(SMALL, units=8),
    ),
    "a head dim that no 16 divides": (
        Shape(B=2, T=2, N=6, K=2, H=72, S=136, G=1), [70, 136], SMALL,
    ),
    "a head dim that is padded": (Shape(B=2, T=1, N=3, K=1, H=96, S=136, G=1), [70, 136], SMALL),
    "more queries than a tile": (Shape(B=2, T=3, N=32, K=1, H=64, S=72, G=1), [72, 2], SMALL),
}  # fmt: skip
INTERPRETED["rows that nobody cuts"] = (
    Shape(B=5, T=1, N=4, K=2, H=64, S=136, G=2), [136, 1, 70, 0, 200],
    dataclasses.replace(SMALL, units=4, whole=True),
)  # fmt: skip
TWO_WORKERS = dataclasses.replace(SMALL, stages=4, workers=2)
INTERPRETED["two workers"] = (
    Shape(B=3, T=2, N=4, K=2, H=64, S=456, G=1), [70, 456, 200], TWO_WORKERS,
)  # fmt: skip
INTERPRETED["more queries than a tile, two workers"] = (
    Shape(B=2, T=3, N=32, K=1, H=64, S=200, G=1), [200, 2], TWO_WORKERS,
)  # fmt: skip
EIGHT_BIT_INTERPRETED = [
    ("int8", (Shape(B=3, T=2, N=4, K=2, H=64, S=136, G=2), [130, 1, 137], TWO_WORKERS)),
    ("float8_e4m3fn", (Shape(B=3, T=2, N=4, K=2, H=64, S=136, G=2), [130, 1, 137], TWO_WORKERS)),
    ("int8", (  # tiles that are widened in two pieces
        Shape(B=2, T=1, N=4, K=1, H=64, S=392, G=2), [385, 190],
        dataclasses.replace(TWO_WORKERS, block=128),
    )),
]  # fmt: skip
HANGS = 900.0  # seconds


@pytest.fixture
def watched(capfd):
    """An interpreter that hangs ends the process, and says where every thread is."""
    with capfd.disabled():
        faulthandler.dump_traceback_later(HANGS, exit=True, file=2)
        yield
        faulthandler.cancel_dump_traceback_later()


def interpreted(q, k, v, lengths, layer, tuning, k_scale=None, v_scale=None):
    """The kernel's result, under race detection.

    The warpgroups of a unit are threads that wait for one another, out of XLA's pool for
    processors. With conftest.py's eight fake devices it has enough of them; with one device, on a
    machine of two cores, three warpgroups wait for ever.
    """
    assert len(jax.devices("cpu")) >= 8, "expected --xla_force_host_platform_device_count=8"
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = mosaic.decode_attention(
            q, k, v, k_scale, v_scale, jnp.array(lengths, jnp.int32), layer, q.shape[-1] ** -0.5,
            tuning,
        )  # fmt: skip
    assert not interpret_pallas_call.get_races().races_found
    return found


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    difference = np.asarray(found.astype(jnp.float32), np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.usefixtures("watched")
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
    found = interpreted(q, k, v, lengths, layer, tuning)
    assert relative_error(found, expected) <= 3e-3


@pytest.mark.slow
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(("dtype", "case"), EIGHT_BIT_INTERPRETED)
def test_interpreted_it_reads_8_bit_caches_without_races(
    dtype: str, case: tuple[Shape, list[int], Tuning]
):
    shape, lengths, tuning = case
    q, k, v = inputs(shape, "bfloat16", dtype)
    of_cache = scales(shape, dtype)
    expected = softmax_attention(q, k, v, lengths, 1, **of_cache)
    behind = jnp.arange(shape.S)[None] >= jnp.array(lengths)[:, None]
    of_cache = {
        name: jnp.where(behind[None, :, None], jnp.nan, scale) for name, scale in of_cache.items()
    }
    found = interpreted(q, k, v, lengths, 1, tuning, **of_cache)
    assert relative_error(found, expected) <= 3e-3


# Of every entry of the tuning table, and what each lets grow: rows of queries, padded head dims.
# Every two of a head dim, dtypes and queries meet; of all three every other combination is lowered.
LOWERED = [
    (head_dim, q_dtype, kv_dtype, queries, heads)
    for i, head_dim in enumerate((32, 40, 64, 72, 80, 96, 128, 192, 200, 248, 256))
    for j, (q_dtype, kv_dtype) in enumerate((
        ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "int8"),
        ("bfloat16", "float8_e4m3fn"),
    ))
    for k, (queries, heads) in enumerate(((1, 16), (1, 64), (8, 8), (3, 5)))
    if (i + j + k) % 2 == 0 and (kv_dtype not in EIGHT_BIT or head_dim % 16 == 0)
]  # fmt: skip
FAST = {(64, "bfloat16", "bfloat16", 1, 16), (128, "float16", "float16", 1, 64),
        (256, "bfloat16", "bfloat16", 8, 8), (96, "bfloat16", "int8", 3, 5),
        (96, "bfloat16", "bfloat16", 1, 64), (128, "bfloat16", "float8_e4m3fn", 1, 64)}  # fmt: skip
assert set(LOWERED) >= FAST


@pytest.mark.parametrize(
    ("head_dim", "q_dtype", "kv_dtype", "queries", "heads"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in FAST)) for case in LOWERED],
)
def test_every_configuration_lowers_for_cuda(
    head_dim: int, q_dtype: str, kv_dtype: str, queries: int, heads: int
):
    shape = Shape(B=64, T=queries, N=heads, K=1, H=head_dim, S=1024, G=2)  # enough for whole tiles
    assert "mosaic_gpu" in lowered(shape, q_dtype, kv_dtype)


def lowered(
    shape: Shape, q_dtype: str = "bfloat16", kv_dtype: str = "bfloat16", scan: bool = False,
    tuning: Tuning | None = None,
) -> str:  # fmt: skip
    """Of one call for CUDA, or of one in a scan over layers."""
    array = jax.ShapeDtypeStruct
    cache = array((shape.G, shape.B, shape.S, shape.K, shape.H), kv_dtype)
    scale = array((shape.G, shape.B, shape.K, shape.S), jnp.float32)
    given = (scale, scale) if kv_dtype in EIGHT_BIT else ()
    q, lengths = array((shape.B, shape.T, shape.N, shape.H), q_dtype), array((shape.B,), jnp.int32)

    def call(layer: Any, q: Any, k: Any, v: Any, lengths: Any, *scales: Any) -> jax.Array:
        k_scale, v_scale = scales or (None, None)
        return mosaic.decode_attention(q, k, v, k_scale, v_scale, lengths, layer, 0.1, tuning)

    def run(q: Any, k: Any, v: Any, lengths: Any, *scales: Any) -> jax.Array:
        if not scan:
            return call(shape.G - 1, q, k, v, lengths, *scales)

        def step(_: None, layer: jax.Array) -> tuple[None, jax.Array]:
            return None, call(layer, q, k, v, lengths, *scales)

        return jax.lax.scan(step, None, jnp.arange(shape.G, dtype=jnp.int32))[1]

    traced = jax.jit(run).trace(q, cache, cache, lengths, *given)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


# What the number of parts, rows and heads decides: how results are joined, how small tiles are.
CUT = {
    "so many parts to a row that warpgroups share them": Shape(1, 1, 16, 1, 128, 131072, 1),
    "the same of fewer units": Shape(1, 1, 4, 1, 64, 8192, 1),
    "of eight KV heads": Shape(1, 1, 32, 8, 128, 4096, 1),
    "rows of queries joined together": Shape(64, 1, 32, 4, 128, 4096, 1),
    "few heads, joined together": Shape(64, 1, 2, 2, 64, 4096, 1),
    "smaller tiles for few rows": Shape(1, 1, 8, 4, 64, 512, 1),
    "the smallest, of wide heads": Shape(1, 1, 16, 1, 256, 512, 1),
    "so many queries that tiles are smaller": Shape(64, 1, 40, 1, 64, 1024, 1),
    "and of wide heads": Shape(64, 1, 48, 1, 256, 1024, 1),
}


@pytest.mark.parametrize("name", CUT)
def test_every_way_to_cut_the_work_lowers_for_cuda(name: str):
    assert "mosaic_gpu" in lowered(CUT[name])


def test_rows_that_nobody_cuts_need_no_second_kernel():
    shape = Shape(16, 1, 32, 1, 64, 512, 1)
    assert lowered(shape).count("custom_call @mosaic_gpu") == 2
    cut = Tuning(block=256, stages=5, whole=True)
    assert lowered(shape, tuning=cut).count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("q_dtype", ["bfloat16", "float16"])
def test_8_bit_caches_that_fill_the_shared_memory_lower_for_cuda(q_dtype: str):
    assert "mosaic_gpu" in lowered(Shape(64, 1, 16, 1, 128, 8192, 1), q_dtype, "int8")


def test_8_bit_caches_of_one_row_lower_for_cuda():
    assert "mosaic_gpu" in lowered(CUT["the same of fewer units"], kv_dtype="int8")


def test_a_barrier_keeps_the_result_in_place_apart_from_a_loop_that_stacks_it():
    """Without it XLA forgets that the second kernel writes in place: see `combine`."""
    text = lowered(Shape(B=2, T=1, N=16, K=1, H=64, S=1024, G=3), scan=True)
    calls = list(re.finditer(r"(%\w+)(?::\d+)? = stablehlo.custom_call @mosaic_gpu", text))
    assert len(calls) == 2
    function = text[calls[1].end() :].split("\n  func.func")[0]
    used = re.findall(rf"(\S+) {calls[1][1]}\b", function)
    assert used == ["stablehlo.optimization_barrier"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETED)
def test_what_is_interpreted_is_right_on_a_gpu(name: str):
    shape, lengths, tuning = INTERPRETED[name]
    tuning = dataclasses.replace(tuning, on_device=True)
    q, k, v = inputs(shape, "bfloat16", "bfloat16")
    for layer in range(shape.G):
        expected = softmax_attention(q, k, v, lengths, layer)
        found = mosaic.decode_attention(
            q, k, v, None, None, jnp.array(lengths, jnp.int32), layer, shape.H**-0.5, tuning
        )
        assert relative_error(found, expected) <= 3e-3


@pytest.mark.gpu
def test_the_schedule_is_there_when_it_is_read():
    """Two hundred calls of other lengths: each is cut right before the kernels that read it."""
    shape = Shape(B=4, T=1, N=16, K=1, H=128, S=1024, G=1)
    q, k, v = inputs(shape, "bfloat16", "bfloat16")
    lengths = np.random.default_rng(3).integers(0, shape.S + 1, (200, shape.B))
    lengths[::7] = lengths[::7, :1]  # some as long as one another

    def loop(implementation: Any, q: Any, k: Any, v: Any) -> jax.Array:
        def step(_: None, lengths: jax.Array) -> tuple[None, jax.Array]:
            return None, decode_attention(q, k, v, lengths, implementation=implementation)

        return jax.lax.scan(step, None, jnp.asarray(lengths, jnp.int32))[1]

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda *a: loop("xla", *a))(*(a.astype(jnp.float32) for a in (q, k, v)))
    run = jax.jit(lambda *a: loop("mosaic_gpu", *a))
    for _ in range(3):
        found = run(q, k, v).astype(jnp.float32)
        wrong = jnp.linalg.norm((found - expected).reshape(200, -1), axis=1)
        assert (wrong <= 3e-3 * jnp.linalg.norm(expected.reshape(200, -1), axis=1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(16, 1), (32, 8)])
def test_command_buffers_change_nothing(heads: tuple[int, int]):
    shape = Shape(B=8, T=1, N=heads[0], K=heads[1], H=128, S=2048, G=4)
    q, k, v = inputs(shape, "bfloat16", "bfloat16")
    lengths = jnp.asarray([0, 1, 2048, 777, 128, 129, 2000, 64], jnp.int32)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        for layer in range(shape.G):
            q = decode_attention(q, k, v, lengths, layer=layer, implementation="mosaic_gpu")
        return q

    program = jax.jit(step).lower(q, k, v, lengths)
    key = "xla_gpu_enable_command_buffer"
    found = []
    for options in ({}, {key: ""}, {key: "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}):
        compiled = program.compile(compiler_options=options)
        for _ in range(3):  # the first run records
            found.append(np.asarray(compiled(q, k, v, lengths).astype(jnp.float32)))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["so many queries that tiles are smaller", "and of wide heads"])
def test_more_than_32_query_heads_on_a_gpu(name: str):
    shape = dataclasses.replace(CUT[name], B=20)
    q, k, v = inputs(shape, "bfloat16", "bfloat16")
    lengths = [1000 - 50 * row for row in range(shape.B)]
    found = decode_attention(q, k, v, jnp.array(lengths, jnp.int32), implementation="mosaic_gpu")
    expected = softmax_attention(q, k, v, lengths, 0)
    assert relative_error(found, expected) <= 3e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 96}, "block 96: expected a positive multiple of 64; the nearest is 128"),
        ({"block": 0}, "block 0: .*the nearest is 64"),
        ({"workers": 3}, "workers 3: expected 1 or 2"),
        ({"stages": 2}, "stages 2: expected at least 3"),
        ({"stages": 6, "workers": 2}, "stages 6: .*a multiple of 4; the nearest is 4"),
        ({"stages": 3, "workers": 2}, "stages 3: .*a multiple of 4; the nearest is 4"),
        ({"units": 0}, "units 0: expected at least 1"),
    ],
)
def test_a_cut_that_cannot_work_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Tuning(**change)


@given(
    st.integers(1, 64), st.integers(4, 32).map(lambda n: 8 * n),
    st.sampled_from(["bfloat16", "float16", *EIGHT_BIT]), st.integers(1, 4096),
    st.integers(1, 200_000),
    st.none() | st.builds(
        Tuning, block=st.sampled_from([64, 128, 192, 256, 512]), stages=st.sampled_from([4, 8, 12]),
        workers=st.integers(1, 2),
    ),
    st.booleans(),
)  # fmt: skip
def test_whatever_is_asked_the_cut_can_work(
    rows: int, head_dim: int, dtype: str, row_heads: int, size: int, asked: Tuning | None,
    narrow: bool,
):  # fmt: skip
    """And what a program shares is counted as Mosaic GPU does it, to the byte."""
    kv_dtype, eight_bit = jnp.dtype(dtype), dtype in EIGHT_BIT
    head_dim += 8 * (eight_bit and head_dim % 16 != 0)
    multiplied = jnp.dtype("bfloat16") if eight_bit else kv_dtype
    result = jnp.dtype("float16") if eight_bit and narrow else multiplied
    apart = result != multiplied
    cut = tuned(rows, head_dim, kv_dtype, row_heads, size, asked, result_apart=apart)
    assert cut.units <= 132  # a `Tuning` checks the rest itself
    problem = Problem(1, rows, head_dim, size, 1.0, multiplied, kv_dtype, result, cut)
    shared = REDUCTION_BYTES * cut.workers
    for one in jax.tree.leaves(scratch(problem)):
        if isinstance(one, plgpu.Barrier):
            shared += 8 * int(np.prod(one.num_barriers))
        else:
            shared += -(-math.prod(one.shape) * jnp.dtype(one.dtype).itemsize // 1024) * 1024
    assert shared == _shared_bytes(problem.rows, head_dim, kv_dtype, cut, apart)
    assert shared <= 227 * 1024
    assert tuned(rows, head_dim, kv_dtype, row_heads, size, cut, result_apart=apart) == cut


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9)
    | st.builds(lambda length, rows: [length] * rows, st.integers(0, 900), st.integers(1, 9)),
    st.integers(1, 7), st.sampled_from([64, 128]), st.booleans(),
)  # fmt: skip
def test_every_block_is_read_once(lengths: list[int], parts: int, block: int, whole: bool):
    """The schedule against a list of all blocks, cut by hand."""
    size = 800
    tuning = Tuning(block=block, whole=whole)
    plan = schedule(jnp.array(lengths, jnp.int32), parts, size, tuning)
    starts, each = np.asarray(plan.starts), int(plan.each[0])
    blocks = [max(-(-min(length, size) // block), 1) for length in lengths]
    places = np.diff(starts)
    order = [  # of every place the batch row, and whether it is valid
        (row, place < blocks[row]) for row in range(len(lengths)) for place in range(places[row])
    ]
    assert len(order) == starts[-1] <= each * parts
    assert sum(valid for _, valid in order) == sum(blocks)
    assert whole or each * 16 <= -(-sum(blocks) // parts) * 17  # few parts are idle

    cut = [order[part * each : (part + 1) * each] for part in range(parts)]
    for (row, start, end, length), found in zip(np.asarray(plan.parts), cut, strict=True):
        if found:
            assert row == found[0][0]
            assert (start, end) == tuple(starts[row : row + 2])
            assert length == lengths[row]
    assert not any(valid is False for found in cut for _, valid in found[:1])

    readers: dict[int, list[int]] = {}
    for part, found in enumerate(cut):
        for row in {row for row, valid in found if valid}:
            readers.setdefault(row, []).append(part)
    assert not whole or all(len(found) == 1 for found in readers.values())
    joins = [tuple(map(int, join[:3])) for join in np.asarray(plan.joins) if join[1] < join[2]]
    assert sorted(joins) == [(i, f[0], f[-1]) for i, f in sorted(readers.items()) if len(f) > 1]
    for row, first, last, behind in np.asarray(plan.joins):
        if first < last:
            assert behind == (cut[first][0][0] != row)
