"""Cross-layer reuse in L2: does a reader find its owner's K/V there, and up to which size?

CLA (section 2.3) has every layer read K/V from memory, shared or not. That need not be so where one
layer's K/V stay in the chip's L2 (60 MB on an H200) until the next layer reads them.

    python experiments/benchmarks/cross_layer_reuse.py --deadline 500      # one GPU, minutes
    python experiments/benchmarks/cross_layer_reuse.py --smoke             # seconds, anywhere
    python experiments/benchmarks/cross_layer_reuse.py --from runs/cross-layer-reuse/results.csv

Three questions, for K/V of 2 MB to 512 MB a layer:

(a) Attention alone. `decode_attention` runs over the layers of a stack, each twice: at once
    (together), or when all others have been read (apart). Both orders are one compiled program.
(b) The same with the products of a layer behind every read, so that W MB of weights pass through
    the L2 as well: 14 MB for a model like Pythia-160M, 84 MB at 1B. And with the batch in halves:
    owner and reader run on one half, then on the other; the weights are then read twice.
(c) Whole steps of `generate`'s own loop. CLA (each reader behind its owner) against the same model
    whose readers are half the depth away from their owners: parameters, kernels and bytes are the
    same. Beside them the step without sharing and, where a trace can be read, the time of attention
    in owners and in readers.

The second read's time over the first's is 1 - (apart - together) / (first read), a difference of
times under the same conditions. OUT gets `results.csv`, row by row, `results.md` and the figure.
"""

import concurrent.futures
import dataclasses
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from cla_kernels import choose_implementation

from cla_jax import model
from cla_jax.configs import ModelConfig
from cla_jax.evaluation.decoding import DecodeLoop, random_decoder
from cla_jax.evaluation.profiling import layer_seconds, op_names, traced
from cla_jax.evaluation.rereads import (
    Chain,
    CompiledChain,
    Heads,
    apart,
    compile_chain,
    per_call,
    together,
)
from cla_jax.experiment import run_experiment
from cla_jax.reporting import figures, markdown
from cla_jax.reporting.csv_records import append_record, read_records
from cla_jax.reporting.rereads import (
    COLUMNS,
    Reread,
    rereads,
    verdict,
)
from cla_jax.sharing import KVSharing

MIB = 2**20
STEPS, TRACED = 16, 4  # of decoding in a timed call, and in a traced one


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the second read of K/V that two layers share."""

    sizes: tuple[float, ...] = (2, 8, 16, 24, 32, 48, 64, 128, 512)
    """MiB of K/V of one layer, for (a) and (b)."""
    weights: tuple[float, ...] = (0, 14.2, 84)
    """MB of weights behind every read."""
    heads: tuple[int, int, int] = (16, 1, 128)
    """Query heads, KV heads and head dim, for (a) and (b)."""
    rows: int = 8
    """Of the batch, an even number; contexts follow from the sizes."""
    models: tuple[str, ...] = ("pythia-160m/MLKV-6", "1B/H128-MQA-CLA2")
    """That decode, for (c): each shares K/V among two layers or more."""
    step_sizes: tuple[float, ...] = (2, 8, 16, 32, 64, 128)
    """MiB of K/V of one layer, for (c)."""
    rotation: float = 180
    """MB read before a layer's K/V are read again `apart`: three times the L2."""
    milliseconds: float = 4
    """Of one call of (a) and (b), about."""
    repeats: int = 7
    """Of every measurement."""
    deadline: float = math.inf
    """Seconds after which nothing new is begun; tables are still written."""
    smoke: bool = False
    """Tiny sizes, in seconds, on a processor too."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A `results.csv`, to write table and figure of it again."""
    out: Path = Path("runs/cross-layer-reuse")
    """Where everything goes."""


def tiny(options: Options) -> Options:
    """What `--smoke` measures."""
    return dataclasses.replace(
        options, sizes=(1 / 64, 1 / 32), weights=(0, 0.05), heads=(4, 1, 32), rows=4, repeats=3,
        models=("tiny/MQA-CLA2",), step_sizes=(1 / 32, 1 / 16), rotation=0.1, milliseconds=0.1,
    )  # fmt: skip


def check(options: Options) -> list[ModelConfig]:
    """The models, before any work.

    Raises:
        ValueError: an option that cannot be.
    """
    if options.rows < 2 or options.rows % 2:
        nearest = max(2, options.rows - options.rows % 2)
        raise ValueError(
            f"--rows {options.rows}: expected an even number, the nearest is {nearest}"
        )
    for size in (*options.sizes, *options.step_sizes):
        if size <= 0:
            raise ValueError(f"a size of {size} MiB: expected a positive number")
    if min(options.weights, default=0) < 0:
        raise ValueError(f"--weights {min(options.weights)}: expected 0 or more")
    if options.repeats < 3:
        raise ValueError(f"--repeats {options.repeats}: expected at least 3")
    configs = [model(name) for name in options.models]
    for config in configs:
        far_apart(config)
    if not options.smoke and jax.default_backend() == "cpu":
        raise ValueError("JAX finds a CPU and no GPU: --smoke runs here")
    return configs


def noise(differences: Sequence[float]) -> float:
    """Half the range, of five or more without the extremes."""
    kept = sorted(differences)[1:-1] if len(differences) >= 5 else differences
    return (max(kept) - min(kept)) / 2


class Reads:
    """(a) and (b): what is measured of one size, and the first reads of all."""

    def __init__(self, options: Options, device: str) -> None:
        self._options, self._device = options, device
        self._first: dict[tuple[Heads, int], float] = {}

    def first(self, heads: Heads, size: float) -> float:
        """Microseconds of a read from memory, nothing between reads."""
        length = heads.length(round(size * MIB), self._options.rows)
        if (heads, length) not in self._first:
            self._measure(compile_chain(self._chain(heads, length, 0)))
        return self._first[heads, length]

    def _chain(self, heads: Heads, length: int, weights: int, halves: bool = False) -> Chain:
        return Chain.of(
            heads, self._options.rows, length, weights, halves=halves,
            rotation=1e6 * self._options.rotation, seconds=1e-3 * self._options.milliseconds,
        )  # fmt: skip

    def _measure(
        self, whole: CompiledChain, halves: CompiledChain | None = None
    ) -> dict[str, tuple[float, ...]]:
        """Microseconds of two reads of a layer, with what is between, by the order."""
        run = whole.runner()
        orders = {"apart": apart(whole.chain), "together": together(whole.chain)}
        runs: dict[str, Callable[[int], float]] = {
            name: lambda calls, order=order: run(order, calls) for name, order in orders.items()
        }
        pairs = dict.fromkeys(orders, whole.chain.layers * whole.chain.rounds)
        if halves is not None:
            run_halves, order = halves.runner(), together(halves.chain)
            runs["halves"] = lambda calls: run_halves(order, calls)
            pairs["halves"] = halves.chain.layers * halves.chain.rounds
        found = per_call(runs, repeats=self._options.repeats)
        found = {name: tuple(1e6 * t / pairs[name] for t in found[name]) for name in found}
        chain = whole.chain
        if not chain.weight_bytes:
            self._first[chain.heads, chain.length] = statistics.median(found["apart"]) / 2
        return found

    def rows(self, size: float) -> list[Reread]:
        """A row for each amount of weights, by rising weights: first reads come of the least."""
        options, heads = self._options, Heads(*self._options.heads)
        length = heads.length(round(size * MIB), options.rows)
        amounts = sorted({0, *(round(1e6 * amount) for amount in options.weights)})
        chains = {
            (amount, halves): self._chain(heads, length, amount, halves)
            for amount in amounts
            for halves in (False, True)
            if amount or not halves  # without weights, halves are what a smaller size is
        }
        threads = min(len(chains), os.cpu_count() or 1)
        # All before the first is timed: compiling disturbs that.
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            compiled = dict(zip(chains, pool.map(compile_chain, chains.values()), strict=True))
        rows: list[Reread] = []
        for amount in amounts:
            whole = compiled[amount, False]
            found = self._measure(whole, compiled.get((amount, True)))
            middle = {name: statistics.median(times) for name, times in found.items()}
            saved = [a - t for a, t in zip(found["apart"], found["together"], strict=True)]
            chain = whole.chain
            rows.append(
                Reread(
                    "reads", heads.name, chain.kv_bytes, chain.weight_bytes,
                    self._first[heads, length], middle["apart"], middle["together"], noise(saved),
                    halves=middle.get("halves"), attention=whole.implementation,
                    device=self._device,
                )
            )  # fmt: skip
        return rows


def far_apart(config: ModelConfig) -> ModelConfig:
    """With as many owners, which come first: each reader is as many layers behind as can be.

    Raises:
        ValueError: a model that does not share.
    """
    owners = config.kv_layers
    if owners == config.num_layers:
        raise ValueError(f"{config.name} shares no K/V; the nearest that can be asked is its CLA2")
    far = KVSharing(tuple(layer % owners for layer in range(config.num_layers)))
    return dataclasses.replace(config, name=f"{config.name}, far apart", sharing=far)


def layer_weights(config: ModelConfig) -> int:
    """Bytes of one layer's weights, on average."""
    tables = config.vocab_size * config.d_model * (1 if config.tied_embeddings else 2)
    return 2 * (config.parameters - tables) // config.num_layers


def step_rows(
    config: ModelConfig,
    reads: Reads,
    options: Options,
    device: str,
    left: Callable[[], float],
    keep: Callable[[Reread], None],
) -> None:
    """(c): the steps of one model at every size; the loops are compiled once, for the largest."""
    heads, rows = Heads(config.query_heads, config.kv_heads, config.head_dim), options.rows
    sizes = sorted(options.step_sizes)
    firsts: dict[float, float] = {}
    for size in sizes:  # before weights and caches take their memory
        if left() <= 0:
            return
        firsts[size] = reads.first(heads, size)
    capacity = heads.length(round(sizes[-1] * MIB), rows)
    unshared = dataclasses.replace(config, sharing=KVSharing.none(config.num_layers))
    configs = {"together": config, "apart": far_apart(config), "unshared": unshared}
    loops: dict[str, DecodeLoop] = {}
    for name, variant in configs.items():
        if left() <= 0:
            return
        loops[name] = DecodeLoop(random_decoder(variant), rows, capacity, steps=STEPS)
    q = jax.ShapeDtypeStruct((rows, 1, heads.query, heads.dim), jnp.bfloat16)
    attention = choose_implementation(q, loops["together"].fill().k[0])[0]
    paths = op_names(loops["together"].compiled.as_text())
    readers = [not config.sharing.owns(layer) for layer in range(config.num_layers)]
    for size in sizes:
        if left() <= 0:
            return
        length = heads.length(round(size * MIB), rows)
        steps = min(STEPS, length - 1)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for repeat in range(options.repeats + 1):
            for name, loop in loops.items():  # in turn, at the same clock rates
                seconds = loop.run(length - steps, steps) / steps
                if repeat:
                    times[name].append(1e6 * seconds)
        saved = [a - t for a, t in zip(times["apart"], times["together"], strict=True)]
        middle = {name: statistics.median(found) for name, found in times.items()}
        owner, reader = None, None
        some = min(TRACED, steps)
        try:
            run = lambda: loops["together"].run(length - some, some)  # noqa: B023, E731
            layers = layer_seconds(
                traced(run, "jit_decode_block"), paths, some, config.num_layers
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            print(f"# {config.name}: no trace: {str(error)[:200]}", flush=True)
            layers = None
        if layers is not None:
            timed = list(zip(layers, readers, strict=True))
            owner = 1e6 * statistics.fmean(t for t, reads_again in timed if not reads_again)
            reader = 1e6 * statistics.fmean(t for t, reads_again in timed if reads_again)
        keep(
            Reread(
                "step", config.name, rows * length * heads.row_bytes, layer_weights(config),
                firsts[size], middle["apart"], middle["together"], noise(saved),
                readers=sum(readers), unshared=middle["unshared"], traced_first=owner,
                traced_second=reader, attention=attention, device=device,
            )
        )  # fmt: skip


def write(rows: Sequence[Reread], out: Path) -> None:
    """Table, verdict and figure."""
    text = f"{markdown(rows, COLUMNS)}\n{verdict(rows)}\n"
    print(f"\n{text}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".results.md"
    temporary.write_text(text, "utf-8")
    temporary.replace(out / "results.md")
    for path in figures.save(rereads(rows), out / "rereads"):
        print(f"wrote {path}")


def main(options: Options) -> int:
    """Run it; returns how many sizes or models failed."""
    if options.source is not None:
        write(read_records(options.source, Reread, "measurements of rereads"), options.out)
        return 0
    began = time.monotonic()
    if options.smoke:
        options = tiny(options)
    configs = check(options)
    saved = options.out / "results.csv"
    if saved.exists():
        raise ValueError(f"{saved} exists already; choose another --out, or --from {saved}")
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"# {device}", flush=True)
    rows: list[Reread] = []
    failed = 0

    def left() -> float:
        return began + options.deadline - time.monotonic()

    def keep(row: Reread) -> None:
        append_record(saved, row)  # what was measured stays
        rows.append(row)
        halves = "" if row.halves is None else f", in halves {row.halves:.2f} us"
        seen = "" if row.traced_ratio is None else f", traced {row.traced_ratio:.3f}"
        print(
            f"{row.part:5} {row.name:24} {row.kv_bytes / 1e6:7.1f} MB, "
            f"{row.weight_bytes / 1e6:5.1f} MB between: first {row.first:.2f} us, apart "
            f"{row.apart:.2f} us, together {row.together:.2f} us{halves}: second / first "
            f"{row.ratio:.3f} +- {row.ratio_noise:.3f}{seen} ({row.attention})",
            flush=True,
        )

    reads = Reads(options, device)

    def size_of(size: float) -> Callable[[], None]:
        def measure() -> None:
            for row in reads.rows(size):
                keep(row)

        return measure

    def step_of(config: ModelConfig) -> Callable[[], None]:
        return lambda: step_rows(config, reads, options, device, left, keep)

    work = {f"{size:g} MiB": size_of(size) for size in sorted(options.sizes)}
    work |= {config.name: step_of(config) for config in configs}
    for name, measure in work.items():
        if left() <= 0:
            print(f"# stopped after {options.deadline:.0f} s, before {name}", flush=True)
            break
        try:
            measure()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            print(f"# {name}: {str(error)[:300]}", flush=True)
            failed += 1
        gc.collect()  # the error's frames hold arrays
    if not rows:
        raise ValueError("nothing was measured")
    write(rows, options.out)
    return failed


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    run_experiment("cross_layer_reuse", lambda: main(options))
