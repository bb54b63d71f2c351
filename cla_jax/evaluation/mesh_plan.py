"""What a model's programs take on a mesh of devices: memory on each, bytes sent along each axis.

Read from the compiled program (`ahead_of_time`), not estimated. Nothing is run.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from cla_jax.configs import (
    CacheDtype,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    Remat,
    TrainConfig,
)
from cla_jax.evaluation.ahead_of_time import (
    TPU_MEMORY,
    Program,
    compile_decode,
    compile_prefill,
    compile_train_step,
    target_devices,
)
from cla_jax.evaluation.collectives import bytes_by_axis, collectives
from cla_jax.parallel import Layout, check_mesh
from cla_jax.recipes import LOSS_CHUNK

__all__ = ["MeshPlan", "MeshWork", "plan_mesh"]

_REQUIRED = re.compile(r"required.*?\((\d+(?:\.\d+)?)([KMG])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshWork:
    """What is to be done at once, over all devices.

    Attributes:
        batch: rows; default: as many as there are devices.
        context: tokens of a row, of a cache its room; default the model's sequence length.
        remat: of the training step.
        unroll: of its scans over layers.
        cache_dtype: of the K/V cache.
    """

    batch: int | None = None
    context: int | None = None
    remat: Remat = "none"
    unroll: int = 1
    cache_dtype: CacheDtype = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """One program on a mesh; bytes are those of one device.

    Attributes:
        model: its name.
        program: what is run.
        target: the devices.
        device: their kind.
        mesh: devices along each axis.
        batch: rows over all devices.
        context: tokens of a row.
        arguments: what lies there before: state or weights, cache, inputs.
        temporaries: while it runs; None if it does not fit, and XLA gave up before it knew.
        total: of both, of results that are no argument's place, and of the program itself.
        memory: that the device has; None for a CPU.
        fits: whether XLA could place it all; on a CPU it always can.
        sent: bytes that a device sends in one run, by mesh axis, in rings.
    """

    model: str
    program: Program
    target: str
    device: str
    mesh: str
    batch: int
    context: int
    arguments: int | None
    temporaries: int | None
    total: int | None
    memory: int | None
    fits: bool
    sent: dict[str, int]


def plan_mesh(
    config: ModelConfig,
    mesh: MeshConfig,
    target: str,
    programs: tuple[Program, ...] = ("train", "prefill", "decode"),
    work: MeshWork | None = None,
) -> list[MeshPlan]:
    """Compile a model's programs for a mesh of target devices.

    Args:
        config: the model.
        mesh: devices along each axis.
        target: `v5e:4x4`, `cpu:8`; see `target_devices`.
        programs: the training step, the prefill of whole prompts, a step of decoding.
        work: batch, context and the like.

    Raises:
        ValueError: a target that cannot be compiled for, a mesh that does not fit the devices, the
            model or the batch; names what works.
    """
    work = work or MeshWork()
    devices = target_devices(target)
    layout = Layout.on(mesh, config, devices)
    batch = layout.mesh.size if work.batch is None else work.batch
    context = config.sequence_length if work.context is None else work.context
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    training = _training(batch, context, work)
    if "train" in programs:
        check_mesh(config, dataclasses.replace(training, mesh=layout.mesh_config), devices)
    inference = {"batch": batch, "length": context, "dtype": work.cache_dtype}
    compile_: dict[Program, Callable[[], jax.stages.Compiled]] = {
        "train": lambda: compile_train_step(config, training, layout),
        "prefill": lambda: compile_prefill(config, layout, **inference),
        "decode": lambda: compile_decode(config, layout, **inference),
    }
    kind = devices[0].device_kind
    common: dict[str, Any] = {
        "model": config.name, "target": target, "device": kind, "mesh": str(layout.mesh_config),
        "batch": batch, "context": context, "memory": TPU_MEMORY.get(kind),
    }  # fmt: skip
    return [
        MeshPlan(program=program, **common, **_measured(compile_[program], layout))
        for program in programs
    ]


def _training(batch: int, context: int, work: MeshWork) -> TrainConfig:
    execution = ExecutionConfig(remat=work.remat, unroll=work.unroll, loss_chunk=LOSS_CHUNK)
    return TrainConfig(
        steps=1000,
        data=DataConfig(sequence_length=context, batch_size=batch),
        execution=execution,
    )


def _measured(compile_: Callable[[], jax.stages.Compiled], layout: Layout) -> dict[str, Any]:
    try:
        program = compile_()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = _REQUIRED.search(str(error))
        total = None if wanted is None else round(float(wanted[1]) * _UNITS[wanted[2]])
        return {"arguments": None, "temporaries": None, "total": total, "fits": False, "sent": {}}
    held: Any = program.memory_analysis()
    arguments, temporaries = held.argument_size_in_bytes, held.temp_size_in_bytes
    results = held.output_size_in_bytes - held.alias_size_in_bytes
    found = collectives(program.as_text() or "", dict(layout.mesh.shape))
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "total": arguments + temporaries + results + held.generated_code_size_in_bytes,
        "fits": True,
        "sent": bytes_by_axis(found),
    }
