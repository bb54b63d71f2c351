"""Decoding at 1B: tokens/s, ms per step, and the share of the read bandwidth that a step attains.

    python experiments/benchmarks/decode.py --out decode.csv
    python experiments/benchmarks/decode.py --models 1B/H128-MQA-CLA2 --batch 64 \
        --context 8192 --profile
    python experiments/benchmarks/decode.py --models tiny/MQA tiny/MQA-CLA2 --batch 1 4 \
        --context 64 256 --prefill

A step must read the weights once and K/V once for every layer, readers too (CLA section 2.3); the
ceiling is what this device reads, measured in the same run. Batch 0 is the largest that the planner
lets fit. Random weights and K/V; times are of `generate`'s own loop. `--stacked` sets the same step
beside it with the weights stacked as training has them, `--prefill` times fast prefill against the
whole forward pass. `--profile` says behind each row what kernels its step consists of; with
`--out decode.csv` also in `decode.profile.md`. Results of record: docs/results.md.
"""

import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from cla_jax import model
from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.evaluation.decoding import (
    DecodeCosts,
    DecodeLoop,
    decode_costs,
    memory_limit,
    random_decoder,
    read_bandwidth,
)
from cla_jax.evaluation.profiling import Part, breakdown, op_names, traced
from cla_jax.inference import KVCache, prefill
from cla_jax.inference.planning import largest_batch, step_reads
from cla_jax.inference.sizes import format_size, parse_size
from cla_jax.models import Decoder, UnstackedDecoder
from cla_jax.reporting import Column, markdown
from cla_jax.sharing import KVSharing

COLUMNS = (
    "model", "batch", "context", "ms_per_step", "tokens_per_second", "read_gb", "tb_per_second",
    "of_ceiling", "cache_gb", "temporary_gb", "attention", "compile_s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time decoding steps."""

    models: tuple[str, ...] = (
        "1B/H128-MHA",
        "1B/H128-GQA4",
        "1B/H128-MQA",
        "1B/H128-MQA-CLA2",
        "1B/H128-MQA-CLA4",
    )
    """Models by name."""
    batch: tuple[int, ...] = (1, 16, 64, 256, 0)
    """Rows; 0 is the largest batch that fits."""
    context: tuple[int, ...] = (2048, 8192, 32768)
    """Keys of each row."""
    memory: str | None = None
    """That the planner counts on, as 80GiB. Default: what the device lets JAX have."""
    margin: float = 0.98
    """Share of the largest batch that is run, to stay clear of the edge."""
    stacked: bool = False
    """Also with the weights stacked."""
    prefill: bool = False
    """Also prefill: whole, and fast."""
    profile: bool = False
    """Also where the step's time goes, from a profiler's trace of eight steps."""
    out: Path | None = None
    """Write the table here too, as CSV, row by row; it must not exist yet."""


def line_of(costs: DecodeCosts, ceiling: float, name: str = "") -> str:
    """A row of the table, in the order of the columns."""
    values = (
        name or costs.model,
        str(costs.batch),
        str(costs.context),
        f"{costs.step_seconds * 1e3:.3f}",
        f"{costs.tokens_per_second:.0f}",
        f"{costs.read_bytes / 1e9:.3f}",
        f"{costs.read_rate / 1e12:.3f}",
        f"{costs.read_rate / ceiling:.3f}",
        f"{costs.cache_bytes / 1e9:.3f}",
        f"{costs.temporary_bytes / 1e9:.3f}",
        costs.attention,
        f"{costs.compile_seconds:.1f}",
    )
    return ",".join(values)


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of a call, after two that are not counted."""
    times = list[float]()
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def profile(decoder: UnstackedDecoder, costs: DecodeCosts, ceiling: float) -> str:
    """A table of a step's time by kind of operation, and its floor: the bytes at the ceiling."""
    batch, context = costs.batch, costs.context
    steps = min(8, context - 1)
    loop = DecodeLoop(decoder, batch, context, steps=steps)
    loop.run(context - steps, steps)
    try:
        operations = traced(lambda: loop.run(context - steps, steps), "jit_decode_block")
    except ValueError as error:  # the row before it stands
        return f"{decoder.config.name}: no profile: {error}\n"
    paths = op_names(loop.compiled.as_text())
    parts = breakdown(operations, paths, steps, costs.step_seconds)
    reads = step_reads(decoder.config, batch, context)
    floors = {"attention": reads.kv / ceiling, "products": reads.weights / ceiling}
    whole = sum(part.seconds for part in parts)
    total = Part("step", sum(part.operations for part in parts), whole, 1.0)
    floors["step"] = reads.total / ceiling
    columns = (
        Column[Part]("kind", f"{decoder.config.name}, {batch} x {context}", lambda p: p.kind),
        Column[Part]("operations", "operations", lambda p: p.operations, ".1f"),
        Column[Part]("us", "us", lambda p: 1e6 * p.seconds, ".1f"),
        Column[Part]("share", "of the step", lambda p: p.share, ".3f"),
        Column[Part]("floor", "floor, us", lambda p: _microseconds(floors.get(p.kind)), ".1f"),
    )
    return markdown((*parts, total), columns)


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds


def compare_prefill(config: ModelConfig, rows: int = 4, length: int = 2048) -> None:
    """Fast prefill against every layer at every position, both with the last logits alone."""
    length = min(length, config.sequence_length)
    decoder = random_decoder(config)
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, config.vocab_size)
    whole = jax.jit(lambda decoder, tokens: decoder.unembed(decoder.hidden(tokens)[:, -1:]))
    fast = jax.jit(prefill)
    cache = KVCache.create(config, rows, length)
    slow, quick = timed(lambda: whole(decoder, tokens)), timed(lambda: fast(decoder, tokens, cache))
    skipped = config.num_layers - 1 - config.sharing.owner_layers[-1]
    print(
        f"prefill {config.name}: {rows} x {length} tokens, whole forward {slow * 1e3:.2f} ms, fast "
        f"{quick * 1e3:.2f} ms ({1 - quick / slow:.1%} less; {skipped} of {config.num_layers} "
        "layers skipped whole, the last owner's query side too)",
        flush=True,
    )


def main(options: Benchmark) -> None:
    """Measure every row; one that fails is reported and the others still run."""
    configs = [model(name) for name in options.models]  # a bad name fails before the first row
    if options.out is not None and options.out.exists():
        raise ValueError(f"{options.out} exists already; choose another --out")
    ceiling = read_bandwidth()
    limit = memory_limit() if options.memory is None else parse_size(options.memory)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, read ceiling "
        f"{ceiling / 1e12:.3f} TB/s, memory {format_size(limit) if limit else 'unknown'}"
    )
    if limit is None and 0 in options.batch:
        print("this device does not say how much memory there is: for batch 0 give --memory 16GiB")

    def show(line: str) -> None:
        print(line, flush=True)
        if options.out is not None:  # row by row: what was measured stays
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def show_profile(table: str) -> None:
        print(f"\n{table}", flush=True)
        if options.out is not None:
            with options.out.with_suffix(".profile.md").open("a", encoding="utf-8") as file:
                file.write(f"{table}\n")

    show(",".join(COLUMNS))
    for config in configs:
        name = config.name
        decoder = random_decoder(config)
        for context in options.context:
            most = int(options.margin * largest_batch(config, context, limit)) if limit else None
            for batch in options.batch:
                size = batch or most
                if not size or (most is not None and size > most):
                    if batch:
                        print(f"# {name}, context {context}: batch {batch} does not fit")
                    continue
                try:
                    costs = decode_costs(decoder, size, context)
                    show(line_of(costs, ceiling))
                    if options.profile:
                        show_profile(profile(decoder, costs, ceiling))
                except jax.errors.JaxRuntimeError as error:
                    print(f"{name}, batch {size}, context {context}: {str(error)[:200]}")
                    gc.collect()  # the error's frames hold arrays
        del decoder
        if options.stacked:
            show(stacked_line(config, ceiling))
    if options.prefill:
        for config in configs:
            compare_prefill(config)
        upper = KVSharing.shared_upper_half(configs[-1].num_layers)
        compare_prefill(dataclasses.replace(configs[-1], name="SharedUpperHalf", sharing=upper))


def stacked_line(config: ModelConfig, ceiling: float) -> str:
    """The step with bfloat16 weights, but stacked over the layers as training has them."""

    @jax.jit
    def make(key: jax.Array) -> Decoder:
        decoder = Decoder(config, ExecutionConfig(), rngs=nnx.Rngs(key))
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), decoder)

    costs = decode_costs(make(jax.random.key(0)), 64, min(8192, 4 * config.sequence_length))  # pyright: ignore
    return line_of(costs, ceiling, f"{config.name} (stacked weights)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Benchmark, description=__doc__))
    except ValueError as error:
        sys.exit(f"decode: {error}")
