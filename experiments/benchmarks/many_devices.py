"""Training and decoding on several devices of one machine, against one of them.

    python experiments/benchmarks/many_devices.py --out many_devices.csv
    python experiments/benchmarks/many_devices.py --only decode --out many_devices.csv
    python experiments/benchmarks/many_devices.py --model tiny/MQA --rows 2 --sequence-length 32 \
        --microbatches 2 --batch 4 --context 64 --out many_devices.csv

Parts, in this order (`--only` takes some):

  links     an all-reduce of 1 GiB between the devices, and of 256 KiB, 64 in a row: what
            gradients cost, and what a decoding step's activations do.
  train     a train step of `--rows` rows on one device; then `data` and `fsdp` over all of them,
            with as many rows for each device.
  pipeline  `stage` over all devices, with as many rows for each, cut into `--microbatches`; beside
            `pipeline_ideal`, which counts bubble, rematerialisation and head and nothing else.
  decode    steps of `generate`'s own loop on one device, `tensor` and `data`; bytes of the cache
            on each device; the error of one step's logits against one device's.
  split     `data` and `fsdp` again, with as many rows in all as one device had.

Weights, tokens and K/V are random and made where they lie; parameters are float32, arithmetic is
bfloat16. Programs of a part are compiled before anything is timed: the first alone, since the
others then find most of its autotuned products, and those at once (`--compilers`). Every
measurement is written to `--out` as it is made; started again with the same file, the script
measures what is missing. Behind `--deadline` seconds nothing new is begun. Results of record:
docs/results.md.

On GPUs let JAX have most of the memory, XLA_PYTHON_CLIENT_MEM_FRACTION=0.9. A folder named by
JAX_COMPILATION_CACHE_DIR keeps compiled programs for the next time.
"""

import dataclasses
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from cla_kernels import choose_implementation
from jax.sharding import PartitionSpec

from cla_jax import model
from cla_jax.configs import (
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    Remat,
    TrainConfig,
)
from cla_jax.evaluation.collectives import bytes_by_axis, collectives
from cla_jax.evaluation.decoding import DecodeLoop, random_decoder
from cla_jax.evaluation.training import TrainLoop
from cla_jax.inference import extend
from cla_jax.models.attention import attention_path
from cla_jax.parallel import (
    Layout,
    check_mesh,
    in_force,
    make_layout,
)
from cla_jax.reporting.csv_records import append_record, read_records
from cla_jax.reporting.many_devices import DeviceMeasurement, report, timings
from cla_jax.training.hardware import peak_flops

type Part = Literal["links", "train", "pipeline", "decode", "split"]
PARTS: tuple[Part, ...] = ("links", "train", "pipeline", "decode", "split")
WARM_UP = 2
DECODE_STEPS = 16
_KERNEL = re.compile(r'custom_call_target="([^"]*(?:mosaic|fmha)[^"]*)"')


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time training and decoding on several devices."""

    model: str = "1B/H128-MQA-CLA2"
    """By name."""
    only: tuple[Part, ...] = PARTS
    """Parts to run."""
    devices: int = 2
    """That every mesh is made of."""
    rows: int = 16
    """Of a train step, for each device."""
    sequence_length: int = 2048
    """Tokens of a row."""
    microbatches: tuple[int, ...] = (8, 16)
    """Of the pipeline."""
    remat: Remat = "dots"
    """What the backward pass recomputes, on any mesh."""
    unroll: int = 10
    """Repeats of a segment in a step of its scan."""
    loss_chunk: int = 16384
    """Tokens of each device whose logits exist at a time."""
    steps: int = 5
    """Timed, behind two that are not; of decoding, calls of 16 steps."""
    batch: int = 64
    """Rows that decode."""
    context: int = 8192
    """Keys of each."""
    compilers: int = 4
    """Programs that are compiled at once, behind the first."""
    deadline: float | None = None
    """Seconds from the start behind which no measurement is begun."""
    out: Path = Path("many_devices.csv")
    """A row for each measurement; those that are there are not made again."""


class Session:
    """What is left to do, the time that is left, and what was measured."""

    def __init__(self, options: Benchmark) -> None:
        self.options, self._began = options, time.monotonic()
        kind = jax.devices()[0].device_kind
        self._common = {"model": options.model, "device": kind, "jax": jax.__version__}
        self.found: list[DeviceMeasurement] = []
        if options.out.exists():
            self.found = read_records(options.out, DeviceMeasurement)
            if others := {f"{m.device}, jax {m.jax}" for m in self.found} - {
                f"{kind}, jax {jax.__version__}"
            }:
                raise ValueError(
                    f"{options.out} was measured on {others.pop()}, this is {kind}, jax "
                    f"{jax.__version__}: choose another --out"
                )

    def wanted(self, **what: Any) -> DeviceMeasurement | None:
        """A measurement that is to be made, without its results; None: it is there, or too late."""
        one = DeviceMeasurement(**self._common, **what)
        if one.key in {m.key for m in self.found}:
            self.say(f"{one.name}: in {self.options.out} already")
            return None
        return None if self.late(one.name) else one

    def late(self, what: str) -> bool:
        """Whether the deadline is over, which is said."""
        deadline = self.options.deadline
        if deadline is None or time.monotonic() - self._began < deadline:
            return False
        self.say(f"{what}: not begun, the deadline of {deadline:g} s is over")
        return True

    def keep(self, one: DeviceMeasurement) -> None:
        """Write a measurement down at once."""
        append_record(self.options.out, one)
        self.found.append(one)
        low, median, high = (1e3 * (s or 0.0) for s in (one.fastest, one.seconds, one.slowest))
        self.say(
            f"{one.name}: {median:.3f} ms ({low:.3f} to {high:.3f}), {one.rate or 0:,.0f}/s "
            f"{one.attention}"
        )

    def say(self, text: str) -> None:
        """Progress, with the seconds from the start."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)


def measure_links(session: Session) -> None:
    """All-reduces of float32, a large one (on a CPU not so large) and a row of small ones."""
    devices = session.options.devices
    layout = Layout.on(MeshConfig(data=devices), model(session.options.model))
    spec = PartitionSpec("data")
    for length, repeats in ((2**28 if jax.default_backend() != "cpu" else 2**22, 1), (2**16, 64)):
        one = session.wanted(
            part="links", mesh=f"data={devices}", devices=devices, rows=devices, length=length
        )
        if one is None:
            continue

        def mean(x: jax.Array, repeats: int = repeats) -> jax.Array:
            return jax.lax.fori_loop(0, repeats, lambda _, x: jax.lax.pmean(x, "data"), x)

        with in_force(layout):
            ones = jax.jit(jnp.ones, static_argnums=(0, 1), out_shardings=layout.of(("batch",)))
            send = jax.jit(jax.shard_map(mean, in_specs=spec, out_specs=spec, check_vma=False))
            x, times = ones((devices, length), "float32"), list[float]()
            for _ in range(WARM_UP + session.options.steps):
                began = time.perf_counter()
                jax.block_until_ready(send(x))
                times.append((time.perf_counter() - began) / repeats)
        session.keep(dataclasses.replace(one, **timings(times[WARM_UP:], 4.0 * length)))


def recipe(options: Benchmark, mesh: MeshConfig, rows: int, microbatches: int = 0) -> TrainConfig:
    """Of a train step of so many rows on a mesh."""
    execution = ExecutionConfig(
        remat=options.remat,
        unroll=options.unroll,
        loss_chunk=options.loss_chunk,
        pipeline_microbatches=microbatches,
    )
    return TrainConfig(
        steps=1000,
        data=DataConfig(sequence_length=options.sequence_length, batch_size=rows),
        execution=execution,
        mesh=mesh,
    )


def recipes(options: Benchmark, parts: Sequence[Part]) -> Iterator[tuple[Part, TrainConfig]]:
    """The train steps of some parts; those of one mesh follow each other."""
    count, one, all_ = options.devices, options.rows, options.rows * options.devices
    split = (MeshConfig(data=count), MeshConfig(fsdp=count))
    if {"train", "pipeline", "split"} & {*parts}:
        yield "train", recipe(options, MeshConfig(), one)
    if "train" in parts:
        for mesh in split:
            yield "train", recipe(options, mesh, all_)
    if "pipeline" in parts:
        for microbatches in options.microbatches:
            yield "pipeline", recipe(options, MeshConfig(stage=count), all_, microbatches)
    if "split" in parts:
        for mesh in split:
            yield "split", recipe(options, mesh, one)


def measure_training(session: Session, config: ModelConfig, parts: Sequence[Part]) -> None:
    """Compile every train step of these parts that is wanted, then time them, mesh by mesh."""
    options = session.options
    jobs: list[tuple[DeviceMeasurement, TrainLoop]] = []
    for part, training in recipes(options, parts):
        one = session.wanted(
            part=part, mesh=str(training.mesh), devices=training.mesh.devices,
            rows=training.data.batch_size, length=options.sequence_length,
            microbatches=training.execution.pipeline_microbatches, remat=options.remat,
        )  # fmt: skip
        if one is not None:
            layout = Layout.on(training.mesh, config)
            jobs.append((one, TrainLoop(config, training, layout)))
    failed = compile_all(session, jobs)
    kept: tuple[str, Any] = ("", None)
    for number, (one, loop) in enumerate(jobs):
        if number in failed or session.late(one.name):
            continue
        # A mesh's second program goes on with the state of its first.
        state, kept = (kept[1] if kept[0] == one.mesh else None), ("", None)
        fresh = state is None
        try:
            loop.begin(state)
            del state
            measured = timed_training(one, loop, config, options.steps)
            session.keep(measured if fresh else dataclasses.replace(measured, loss=None))
            kept = (one.mesh, loop.state)
        except jax.errors.JaxRuntimeError as error:
            session.say(f"{one.name} FAILED: {str(error)[:400]}")
        loop.end()


def compile_all(session: Session, jobs: Sequence[tuple[DeviceMeasurement, TrainLoop]]) -> set[int]:
    """Compile, the first alone and the others at once; which of them failed."""
    failed = set[int]()

    def work(number: int) -> None:
        one, loop = jobs[number]
        try:
            loop.compile()
            session.say(f"compiled {one.name} in {loop.compile_seconds:.1f} s")
        except Exception as error:  # whatever it is, the other programs are measured
            failed.add(number)
            session.say(f"compiling {one.name} FAILED: {type(error).__name__}: {str(error)[:400]}")

    if jobs:
        work(0)
    with ThreadPoolExecutor(session.options.compilers) as pool:
        list(pool.map(work, range(1, len(jobs))))
    return failed


def timed_training(
    one: DeviceMeasurement, loop: TrainLoop, config: ModelConfig, steps: int
) -> DeviceMeasurement:
    """A compiled and begun train step's times, and what its program says of itself."""
    runs = [loop.run() for _ in range(WARM_UP + steps)]
    found = timings([seconds for seconds, _ in runs[WARM_UP:]], one.rows * one.length)
    peak = peak_flops(one.devices)
    path = attention_path(config.head_dim, jnp.dtype("bfloat16"))
    return dataclasses.replace(
        one,
        **found,
        **of_program(loop.compiled, loop.layout),
        mfu=found["rate"] * config.flops_per_token(one.length) / peak if peak else None,
        loss=runs[0][1],
        compile_seconds=loop.compile_seconds,
        attention=f"{path.implementation}{kernels(loop.compiled)}",
    )


def of_program(compiled: Any, layout: Layout | None) -> dict[str, float]:
    """What a compiled program sends and takes."""
    sizes = {} if layout is None else dict(layout.mesh.shape)
    sent = bytes_by_axis(collectives(compiled.as_text() or "", sizes)) if layout else {}
    held: Any = compiled.memory_analysis()
    return {"sent_bytes": float(sum(sent.values())),
            "temporary_bytes": float(held.temp_size_in_bytes)}  # fmt: skip


def kernels(compiled: Any) -> str:
    """The attention kernels that a program calls, and from how many places."""
    calls = Counter(_KERNEL.findall(compiled.as_text() or ""))
    return "".join(f"; {count} x {name}" for name, count in calls.most_common())


def measure_decoding(session: Session, config: ModelConfig) -> None:
    """One device, then `tensor` and `data` over all, each compared with the logits of the one."""
    options, count = session.options, session.options.devices
    wanted = {
        mesh: session.wanted(
            part="decode", mesh=str(mesh), devices=mesh.devices, rows=options.batch,
            length=options.context,
        )
        for mesh in (MeshConfig(), MeshConfig(tensor=count), MeshConfig(data=count))
    }  # fmt: skip
    if not any(wanted.values()):
        return
    expected: np.ndarray | None = None
    for mesh, one in wanted.items():
        # One device's logits are what others are compared with: for them it is run again.
        if (one is None and mesh.devices > 1) or session.late(f"decode {mesh}"):
            continue
        try:
            measured, logits = timed_decoding(one, config, mesh, options)
        except jax.errors.JaxRuntimeError as error:
            session.say(f"decode {mesh} FAILED: {str(error)[:400]}")
            continue
        if mesh.devices == 1:
            expected = logits
        if measured is not None:
            error = None if expected is None else norm_of_error(logits, expected)
            session.keep(dataclasses.replace(measured, logits_error=error))


def timed_decoding(
    one: DeviceMeasurement | None, config: ModelConfig, mesh: MeshConfig, options: Benchmark
) -> tuple[DeviceMeasurement | None, np.ndarray]:
    """Times of decoding steps, and the logits of one behind ragged rows of the same K/V."""
    layout = make_layout(mesh, config)
    with in_force(layout):
        loop = DecodeLoop(
            random_decoder(config), options.batch, options.context, steps=DECODE_STEPS
        )
        # Every row has the same K/V: other lengths and tokens tell them apart.
        room = options.context - DECODE_STEPS
        lengths = room // 2 + np.arange(options.batch) * (room // 2) // options.batch
        tokens = np.arange(options.batch, dtype=np.int32)[:, None] % config.vocab_size
        step = jax.jit(extend, donate_argnums=2)
        logits, cache = step(loop.decoder, tokens, loop.at(lengths))
        host = np.asarray(logits, np.float32)
        del logits
        if one is None:
            return None, host
        loop.cache = cache
        each = cache_bytes(cache)
        local = cache.k[0].addressable_shards[0].data
        heads = config.query_heads * local.shape[3] // config.kv_heads
        queries = jax.ShapeDtypeStruct(
            (local.shape[1], 1, heads, config.head_dim), loop.decoder.execution.compute_dtype
        )
        implementation, _ = choose_implementation(queries, local)
        del cache, local
        start = options.context - DECODE_STEPS
        times = [loop.run(start, DECODE_STEPS) / DECODE_STEPS
                 for _ in range(WARM_UP + options.steps)]  # fmt: skip
    return dataclasses.replace(
        one,
        **timings(times[WARM_UP:], one.rows),
        **of_program(loop.compiled, layout),
        cache_bytes=float(max(each.values())),
        compile_seconds=loop.compile_seconds,
        attention=f"{implementation}{kernels(loop.compiled)}",
    ), host


def cache_bytes(cache: Any) -> dict[Any, int]:
    """Bytes of K/V by device, read from the buffers."""
    held = Counter[Any]()
    for stack in (*cache.k, *cache.v, *cache.k_scale, *cache.v_scale):
        for shard in stack.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return dict(held)


def norm_of_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm; NaN where anything is not finite."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(options: Benchmark, config: ModelConfig) -> None:
    """Whether everything that is asked for can be run, before any of it is.

    Raises:
        ValueError: too few devices, sizes that do not fit; names what works.
    """
    if options.devices < 2 or options.devices > len(jax.devices()):
        raise ValueError(
            f"--devices {options.devices}: there are {len(jax.devices())}, expected 2 or more, "
            "as many as there are at most"
        )
    for name in ("rows", "sequence_length", "steps", "batch", "compilers"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more"
            )
    for _, training in recipes(options, options.only):
        check_mesh(config, training)
    if "decode" in options.only:
        if options.context <= 2 * DECODE_STEPS:
            raise ValueError(f"--context {options.context}: expected more than {2 * DECODE_STEPS}")
        Layout.on(MeshConfig(tensor=options.devices), config)
        if options.batch % options.devices:
            raise ValueError(
                f"--batch {options.batch} does not divide by {options.devices} devices; the "
                f"nearest is {max(round(options.batch / options.devices), 1) * options.devices}"
            )


def main(options: Benchmark) -> None:
    """Run the parts; a program that fails is reported and the others still run."""
    config = model(options.model)
    check(options, config)
    session = Session(options)
    kinds = Counter(device.device_kind for device in jax.devices())
    by = "NCCL" if jax.default_backend() == "gpu" else "no NCCL: these are no GPUs"
    session.say(
        f"{', '.join(f'{count} x {kind}' for kind, count in kinds.items())}; jax "
        f"{jax.__version__}; collectives by {by}; {options.model}"
    )
    if "links" in options.only:
        measure_links(session)
    measure_training(session, config, [p for p in options.only if p in ("train", "pipeline")])
    if "decode" in options.only:
        measure_decoding(session, config)
    measure_training(session, config, [p for p in options.only if p == "split"])
    if not session.found:
        raise ValueError("nothing was measured")
    text = report(session.found)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("NCCL_DEBUG", "VERSION")  # it then says which it is, when it starts
    try:
        main(tyro.cli(Benchmark, description=__doc__))
    except ValueError as error:
        sys.exit(f"many_devices: {error}")
