"""`1B/H128-MQA-CLA2` compiles for TPUs that are not there, and fits: `make test-tpu-aot`."""

import importlib.util
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
