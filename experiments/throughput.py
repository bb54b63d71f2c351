"""The curve that no paper has: tokens/s at the largest batch that fits, against the sharing factor.

CLA (section 5) leaves end-to-end inference as future work: sharing does not reduce the bytes that a
step reads for a row, but what it leaves free in memory holds more rows, which share the reading of
the weights. Here the planner says how many rows fit, and the step is timed at 0.98 of that.

    python experiments/throughput.py             # one GPU, 1B, about ten minutes
    python experiments/throughput.py --verify    # and: is the planner right?
    python experiments/throughput.py --model tiny/MQA --memory 256MiB --context 64 256 \
        --factors 1 2 3

`--verify` takes the first factor and the first context: a prompt is prefilled and decoded at 0.98
of the planned batch; at 1.05 `generate` must refuse, and the device itself must run out of memory.
Random weights. Results of record: docs/results.md.
"""

import dataclasses
import gc
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from cla_jax import model
from cla_jax.configs import ModelConfig
from cla_jax.data.files import write_json
from cla_jax.evaluation.decoding import decode_costs, memory_limit, random_decoder, read_bandwidth
from cla_jax.experiment import run_experiment
from cla_jax.inference import KVCache, prefill
from cla_jax.inference.planning import MemorySettings, check_fits, largest_batch
from cla_jax.inference.sizes import format_size, parse_size
from cla_jax.reporting import csv_text, figures, terminal_table
from cla_jax.reporting.throughput import COLUMNS, Throughput, throughput
from cla_jax.sharing import KVSharing

RUNS, FAILS = 0.98, 1.05
GREEDY = MemorySettings(sampling=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure tokens/s at the largest batch that fits, for each sharing factor and context."""

    model: str = "1B/H128-MQA"
    """Whose architecture, under CLA with each factor."""
    factors: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 20)
    """Layers that share each K/V; 1 is no sharing."""
    context: tuple[int, ...] = (2048, 8192, 32768)
    """Keys of each row."""
    memory: str | None = None
    """That the planner counts on, as 80GiB. Default: what the device lets JAX have."""
    verify: bool = False
    """Also hold the planner against the device."""
    out: Path = Path("runs/throughput")
    """Where table and figure go."""


def shared_by(config: ModelConfig, factor: int) -> ModelConfig:
    """The architecture under CLA with a factor."""
    sharing = KVSharing.cla(config.num_layers, factor)
    return dataclasses.replace(config, name=f"{config.name}-CLA{factor}", sharing=sharing)


def main(options: Options) -> int:
    """Run it; returns how many points failed."""
    config = model(options.model)
    models = [shared_by(config, factor) for factor in options.factors]
    memory = memory_limit() if options.memory is None else parse_size(options.memory)
    if memory is None:
        raise ValueError("this device does not say how much memory there is: give --memory 16GiB")
    console = Console(highlight=False, soft_wrap=True)
    ceiling = read_bandwidth()
    device = f"{jax.devices()[0].device_kind}, {format_size(memory)}"
    console.print(f"{device}, read ceiling {ceiling / 1e12:.3f} TB/s")
    options.out.mkdir(parents=True, exist_ok=True)
    saved = options.out / "throughput.json"
    rows, failed = measured_before(saved, device), 0
    for factor, variant in zip(options.factors, models, strict=True):
        todo = [
            c for c in options.context if not any(r.is_of(options.model, factor, c) for r in rows)
        ]
        decoder = random_decoder(variant) if todo else None
        for context in todo:
            most = largest_batch(variant, context, memory, GREEDY)
            if not most:
                console.print(f"{variant.name}: not one row of {context:,} fits")
                continue
            assert decoder is not None
            try:
                costs = decode_costs(decoder, max(int(RUNS * most), 1), context, steps=8, repeats=2)
            except jax.errors.JaxRuntimeError as error:
                console.print(f"{variant.name} at {context:,}: {str(error)[:200]}", markup=False)
                failed += 1
                gc.collect()  # the error's frames hold arrays
                continue
            row = Throughput(
                options.model, factor, variant.kv_layers, context, most, costs.batch,
                costs.step_seconds * 1e3, costs.tokens_per_second, costs.read_rate / ceiling,
            )  # fmt: skip
            rows.append(row)
            plain = {"device": device, "rows": [dataclasses.asdict(r) for r in rows]}
            write_json(saved, plain)
            console.print(
                f"factor {factor}, context {context:,}: batch {costs.batch:,}, "
                f"{costs.step_seconds * 1e3:.2f} ms, {costs.tokens_per_second:,.0f} tokens/s"
            )
        del decoder
    rows = sorted(
        (
            row
            for row in rows
            if row.model == options.model
            and row.factor in options.factors
            and row.context in options.context
        ),
        key=lambda row: (row.context, row.factor),
    )
    if not rows:
        raise ValueError("nothing was measured")
    console.print(terminal_table(rows, COLUMNS))
    (options.out / "throughput.csv").write_text(csv_text(rows, COLUMNS), "utf-8")
    for path in figures.save(throughput(rows, subtitle=device), options.out / "throughput"):
        console.print(f"wrote {path}")
    if options.verify:
        verify(models[0], options.context[0], memory, console)
    return failed


def measured_before(path: Path, device: str) -> list[Throughput]:
    """What an interrupted run left, on the same device with the same memory."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text("utf-8"))
        rows = [Throughput(**row) for row in record["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no measurements: {error!r}; choose another --out") from None
    if record.get("device") != device:
        raise ValueError(
            f"{path} was measured on {record.get('device')}, this is {device}; choose another --out"
        )
    return rows


def verify(config: ModelConfig, context: int, memory: int, console: Console) -> None:
    """The planner's largest batch against the device's memory."""
    most = largest_batch(config, context, memory, GREEDY)
    if not most:
        raise ValueError(f"--verify: not one row of {context:,} fits")
    decoder = random_decoder(config)
    fits, over = int(RUNS * most), int(FAILS * most) + 1

    def run(batch: int) -> None:
        cache = jax.jit(lambda: KVCache.create(config, batch, context))()
        rows = min(max(8192 // context, 1), batch)
        tokens = jnp.asarray(np.zeros((rows, min(context, 8192)), np.int32))
        logits, cache = jax.jit(prefill, donate_argnums=2)(decoder, tokens, cache)
        jax.block_until_ready(logits)
        del cache
        decode_costs(decoder, batch, context, steps=4, repeats=1)

    console.print(f"planner: {config.name} at context {context:,}: largest batch {most:,}")
    run(fits)
    console.print(f"  {fits:,} ({RUNS}): runs")
    try:
        check_fits(config, over, context, memory_bytes=memory, sampling=False)
        console.print(f"  {over:,} ({FAILS}): was not refused: the planner is wrong")
    except ValueError as error:
        console.print(f"  {over:,} ({FAILS}): refused: {error}")
    try:
        run(over)
        console.print(f"  {over:,} ({FAILS}), tried all the same: runs: the planner is too careful")
    except jax.errors.JaxRuntimeError as error:
        console.print(f"  {over:,}, tried all the same: {str(error)[:120]}", markup=False)
    gc.collect()  # the error's frames hold arrays


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    run_experiment("throughput", lambda: main(options))
