"""Decoding at 1B: tokens/s, ms per step, and the share of the read bandwidth that a step attains.

    python experiments/benchmarks/decode.py --out decode.csv
    python experiments/benchmarks/decode.py --models tiny/MQA tiny/MQA-CLA2 --batch 1 4 \
        --context 64 256 --prefill

A step must read the weights once and K/V once for every layer, readers too (CLA section 2.3); the
ceiling is what this device reads, measured in the same run. Batch 0 is the largest that the planner
lets fit. Random weights and K/V; times are of `generate`'s own loop. `--stacked` sets the same step
beside it with the weights stacked as training has them, `--prefill` times fast prefill against the
whole forward pass. Results of record: docs/results.md.
"""

import csv
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
    decode_costs,
    memory_limit,
    random_decoder,
    read_bandwidth,
)
from cla_jax.inference import KVCache, prefill
from cla_jax.inference.planning import largest_batch
from cla_jax.inference.sizes import format_size, parse_size
from cla_jax.models import Decoder
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
    out: Path | None = None
    """Write the table here too, as CSV."""


def row_of(costs: DecodeCosts, ceiling: float, name: str = "") -> dict[str, Any]:
    return {
        "model": name or costs.model,
        "batch": costs.batch,
        "context": costs.context,
        "ms_per_step": f"{costs.step_seconds * 1e3:.3f}",
        "tokens_per_second": f"{costs.tokens_per_second:.0f}",
        "read_gb": f"{costs.read_bytes / 1e9:.3f}",
        "tb_per_second": f"{costs.read_rate / 1e12:.3f}",
        "of_ceiling": f"{costs.read_rate / ceiling:.3f}",
        "cache_gb": f"{costs.cache_bytes / 1e9:.3f}",
        "temporary_gb": f"{costs.temporary_bytes / 1e9:.3f}",
        "attention": costs.attention,
        "compile_s": f"{costs.compile_seconds:.1f}",
    }


def timed(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of a call, after two that are not counted."""
    times = list[float]()
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


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
    ceiling = read_bandwidth()
    limit = memory_limit() if options.memory is None else parse_size(options.memory)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, read ceiling "
        f"{ceiling / 1e12:.3f} TB/s, memory {format_size(limit) if limit else 'unknown'}"
    )
    print(",".join(COLUMNS), flush=True)
    rows = list[dict[str, Any]]()

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print(",".join(str(row[column]) for column in COLUMNS), flush=True)

    for name in options.models:
        config = model(name)
        decoder = random_decoder(config)
        for context in options.context:
            most = int(options.margin * largest_batch(config, context, limit)) if limit else None
            for batch in options.batch:
                size = batch or most
                if size is None or (most is not None and size > most):
                    continue
                try:
                    show(row_of(decode_costs(decoder, size, context), ceiling))
                except jax.errors.JaxRuntimeError as error:
                    print(f"{name}, batch {size}, context {context}: {str(error)[:200]}")
                    gc.collect()  # the error's frames hold arrays
        del decoder
        if options.stacked:
            show(stacked_row(config, ceiling))
    if options.prefill:
        for name in options.models:
            config = model(name)
            compare_prefill(config)
        config = model(options.models[-1])
        upper = KVSharing.shared_upper_half(config.num_layers)
        compare_prefill(dataclasses.replace(config, name="SharedUpperHalf", sharing=upper))
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list[str](COLUMNS), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {options.out}")


def stacked_row(config: ModelConfig, ceiling: float) -> dict[str, Any]:
    """The step with bfloat16 weights, but stacked over the layers as training has them."""

    @jax.jit
    def make(key: jax.Array) -> Decoder:
        decoder = Decoder(config, ExecutionConfig(), rngs=nnx.Rngs(key))
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), decoder)

    costs = decode_costs(make(jax.random.key(0)), 64, min(8192, 4 * config.sequence_length))  # pyright: ignore
    return row_of(costs, ceiling, f"{config.name} (stacked weights)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Benchmark, description=__doc__))
    except ValueError as error:
        sys.exit(f"decode: {error}")
