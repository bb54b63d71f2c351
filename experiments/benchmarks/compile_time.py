"""Compile time does not grow with depth: a train step of 20, 80 and 320 layers.

A stack that shares K/V is scanned, so the compiler sees the layers of one sharing group whatever
the depth. This measures the time to compile a whole train step (forward, backward, AdamW) and the
size of its optimised HLO, CLA2 at `tiny` width with `unroll=1`, each in fresh processes.

    python experiments/benchmarks/compile_time.py
    python experiments/benchmarks/compile_time.py --repeats 1 --layers 20 80   # quick look

Expected: 320 layers over 20 at most 1.3 in HLO size and 1.5 in time. About four minutes on two CPU
cores. With `--unrolled` the same without a scan, for comparison (slow: try `--layers 20 40`).
"""

import dataclasses
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class CompileTime:
    """Compile time and HLO size of a train step against depth."""

    layers: tuple[int, ...] = (20, 80, 320)
    """Depths; the first is the one that the others are compared with."""
    repeats: int = 5
    """Fresh processes for each depth; the median is reported."""
    unrolled: bool = False
    """Every layer in the program instead of a scan."""
    out: Path | None = None
    """Also write the measurements to this CSV file."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One measurement: seconds to trace and lower, to compile; characters of optimised HLO."""

    trace: float
    compile: float
    hlo: int


def compile_train_step(num_layers: int, unrolled: bool) -> Compiled:
    """Compile a train step of a CLA2 decoder of `tiny` width."""
    import jax
    import jax.numpy as jnp

    from cla_jax import KVSharing, model
    from cla_jax.configs import ExecutionConfig, OptimizerConfig
    from cla_jax.training.optimizer import make_optimizer
    from cla_jax.training.step import Model, init_state, make_train_step

    config = dataclasses.replace(
        model("tiny/MQA-CLA2"), name="depth", sharing=KVSharing.cla(num_layers, factor=2)
    )
    decoder = Model(config, ExecutionConfig(compute_dtype="float32", scan=not unrolled))
    optimizer = make_optimizer(OptimizerConfig(), steps=100)
    state = jax.eval_shape(lambda: init_state(decoder, optimizer, seed=0))
    tokens = jax.ShapeDtypeStruct((2, config.sequence_length + 1), jnp.int32)
    start = time.perf_counter()
    lowered = make_train_step(decoder, optimizer).lower(state, {"tokens": tokens})
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    return Compiled(traced - start, done - traced, len(compiled.as_text() or ""))


def main(options: CompileTime) -> None:
    """Measure every depth, print a row each."""
    rows = [
        "layers,trace_seconds,compile_seconds,total_seconds,hlo_characters,time_ratio,hlo_ratio"
    ]
    print(rows[0].replace(",", "  "))
    first: tuple[float, int] | None = None
    # One task for each process: nothing is cached from the one before. Depths take turns, so that
    # whatever else the machine does falls on all of them.
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    measured: dict[int, list[Compiled]] = {num_layers: [] for num_layers in options.layers}
    for _ in range(options.repeats):
        for num_layers in options.layers:
            job = processes.submit(compile_train_step, num_layers, options.unrolled)
            measured[num_layers].append(job.result())
    for num_layers, runs in measured.items():
        trace = statistics.median(run.trace for run in runs)
        compile_ = statistics.median(run.compile for run in runs)
        total = statistics.median(run.trace + run.compile for run in runs)
        hlo = runs[0].hlo
        first = first or (total, hlo)
        figures = (trace, compile_, total, hlo, total / first[0], hlo / first[1])
        rows.append(f"{num_layers}," + ",".join(f"{x:.3f}" for x in figures).replace(".000", ""))
        print(rows[-1].replace(",", "  "), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main(tyro.cli(CompileTime, description=__doc__))
