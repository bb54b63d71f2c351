"""Which cut of its work makes the Mosaic GPU decode kernel the fastest, and by how much.

    PYTHONPATH=kernels python kernels/benchmarks/tune_decode.py
    ... --shapes 'B64-*-H128-int8' 'B16-*-H128-int8'  # names as in decode_attention.py --list
    ... --blocks 64 128 --stages 4 8 12 --workers 2
    ... --smoke                                       # two cuts in the interpreter, anywhere

A cut `128x6x1` is tiles of 128 keys, 6 of them in flight, 1 warpgroup that multiplies; `128x6x1w`
is the same, of which no row is cut (see `cla_kernels._tuning.Tuning`). Each that is asked for is
first made fit, as the kernel does it: fewer stages where shared memory ends. Where its tiles would
have to be smaller too, or its workers fewer, the shape is not timed with it. Every result is
compared with float32; what is right is timed as the benchmark does it, in turns beside the table's
own cut and cuDNN, so that a change of the clock meets all of them.

In the end, for each entry of the table (16 or 8 bits, and the most columns of a head): the cuts
that were timed on all its shapes, by the geometric mean of their speed against the table's. Half a
percent is noise. To take one over, write it into `_TUNED` in `kernels/cla_kernels/_tuning.py`, run
`tests/kernels` on the GPU, and then the benchmark.
"""

import concurrent.futures
import dataclasses
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from decode_report import geometric_mean
from decode_run import TOLERANCE, relative_error
from decode_shapes import Shape, select, standard_shapes

TABLE, PEER = "table", "cudnn"
SMOKE = Shape(2, 136, 4, 1, 64)
SHAPES = (
    "B1-S131072-N16-K1-H128-bf16", "B64-S4096-N16-K1-H128-bf16", "B256-S8192-N16-K1-H128-bf16",
    "B16-S8192-N32-K8-H128-bf16", "B64-S8192-N32-K1-H64-bf16", "B256-S8192-N32-K1-H64-bf16",
    "B16-S32768-N16-K1-H256-bf16", "B64-S8192-N32-K1-H256-bf16", "B64-S8192-N16-K1-H128-int8",
    "B64-S8192-N16-K1-H128-e4m3", "B16-S8192-N32-K8-H128-int8", "B64-S8192-N32-K1-H64-int8",
    "B16-S8192-N16-K1-H256-int8",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    shapes: tuple[str, ...] = SHAPES
    """Names or shell patterns of standard shapes."""
    blocks: tuple[int, ...] = (64, 128, 256)
    """Keys of a tile: multiples of 64."""
    stages: tuple[int, ...] = (4, 6, 8, 12)
    """Tiles in flight, at most."""
    workers: tuple[int, ...] = (1, 2)
    """Warpgroups that multiply; of two, only numbers of stages that 4 divides are tried."""
    whole: tuple[bool, ...] = (False,)
    """Whether rows are left whole: for short caches, `--whole True False` tries both."""
    rounds: int = 3
    """Times that each cut is timed, in turns; their median counts."""
    threads: int = min(12, os.cpu_count() or 1)
    """That compile."""
    deadline: float = math.inf
    """Seconds after which no other shape is begun."""
    smoke: bool = False
    """Two cuts of a tiny shape, checked in the interpreter and not timed."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one contestant on one shape: its error, seconds of a call in each round, or why not."""

    error: float = math.nan
    seconds: tuple[float, ...] = ()
    agreed: bool = True
    note: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def label(cut: Any) -> str:
    """Of a `Tuning`."""
    return f"{cut.block}x{cut.stages}x{cut.workers}{'w' * cut.whole}"


def grid(options: Options) -> list[Any]:
    """Every `Tuning` that is asked for.

    Raises:
        ValueError: none, or one that the kernel cannot work with.
    """
    from cla_kernels._tuning import Tuning

    found = [
        Tuning(
            block=block, stages=stages, workers=workers, whole=whole, on_device=not options.smoke
        )
        for block, stages, workers, whole in itertools.product(
            options.blocks, options.stages, options.workers, options.whole
        )
        if workers == 1 or stages % 4 == 0
    ]
    if not found or options.rounds < 1:
        raise ValueError("nothing to time: expected blocks, stages, workers and a round at least")
    return found


def fitting(shape: Shape, asked: Sequence[Any]) -> dict[str, Any]:
    """Of the cuts that this shape can have, what is made of each: several may become one."""
    import jax.numpy as jnp
    from cla_kernels._tuning import tuned
    from decode_timing import DTYPES

    row_heads, dtype, found = shape.B * shape.K, jnp.dtype(DTYPES[shape.dtype]), {}
    for one in asked:
        cut = tuned(shape.N // shape.K, shape.H, dtype, row_heads, shape.capacity, one)
        if (cut.block, cut.workers) == (one.block, one.workers):
            units = min(cut.units, row_heads * -(-shape.capacity // cut.block))
            found[label(one)] = dataclasses.replace(cut, units=units)
    return found


def contest(
    shape: Shape, contestants: dict[str, Any], timing: Any, rounds: int, threads: int
) -> dict[str, Found]:
    """Every contestant, checked and timed in turns.

    Args:
        shape: of the calls.
        contestants: implementations, or `Tuning`s of our own.
        timing: how long and how often.
        rounds: in which all of them are timed.
        threads: that compile.
    """
    import jax.numpy as jnp
    import numpy as np
    from decode_timing import compile_exact, compile_inputs, compile_timed, measure, reason

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(compile_inputs, shape), pool.submit(compile_exact, shape)]
        jobs = {n: pool.submit(compile_timed, shape, c, timing) for n, c in contestants.items()}
    make, exact = (part.result() for part in parts)
    made = [make(jnp.int32(seed)) for seed in range(timing.layers(shape))]
    q, caches = made[0][0], [cache for _, cache in made]
    lengths = jnp.asarray(shape.lengths, jnp.int32)
    expected = np.asarray(exact(q, caches[0], lengths))
    found: dict[str, Found] = {}
    timed: dict[str, Callable[[], Any]] = {}
    for name, job in jobs.items():
        try:
            out, once = measure(job.result(), q, caches, lengths, shape, timing)
        except Exception as error:  # that of one contestant must not end the others
            found[name] = Found(note=reason(error))
            continue
        found[name] = Found(relative_error(out, expected))
        if found[name].error <= TOLERANCE:
            timed[name] = once
        else:
            found[name] = dataclasses.replace(found[name], note="wrong")
    for name, once in [*timed.items()] * rounds:
        was, now = found[name], once()
        found[name] = dataclasses.replace(
            was, seconds=(*was.seconds, now.seconds), agreed=was.agreed and now.agreed
        )
    return found


def interpreted(shape: Shape, contestants: dict[str, Any]) -> dict[str, Found]:
    """Every cut's error, in the interpreter for GPU kernels."""
    import jax.numpy as jnp
    import numpy as np
    from decode_timing import attend, compile_exact, compile_inputs
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, cache = compile_inputs(shape)(jnp.int32(0))
    lengths = jnp.asarray(shape.lengths, jnp.int32)
    expected = np.asarray(compile_exact(shape)(q, cache, lengths))
    found: dict[str, Found] = {}
    for name, cut in contestants.items():
        with plgpu.force_gpu_interpret_mode():
            out = np.asarray(attend(cut, q, cache, lengths).astype(jnp.float32))[:, 0]
        error = relative_error(out, expected)
        found[name] = Found(error, note="not timed" if error <= TOLERANCE else "wrong")
    return found


def table(shape: Shape, found: dict[str, Found]) -> str:
    """A line for each contestant, the fastest first."""
    own = found[TABLE].median
    lines = [f"{shape.name}, {shape.kv_bytes / 1e6:.0f} MB"]
    for name, one in sorted(found.items(), key=lambda item: item[1].median or math.inf):
        text = f"  {name:10} error {one.error:.1e}  "
        if one.median:
            spread = f"{min(one.seconds) * 1e6:.2f} to {max(one.seconds) * 1e6:.2f}"
            text += f"{one.median * 1e6:9.2f} us ({spread})"
            text += f"  {own / one.median:.3f} of the table's speed" if own else ""
            text += "" if one.agreed else "  (disturbed)"
        lines.append(f"{text}{one.note}")
    return "\n".join(lines)


def verdict(entry: str, all_found: Sequence[dict[str, Found]]) -> list[str]:
    """The cuts of one entry of the table, the best first, by their speed against the table's."""
    speeds: dict[str, list[float]] = {}
    for found in all_found:
        own = found[TABLE].median
        for name, one in found.items():
            if own and one.median:
                speeds.setdefault(name, []).append(own / one.median)
    whole = {n: geometric_mean(s) for n, s in speeds.items() if len(s) == len(all_found)}
    if TABLE not in whole:
        return [f"{entry}: no verdict, the table's cut was not timed on every shape"]
    best = max((name for name in whole if name != PEER), key=lambda name: whole[name])
    says = "the table's cut stands" if whole[best] < 1.005 else f"{best} is faster"
    ranked = sorted(whole, key=lambda name: -whole[name])
    return [f"{entry}, {len(all_found)} shapes: {says}"] + [
        f"  {name:10} {whole[name]:.3f} (at least {min(speeds[name]):.3f})" for name in ranked
    ]


def main(options: Options) -> None:
    """Print a table a shape, and a verdict an entry of the table.

    Raises:
        ValueError: unknown shapes, cuts that cannot be, or no GPU (except with `smoke`).
    """
    if options.smoke:
        options = dataclasses.replace(options, blocks=(64,), stages=(4,), workers=(1, 2))
    asked = grid(options)
    shapes = [SMOKE] if options.smoke else select(standard_shapes(), options.shapes)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.smoke and "host_platform_device_count" not in (
        had := os.environ.get("XLA_FLAGS", "")
    ):
        # The interpreter's warpgroups wait for one another in XLA's pool of threads for processors.
        os.environ["XLA_FLAGS"] = f"{had} --xla_force_host_platform_device_count=8".strip()
    began = time.monotonic()
    import jax
    from cla_kernels._tuning import table_entry, tuned
    from decode_timing import DTYPES, Timing

    device = jax.devices()[0]
    if not options.smoke and device.platform not in ("gpu", "cuda"):
        raise ValueError(f"JAX finds a {device.platform} and no GPU; --smoke runs here")
    print(f"# {device.device_kind}, jax {jax.__version__}", flush=True)
    by_entry: dict[str, list[dict[str, Found]]] = {}
    for shape in shapes:
        if time.monotonic() - began > options.deadline:
            print(f"# stopped after {options.deadline:.0f} s, before {shape.name}")
            break
        dtype = jax.numpy.dtype(DTYPES[shape.dtype])
        columns, entry = table_entry(shape.H, dtype)
        cuts = fitting(shape, asked)
        own = tuned(shape.N // shape.K, shape.H, dtype, shape.B * shape.K, shape.capacity)
        own = dataclasses.replace(own, on_device=not options.smoke)
        firsts = {own: TABLE}  # what several become is timed once
        for name, cut in cuts.items():
            firsts.setdefault(cut, name)
        distinct = {name: cut for cut, name in firsts.items() if name != TABLE}
        if options.smoke:
            with jax.default_device(jax.devices("cpu")[0]):
                found = interpreted(shape, {TABLE: own, **distinct})
        else:
            contestants = {TABLE: "mosaic_gpu", PEER: PEER, **distinct}
            found = contest(shape, contestants, Timing(), options.rounds, options.threads)
        print(table(shape, found), flush=True)
        if options.smoke:
            return
        bits = 16 if shape.dtype == "bf16" else 8
        of_entry = by_entry.setdefault(f"{bits} bits, {columns} columns ({label(entry)})", [])
        of_entry.append(found | {name: found[firsts[cut]] for name, cut in cuts.items()})
        gc.collect()
    for entry, all_found in by_entry.items():
        print("\n".join(["", *verdict(entry, all_found)]))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"tune_decode: {error}") from None
