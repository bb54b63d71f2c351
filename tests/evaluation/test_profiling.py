"""Where a step's time goes, from traces: of a CPU, and as GPUs write them."""

from types import SimpleNamespace

import pytest

from cla_jax import model
from cla_jax.evaluation import profiling
from cla_jax.evaluation.decoding import DecodeLoop, random_decoder
from cla_jax.evaluation.profiling import Operation, breakdown, kind_of, layer_seconds, op_names

HLO = """\
%fused_computation.1 (param_0: f32[2]) -> f32[2] {
  %param_0 = f32[2]{0} parameter(0)
  ROOT %scatter.1 = f32[2]{0} scatter(%param_0), metadata={op_name="jit(f)/cache_write/scatter"}
}
ENTRY %main (Arg_0: f32[2]) -> f32[2] {
  %input_scatter_fusion.1 = f32[2]{0} fusion(%Arg_0), kind=kInput, calls=%fused_computation.1
  ROOT %loop-add.7 = f32[2]{0} add(%x, %x), metadata={op_name="jit(f)/sample/argmax" stack_frame_id=1}
}
"""  # noqa: E501


def test_kinds_of_a_step_on_this_processor():
    config = model("tiny/MQA-CLA2")
    loop = DecodeLoop(random_decoder(config), 2, 32, steps=4)
    loop.run(24, 4)
    found = profiling.traced(lambda: loop.run(24, 4), "jit_decode_block")
    paths = op_names(loop.compiled.as_text())
    parts = {part.kind: part for part in breakdown(found, paths, 4)}
    assert tuple(parts) == profiling.KINDS
    # Four in each layer, K/V of each owner, logits.
    assert parts["products"].operations == 4 * config.num_layers + config.kv_layers + 1
    for kind in ("attention", "products", "cache write", "sampling", "norms, rotary, elementwise"):
        assert parts[kind].seconds > 0, kind
    assert sum(part.share for part in parts.values()) == pytest.approx(1)
    first, last = found[0].start, max(o.start + o.seconds for o in found)
    assert sum(part.seconds for part in parts.values()) == pytest.approx((last - first) / 4)
    with pytest.raises(ValueError, match="no operation of jit_other"):
        profiling.traced(lambda: loop.run(24, 4), "jit_other")


def test_kernels_are_told_by_their_names_or_by_where_they_come_from():
    paths = op_names(HLO)
    expected = {
        "input_scatter_fusion_1": "cache write",  # by the root of the fusion
        "loop_add_7": "sampling",
        "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT": "products",
        "gemm_fusion_dot_12": "products",
        "kernel_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "MemcpyD2H": "copies",
        "loop_rsqrt_fusion_2": "norms, rotary, elementwise",
    }
    assert {name: kind_of(Operation(name, 0, 1), paths) for name in expected} == expected
    assert kind_of(Operation("reused", 0, 1, "loop-add.7"), paths) == "sampling"


def test_overlap_counts_once_and_what_is_between_is_a_gap():
    operations = [Operation("gemm", 1, 3), Operation("loop", 3, 2), Operation("memset", 7, 1)]
    parts = {part.kind: part.seconds for part in breakdown(operations, {}, 1)}
    assert (parts["products"], parts["norms, rotary, elementwise"]) == (3, 1)
    assert (parts["gaps"], parts["copies"]) == (2, 1)
    steps = breakdown(operations, {}, 2, step_seconds=4.5)
    assert {part.kind: part.seconds for part in steps} == {
        **{kind: seconds / 2 for kind, seconds in parts.items()},
        "gaps": 2,
    }
    with pytest.raises(ValueError, match="no operations"):
        breakdown([], {}, 1)


def test_layers_are_counted_off():
    # Two steps of three layers: two kernels each, the second begins before the first ends.
    operations = []
    for call in range(6):
        seconds = 1.0 + call % 3
        operations += [
            Operation("kernel_0", 10 * call, seconds),
            Operation("kernel_1", 10 * call + 0.5, seconds),
            Operation("gemm", 10 * call + 6, 1),
        ]
    once_a_step = [Operation("kernel_schedule", 25 * step, 0.1) for step in range(2)]
    everything = sorted([*operations, *once_a_step], key=lambda o: o.start)
    assert layer_seconds(everything, {}, 2, 3) == pytest.approx((1.5, 2.5, 3.5))
    assert layer_seconds(once_a_step, {}, 2, 3) is None


def event(name, start, seconds, **statistics):
    return SimpleNamespace(
        name=name, start_ns=start * 1e9, duration_ns=seconds * 1e9, stats=statistics.items()
    )


def test_of_a_gpu_the_streams_are_read():
    events = [
        event("gemm", 2, 1, hlo_module="jit_f", hlo_op="dot.1"),
        event("kernel_0", 1, 1),  # of a CUDA graph
        event("other", 0, 1, hlo_module="jit_g"),
    ]
    line = lambda name: SimpleNamespace(name=name, events=events)  # noqa: E731
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[line("Stream #13"), line("XLA Ops")])
    planes = [SimpleNamespace(name="/host:CPU", lines=[line("python")]), gpu]
    assert [o.name for o in profiling._operations(planes, "jit_f")] == ["gemm", "kernel_0"]
    assert [o.source for o in profiling._operations(planes[:1], "jit_f")] == ["dot.1"]
