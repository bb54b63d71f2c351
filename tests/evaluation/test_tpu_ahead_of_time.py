"""Models of the paper compile for TPUs that are not there, and fit: `make test-tpu-aot`."""

import importlib.util
import math
import re
from typing import Any

import pytest

from cla_jax.configs import DataConfig, ExecutionConfig, MeshConfig, TrainConfig
from cla_jax.evaluation.ahead_of_time import (
    TPU_MEMORY,
    compile_decode,
    compile_prefill,
    compile_train_step,
    target_devices,
)
from cla_jax.evaluation.mesh_plan import MeshWork, plan_mesh
from cla_jax.parallel import Layout
from cla_jax.registry import model
from tests.parallel.hlo import across_stages

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="compiles for TPU with libtpu: run `make test-tpu-aot`",
    ),
    pytest.mark.standard_dtype_promotion,
]
CONFIG = model("1B/H128-MQA-CLA2")
LARGE = model("3B/H64-MQA-CLA2")
KERNEL = "tpu_custom_call"


@pytest.mark.parametrize(
    ("target", "mesh", "remat"),
    [
        ("v5e:4x4", "fsdp=16", "full"),
        ("v5e:4x4", "fsdp=4,tensor=4", "full"),
        ("v5p:2x2x2", "fsdp=8", "none"),
    ],
)
def test_the_training_step_fits(target, mesh, remat):
    work = MeshWork(batch=32, remat=remat)
    (plan,) = plan_mesh(CONFIG, MeshConfig.parse(mesh), target, ("train",), work)
    assert plan.fits
    assert plan.total is not None
    assert plan.memory is not None
    assert plan.total < 0.9 * plan.memory
    assert plan.device in TPU_MEMORY
    assert "unknown" not in plan.sent
    assert plan.sent["fsdp"] > CONFIG.parameters  # at the least, gathered once in 16 bits


def layout_of(mesh):
    return Layout.on(MeshConfig.parse(mesh), CONFIG, target_devices("v5e:4x4"))


def test_a_pipeline_on_64_chips_fits():
    """Of 16 groups: four stages of four; 16 microbatches of a row on each chip, 19 ticks."""
    work = MeshWork(batch=256, remat="full")
    mesh = MeshConfig.parse("stage=4,fsdp=16")
    (plan,) = plan_mesh(LARGE, mesh, "v5e:8x8", ("train",), work)
    assert plan.fits
    assert plan.total is not None
    assert plan.memory is not None
    assert plan.total < 0.9 * plan.memory
    assert set(plan.sent) == {"stage", "fsdp", "stage+fsdp"}
    # Forward and backward, a tick sends a microbatch on; the rest enters and leaves the pipeline.
    permuted = 2 * 19 * LARGE.sequence_length * LARGE.d_model * 2
    assert permuted < plan.sent["stage"] < 5 * permuted
    assert plan.sent["stage+fsdp"] < 1000  # the gradient's norm


def test_a_pipelines_stages_run_the_kernel_and_send_activations_alone():
    """1,024 is no other size of this model."""
    mesh, rows, T, D = MeshConfig.parse("stage=4,fsdp=16"), 256, 1024, LARGE.d_model
    layout = Layout.on(mesh, LARGE, target_devices("v5p:4x4x4"))
    execution = ExecutionConfig(loss_chunk=4096, pipeline_microbatches=16, remat="full")
    data = DataConfig(sequence_length=T, batch_size=rows, document_mask=True)
    program = compile_train_step(LARGE, TrainConfig(9, data=data, execution=execution), layout)
    hlo = program.as_text() or ""
    held: Any = program.memory_analysis()
    assert held.argument_size_in_bytes + held.temp_size_in_bytes < 0.9 * TPU_MEMORY["TPU v5"]
    # A group's two layers: forward, and again in the backward pass; dQ, dK and dV.
    assert hlo.count(f'custom_call_target="{KERNEL}"') >= 4 * 2
    assert not re.search(rf"\b{T},{T}\b", hlo)
    # One row of one stage, and all query heads, padded from 64 to 128.
    assert f"bf16[{LARGE.query_heads},{T},128]" in hlo
    sent = [s for s in across_stages(hlo, 4, 64) if math.prod(s.shape) > 1]
    permuted = [s.shape for s in sent if s.kind == "collective-permute"]
    assert set(permuted) == {(T, D)}
    # All rows and ticks of a chip, a chunk of the loss, and statistics of its softmax.
    summed = {s.shape for s in sent if s.kind != "collective-permute"}
    assert summed <= {(16, T, D), (19, T, D), (4096, D), (4096,)}


@pytest.mark.parametrize(
    ("target", "mesh"),
    [("v5p:4x4x4", "stage=2,fsdp=32"), ("v5e:4x4", "fsdp=2,tensor=8"), ("v5p:2x2x4", "data=15")],
)
def test_sizes_that_no_axes_of_the_torus_make(target, mesh):
    """32 of 4x4x4: an axis is cut; 15 of 16 are no torus."""
    layout = Layout.on(MeshConfig.parse(mesh), LARGE, target_devices(target))
    assert sorted(device.id for device in layout.mesh.devices.flat) == [*range(layout.mesh.size)]


def test_whole_sequences_have_no_square_of_scores():
    """1,024 is no other size of this model; neither forward nor backward."""
    layout = layout_of("fsdp=4,tensor=4")
    data = DataConfig(sequence_length=1024, batch_size=16, document_mask=True)
    training = TrainConfig(steps=9, data=data, execution=ExecutionConfig(loss_chunk=4096))
    for program, kernels in [
        # From the last owner on, a prefill has one query a row.
        (compile_prefill(CONFIG, layout, batch=16, length=1024), CONFIG.sharing.owner_layers[-1]),
        # Of a group's two layers: forward, dQ, dK and dV.
        (compile_train_step(CONFIG, training, layout), 3 * 2),
    ]:
        hlo = program.as_text() or ""
        assert hlo.count(f'custom_call_target="{KERNEL}"') >= kernels
        assert not re.search(r"\b1024,1024\b", hlo)


def test_a_step_of_decoding_copies_no_layer_of_the_cache():
    batch, length = 64, 8192
    program = compile_decode(CONFIG, layout_of("tensor=16"), batch=batch, length=length)
    held: Any = program.memory_analysis()
    layer = batch * length * CONFIG.head_dim * 2 // 16
    assert held.temp_size_in_bytes < layer
    assert held.alias_size_in_bytes >= 2 * CONFIG.kv_layers * layer
    copies = re.findall(
        rf"= \S*\[1,\d+,{length},1,{CONFIG.head_dim}\]\S* copy\(", program.as_text() or ""
    )
    assert not copies
