"""Train steps and forward passes on this machine's accelerator: tokens/s, MFU, attention path.

    python experiments/benchmarks/training_step.py
    python experiments/benchmarks/training_step.py --train mini/H128-MQA-CLA2 --unroll 10 --batch 32

Random tokens; float32 parameters, bfloat16 compute, AdamW. MFU counts the model's FLOPs
(`ModelConfig.flops_per_token`) against the data sheet's dense bfloat16 peak. Results of record:
docs/results.md.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from cla_jax import model
from cla_jax.configs import ExecutionConfig, ModelConfig, OptimizerConfig, Remat
from cla_jax.models.attention import attention_path
from cla_jax.training.hardware import peak_flops
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import Model, init_state, make_train_step

REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time train steps and forward passes of models by name."""

    train: tuple[str, ...] = ("mini/H128-MQA", "mini/H128-MQA-CLA2")
    """Models whose train step is timed."""
    forward: tuple[str, ...] = ("1B/H46-MQA", "1B/H90-MQA-CLA2", "1B/H512-MQA-CLA2")
    """Models whose forward pass (logits of every position) is timed."""
    batch: int = 16
    """Sequences per train step; forward passes take a quarter."""
    sequence_length: int = 2048
    """Tokens per sequence."""
    unroll: tuple[int, ...] = (1, 10)
    """Repeats per scan step to try."""
    remat: Remat = "none"
    """What the backward pass recomputes."""
    loss_chunk: int = 4096
    """Tokens whose logits exist at a time in training; 0: all."""


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the first call (with compilation), and of one call in a warm row of `REPEATS`."""
    start = time.perf_counter()
    jax.block_until_ready(step())
    first = time.perf_counter() - start
    jax.block_until_ready(step())
    start = time.perf_counter()
    out = None
    for _ in range(REPEATS):
        out = step()
    jax.block_until_ready(out)
    return first, (time.perf_counter() - start) / REPEATS


def time_training(config: ModelConfig, options: Benchmark, execution: ExecutionConfig) -> None:
    """A train step, state donated."""
    decoder, optimizer = Model(config, execution), make_optimizer(OptimizerConfig(), steps=1000)
    shape = (options.batch, options.sequence_length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)
    state, train_step = init_state(decoder, optimizer, seed=0), make_train_step(decoder, optimizer)

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(state, {"tokens": tokens})
        return metrics

    report("train", config, execution, options.batch, options.sequence_length, timed(step))


def time_forward(config: ModelConfig, options: Benchmark, execution: ExecutionConfig) -> None:
    """Logits of a quarter of the batch."""
    decoder, batch = Model(config, execution), max(options.batch // 4, 1)
    shape = (batch, options.sequence_length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)
    params = decoder.init(0)
    forward = jax.jit(lambda params: decoder(params)(tokens))
    seconds = timed(lambda: forward(params))
    if not bool(jnp.isfinite(forward(params)).all()):
        raise FloatingPointError(f"{config.name}: logits are not finite")
    report("forward", config, execution, batch, options.sequence_length, seconds)


def report(
    what: str,
    config: ModelConfig,
    execution: ExecutionConfig,
    batch: int,
    length: int,
    seconds: tuple[float, float],
) -> None:
    """Print one line."""
    path = attention_path(config.head_dim, jnp.dtype(execution.compute_dtype))
    first, each = seconds
    rate = batch * length / each
    flops = config.flops_per_token(length) * (1 if what == "train" else 1 / 3)
    peak = peak_flops()
    mfu = f"{rate * flops / peak:.3f}" if peak else "unknown peak"
    memory = jax.devices()[0].memory_stats() or {}
    print(
        f"{what:8}{config.name:24} batch {batch:<3} unroll {execution.unroll:<3} "
        f"remat {execution.remat:5} {rate:10,.0f} tokens/s  MFU {mfu}  {each * 1e3:8.2f} ms  "
        f"first call {first:5.1f} s  peak {memory.get('peak_bytes_in_use', 0) / 2**30:6.2f} GiB  "
        f"attention {path.implementation} ({path.reason})",
        flush=True,
    )


def main(options: Benchmark) -> None:
    """Run every line; one that fails is reported and the others still run."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    jobs = [(time_training, name) for name in options.train]
    jobs += [(time_forward, name) for name in options.forward]
    for job, name in jobs:
        for unroll in options.unroll:
            execution = ExecutionConfig(
                unroll=unroll, remat=options.remat, loss_chunk=options.loss_chunk
            )
            try:
                job(model(name), options, execution)
            except (jax.errors.JaxRuntimeError, FloatingPointError) as error:
                print(f"{name}, unroll {unroll}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
