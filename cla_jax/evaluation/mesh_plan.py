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
from cla_jax.parallel import Layout, Schedule, check_inference_mesh, check_mesh
from cla_jax.recipes import LOSS_CHUNK

__all__ = ["PROGRAMS", "MeshPlan", "MeshWork", "plan_mesh"]

PROGRAMS: tuple[Program, ...] = ("train", "prefill", "decode")

_REQUIRED = re.compile(r"required.*?\((\d+(?:\.\d+)?)([KMG])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshWork:
    """What is to be done at once, over all devices.

    Attributes:
        batch: rows; default: the recipe's, or as many as there are devices.
        context: tokens of a row, of a cache its room; default the recipe's, or the model's.
        recipe: of the training step, in which what else is given here is changed. None: the
            defaults of `ExecutionConfig` with the presets' loss chunk, the batch at once.
        micro_batch: rows of a forward and backward pass; 0: the whole batch.
        microbatches: of a pipeline.
        remat: of the training step.
        unroll: of its scans over layers.
        cache_dtype: of the K/V cache.
    """

    batch: int | None = None
    context: int | None = None
    recipe: TrainConfig | None = None
    micro_batch: int | None = None
    microbatches: int | None = None
    remat: Remat | None = None
    unroll: int | None = None
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
        schedule: how a training step's rows are dealt out; None for other programs.
        arguments: what lies there before: state or weights, cache, inputs.
        temporaries: while it runs; None if it does not fit, and XLA gave up before it knew.
        total: of both, of results that are no argument's place, and of the program itself.
        memory: that the device has; None for a CPU.
        fits: whether XLA could place it all; on a CPU it always can.
        sent: bytes that a device sends in one run, by mesh axis, in rings.
        counted: whether these are all; if not, XLA does not tell how often some loop runs.
    """

    model: str
    program: Program
    target: str
    device: str
    mesh: str
    batch: int
    context: int
    schedule: Schedule | None
    arguments: int | None
    temporaries: int | None
    total: int | None
    memory: int | None
    fits: bool
    sent: dict[str, int]
    counted: bool = True


def plan_mesh(
    config: ModelConfig,
    mesh: MeshConfig,
    target: str,
    programs: tuple[Program, ...] | None = None,
    work: MeshWork | None = None,
) -> list[MeshPlan]:
    """Compile a model's programs for a mesh of target devices.

    Args:
        config: the model.
        mesh: devices along each axis.
        target: `v5e:4x4`, `cpu:8`; see `target_devices`.
        programs: the training step, the prefill of whole prompts, a step of decoding. None: those
            that the mesh, the recipe and the context are for.
        work: batch, context and the like.

    Raises:
        ValueError: a target that cannot be compiled for, a mesh that does not fit the devices, the
            model or the batch; names what works. A program that the mesh, the recipe or the context
            is not for, or that XLA does not compile for such a mesh.
    """
    work = work or MeshWork()
    devices = target_devices(target)
    layout = Layout.on(mesh, config, devices)
    asked = _programs(config, layout.mesh_config, work, programs)
    training = _training(config, layout, work)
    batch, context = training.data.batch_size, training.data.sequence_length
    schedule = check_mesh(config, training, devices) if "train" in asked else None
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
        MeshPlan(
            program=program,
            schedule=schedule if program == "train" else None,
            **common,
            **_measured(compile_[program], layout),
        )
        for program in asked
    ]


def _programs(
    config: ModelConfig, mesh: MeshConfig, work: MeshWork, asked: tuple[Program, ...] | None
) -> tuple[Program, ...]:
    """What is compiled: what was asked for, if it can be; else all that can."""
    fits: list[Program] = []
    for program in PROGRAMS if asked is None else asked:
        try:
            _check_program(config, mesh, work, program)
        except ValueError:
            if asked is not None:
                raise
        else:
            fits.append(program)
    if not fits:  # says why
        _check_program(config, mesh, work, "train")
    return tuple(fits)


def _check_program(config: ModelConfig, mesh: MeshConfig, work: MeshWork, program: Program) -> None:
    context = work.context or (work.recipe.data.sequence_length if work.recipe else 0)
    if program == "train" and context > config.sequence_length:
        raise ValueError(
            f"context={context} is longer than the {config.sequence_length} tokens that "
            f"{config.name} is trained on at most: give a shorter one, or plan prefill and decode "
            "without a recipe"
        )
    if program != "train":
        check_inference_mesh(mesh)
        if work.recipe is not None:
            raise ValueError(f"a recipe is of training, not of {program}: plan train alone")


def _training(config: ModelConfig, layout: Layout, work: MeshWork) -> TrainConfig:
    """The recipe that is asked for, on the mesh."""
    for name in ("batch", "context"):
        if (value := getattr(work, name)) is not None and value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    recipe = work.recipe or TrainConfig(
        steps=1000,
        data=DataConfig(sequence_length=config.sequence_length, batch_size=layout.mesh.size),
        execution=ExecutionConfig(loss_chunk=LOSS_CHUNK),
    )

    def changed[C: (TrainConfig, DataConfig, ExecutionConfig)](whole: C, **values: Any) -> C:
        given = {name: value for name, value in values.items() if value is not None}
        return dataclasses.replace(whole, **given)

    return changed(
        recipe,
        micro_batch_size=work.micro_batch,
        data=changed(recipe.data, batch_size=work.batch, sequence_length=work.context),
        execution=changed(
            recipe.execution, remat=work.remat, unroll=work.unroll,
            pipeline_microbatches=work.microbatches,
        ),
        mesh=layout.mesh_config,
    )  # fmt: skip


def _measured(compile_: Callable[[], jax.stages.Compiled], layout: Layout) -> dict[str, Any]:
    try:
        program = compile_()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(
                f"XLA does not compile this for a mesh of {layout.mesh_config}: "
                f"{str(error).splitlines()[0][:300]}; other sizes of the same axes may work"
            ) from error
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
        "counted": all(one.counted for one in found),
    }
