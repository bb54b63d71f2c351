"""What a training step costs: FLOPs, memory and time, counted, compiled and measured."""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.configs import ExecutionConfig, ModelConfig, OptimizerConfig
from cla_jax.training.checkpoints import check_identity
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import Model, init_state, make_train_step

__all__ = ["Costs", "measure_all", "training_costs", "training_costs_alone"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of CLA section 2.3 for one model.

    Attributes:
        model: its name.
        kv_bytes_per_token: of a 16-bit cache.
        parameters: of the model.
        flops_per_token: of a training step, by formula (`ModelConfig.flops_per_token`).
        xla_flops_per_token: of the same step as XLA counts them. It counts all of the attention
            square (the formula counts the causal half), and elementwise operations, the
            optimizer's too: the more tokens a step has, the less those weigh.
        state_bytes: parameters and optimizer state, as the compiled step takes them.
        temporary_bytes: what the compiled step needs beside them, activations above all.
        peak_bytes: the most the device had in use; None where it does not say.
        step_seconds: median time of a step; None if none was run.
        compile_seconds: of the step.
        device: that it was compiled for.
    """

    model: str
    kv_bytes_per_token: int
    parameters: int
    flops_per_token: int
    xla_flops_per_token: float
    state_bytes: int
    temporary_bytes: int
    peak_bytes: int | None
    step_seconds: float | None
    compile_seconds: float
    device: str


def training_costs(
    config: ModelConfig,
    *,
    batch_size: int,
    sequence_length: int,
    execution: ExecutionConfig,
    repeats: int = 10,
) -> Costs:
    """The costs of one model's training step on this process's first device.

    Args:
        config: the model.
        batch_size: sequences per step.
        sequence_length: tokens of each.
        execution: how it is run.
        repeats: timed steps, after two that are not. 0: the step is compiled and nothing is
            allocated, so a model may be larger than this machine.
    """
    tokens = batch_size * sequence_length
    shape = (batch_size, sequence_length + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}
    model, optimizer = Model(config, execution), make_optimizer(OptimizerConfig(), steps=1000)
    abstract = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    began = time.perf_counter()
    step = make_train_step(model, optimizer).lower(abstract, batch).compile()
    compiled_in = time.perf_counter() - began
    memory = step.memory_analysis()
    if memory is None:
        raise RuntimeError("XLA gave no memory analysis")
    seconds = None
    if repeats:
        state = init_state(model, optimizer, 0)
        drawn = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)
        times = list[float]()
        for _ in range(repeats + 2):
            began = time.perf_counter()
            state, metrics = step(state, {"tokens": drawn})
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[2:])
    device = jax.devices()[0]
    statistics_of_device: dict[str, Any] = device.memory_stats() or {} if repeats else {}
    return Costs(
        model=config.name,
        kv_bytes_per_token=config.kv_bytes_per_token,
        parameters=config.parameters,
        flops_per_token=config.flops_per_token(sequence_length),
        xla_flops_per_token=_xla_flops(config, batch) / tokens,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=statistics_of_device.get("peak_bytes_in_use"),
        step_seconds=seconds,
        compile_seconds=compiled_in,
        device=device.device_kind,
    )


def training_costs_alone(config: ModelConfig, **options: Any) -> Costs:
    """`training_costs` in a process of its own, so that the device's peak is this model's alone.

    The caller must not hold the device's memory: it should not have run anything on it.

    Raises:
        RuntimeError: what went wrong there (such as memory that was too small), in one line.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(_guarded, config, options).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RuntimeError("the process was killed: out of memory?") from None


def measure_all(
    configs: Sequence[ModelConfig],
    path: Path,
    *,
    batch_size: int,
    sequence_length: int,
    execution: ExecutionConfig,
    repeats: int,
) -> dict[str, str]:
    """Measures models one after another into a JSON file; those already in it are skipped.

    Returns:
        What went wrong, by the model's name; the others are measured all the same.

    Raises:
        ValueError: the file holds measurements under other options (names them), or something else.
    """
    options = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "repeats": repeats,
        **{f"execution.{k}": v for k, v in dataclasses.asdict(execution).items()},
    }
    saved: dict[str, Any] = {"options": options, "costs": {}}
    if path.exists():
        try:
            saved = json.loads(path.read_bytes())
            found, _ = saved["options"], saved["costs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no measurements: {error!r}") from None
        check_identity({"options": found}, {"options": options}, str(path))
    failures = dict[str, str]()
    for number, config in enumerate(configs, start=1):
        known = config.name in saved["costs"]
        print(
            f"model {number} of {len(configs)}: {config.name}{': measured' if known else ''}",
            file=sys.stderr,
        )
        if known:
            continue
        try:
            costs = training_costs_alone(
                config, batch_size=batch_size, sequence_length=sequence_length,
                execution=execution, repeats=repeats,
            )  # fmt: skip
        except RuntimeError as error:
            failures[config.name] = str(error)
            print(f"{config.name}: {error}", file=sys.stderr)
            continue
        saved["costs"][config.name] = dataclasses.asdict(costs)
        path.parent.mkdir(parents=True, exist_ok=True)
        replacement = path.with_name(f".{path.name}.{os.getpid()}")
        replacement.write_text(json.dumps(saved, indent=2) + "\n", "utf-8")
        os.replace(replacement, path)
    return failures


def _guarded(config: ModelConfig, options: dict[str, Any]) -> Costs:
    try:
        return training_costs(config, **options)
    except Exception as error:
        # Not every library's exceptions survive the way back.
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise RuntimeError(f"{type(error).__name__}: {first}") from None


def _xla_flops(config: ModelConfig, batch: dict[str, jax.ShapeDtypeStruct]) -> float:
    """FLOPs of a step by XLA's cost analysis, before it is compiled.

    The analysis counts a loop's body once and a custom call not at all: hence no scan, no chunks,
    and float32, for which attention is no fused kernel.
    """
    execution = ExecutionConfig(compute_dtype="float32", scan=False)
    model, optimizer = Model(config, execution), make_optimizer(OptimizerConfig(), steps=1000)
    abstract = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    # GPU clients analyse no program that is not compiled; the CPU's, which is always there, does.
    with jax.default_device(jax.devices("cpu")[0]):
        analysis = make_train_step(model, optimizer).lower(abstract, batch).cost_analysis()
    if analysis is None:
        raise RuntimeError("XLA gave no cost analysis")
    return float(analysis["flops"])
