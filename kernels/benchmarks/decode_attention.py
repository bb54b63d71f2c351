"""Decode attention on one GPU: shapes x implementations, and the share of the read bandwidth.

    PYTHONPATH=kernels python kernels/benchmarks/decode_attention.py --out OUT --deadline 540
    ... --shapes goals                              # the shapes of the goals alone
    ... --only 'B64-*-bf16' --implementations mosaic_gpu cudnn
    ... --implementations torch_flash torch_cudnn flashinfer   # the peers, into the same OUT
    ... --from OUT/results.csv                      # table and figure again; needs no GPU
    ... --smoke                                     # a few tiny shapes, on a processor too

Every time is of the device alone: of `decode_attention` called again and again inside one compiled
program (peers: in a CUDA graph), over several layers' caches in turn that together are three times
as large as the L2, and from the slope between two amounts of work. Every implementation is first
compared with float32: whose error is larger than allowed gets no time. In the same run the device
reads a 2 GB array: that is the bandwidth which fractions are of.

OUT gets `results.csv`, written row by row, `results.md`, `bandwidth.png` and `bandwidth.svg`. If it
has a `results.csv` already the run goes on: what is in it is not measured again (`--retry`: what
has no time is). A new version of a kernel wants a new OUT. After `--deadline` seconds the run stops
and still writes its tables. JAX shares the device with torch: its memory is not taken in advance
(XLA_PYTHON_CLIENT_PREALLOCATE=false, unless you set it).
"""

import argparse
import concurrent.futures
import dataclasses
import difflib
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import decode_report as report
from decode_report import Row
from decode_shapes import SETS, Shape, select, smoke_shapes

IMPLEMENTATIONS = (*report.JAX_PATHS, "reference", *report.PEERS)
DEFAULT = ("mosaic_gpu", "cudnn", "xla", *report.PEERS)
TOLERANCES = {"bf16": 3e-3, "int8": 5e-3, "e4m3": 5e-3}  # rounding to bfloat16 alone gives 2.3e-3
WAVE = 16  # shapes that are compiled together before they are timed: both at once disturb timing
RUNNING = "running"  # a file beside the results
HANGS = 180.0  # seconds after which a call is taken for one that never ends


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = argparse.ArgumentParser(
        prog="decode_attention.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = ", ".join(f"{name} ({len(make())})" for name, make in SETS.items())
    text.add_argument("--shapes", default="standard", choices=list(SETS), metavar="SET",
                      help=f"which shapes: {sizes}; default standard")  # fmt: skip
    text.add_argument("--only", nargs="+", default=[], metavar="PATTERN",
                      help="those whose name matches: 'B64-*-H128-bf16', '*-skewed'")  # fmt: skip
    text.add_argument("--implementations", nargs="+", metavar="NAME",
                      help=f"of {', '.join(IMPLEMENTATIONS)}; default {', '.join(DEFAULT)}; "
                      "jax_nn_xla is jax.nn without cuDNN, cudnn is jax.nn with it")  # fmt: skip
    text.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    text.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS",
                      help="stop then, and write the tables of what was measured")  # fmt: skip
    text.add_argument("--retry", action="store_true", help="measure anew what has no time yet")
    text.add_argument("--threads", type=int, default=min(12, os.cpu_count() or 1), metavar="N",
                      help="that compile; default %(default)s")  # fmt: skip
    text.add_argument("--list", action="store_true", help="print the shapes, measure nothing")
    text.add_argument("--from", type=Path, dest="source", metavar="CSV",
                      help="write table, summary and figure of these results again")  # fmt: skip
    text.add_argument(
        "--smoke", action="store_true", help="three tiny shapes, in seconds, anywhere"
    )
    return text


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Implementations without repetition.

    Raises:
        ValueError: one that does not exist.
    """
    for name in names:
        if name not in IMPLEMENTATIONS:
            near = difflib.get_close_matches(name, IMPLEMENTATIONS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown implementation {name!r}; expected some of {', '.join(IMPLEMENTATIONS)}; "
                f"the nearest is {near!r}"
            )
    return tuple(dict.fromkeys(names))


class DeviceLostError(Exception):
    """Nothing more can be measured in this process."""


@dataclasses.dataclass
class Run:
    """What all measurements of a run share."""

    out: Path
    timing: Any
    ends: float  # of time.monotonic
    ceiling: float
    device: str
    threads: int = 1
    hangs: float = HANGS

    @property
    def csv(self) -> Path:
        return self.out / "results.csv"

    @property
    def running(self) -> Path:
        """Says what runs at the moment: the file is left behind when the process dies."""
        return self.out / RUNNING

    def left(self) -> float:
        return self.ends - time.monotonic()

    def record(self, row: Row) -> None:
        row = dataclasses.replace(
            row, layers=self.timing.layers(row.shape), device=self.device,
            ceiling_tb_per_second=self.ceiling / 1e12,
        )  # fmt: skip
        if row.microseconds:
            rate = row.shape.kv_bytes / row.microseconds * 1e6
            row = dataclasses.replace(row, tb_per_second=rate / 1e12, fraction=rate / self.ceiling)
        report.append(self.csv, row)
        text = row.note
        if row.microseconds:
            text = (
                f"{row.microseconds:9.2f} us {row.tb_per_second:6.3f} TB/s {row.fraction:5.3f}, "
                f"error {row.error:.1e}, spread {row.spread:.1%}" + "; " * bool(text) + text
            )
        print(f"{row.shape.name:34} {row.implementation:12} {text}", flush=True)

    @contextmanager
    def watched(self, row: Row) -> Iterator[None]:
        """Ends the process if what is inside never ends, with a row and the tables for it."""

        def hung() -> None:
            self.record(dataclasses.replace(row, note=f"no answer after {self.hangs:.0f} s"))
            print("the device does not answer: run this again to go on behind it", flush=True)
            write_report(report.read(self.csv), self.out)
            sys.stdout.flush()
            os._exit(3)

        timer = threading.Timer(self.hangs, hung)
        timer.daemon = True
        timer.start()
        self.running.write_text(f"{row.shape.name} {row.implementation}\n", "utf-8")
        try:
            yield
        finally:
            timer.cancel()
            self.running.unlink(missing_ok=True)


def write_report(rows: Sequence[Row], out: Path | None) -> None:
    """Print table and summary; with a folder, save them and the figure there."""
    text = f"{report.table(rows)}\n{report.summary(rows)}"
    print(f"\n{text}", flush=True)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "results.md.new"
    temporary.write_text(text, "utf-8")
    temporary.replace(out / "results.md")
    try:
        from decode_figure import draw

        places = draw(rows, out / "bandwidth")
    except ImportError as error:
        print(f"no figure: {error}")
        return
    print("wrote", ", ".join(map(str, [out / "results.md", *places])), flush=True)


def measure_all(run: Run, wanted: Sequence[tuple[Shape, Sequence[str]]]) -> None:
    """Every shape by every implementation; returns early at the deadline.

    Raises:
        DeviceLostError: the device answers no more.
    """
    from decode_timing import compile_exact, compile_inputs, compile_timed

    for wave in itertools.batched(wanted, WAVE):
        if run.left() <= 0:
            return
        began = time.monotonic()
        pool = concurrent.futures.ThreadPoolExecutor(run.threads)
        jobs: dict[tuple[Shape, str], concurrent.futures.Future[Any]] = {}
        for shape, names in wave:
            jobs[shape, "inputs"] = pool.submit(compile_inputs, shape)
            jobs[shape, "exact"] = pool.submit(compile_exact, shape)
            for name in names:
                if name not in report.PEERS:
                    jobs[shape, name] = pool.submit(compile_timed, shape, name, run.timing)
        wait = min(max(run.left(), 0.0), 1e6)
        done, late = concurrent.futures.wait(jobs.values(), wait)
        pool.shutdown(wait=not late, cancel_futures=True)
        print(f"# compiled {len(done)} of {len(jobs)} programs in "
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        for shape, names in wave:
            if run.left() <= 0 or late:
                return
            programs = {name: jobs.pop((s, name)) for s, name in list(jobs) if s == shape}
            measure_shape(run, shape, names, programs)
            del programs
            gc.collect()


def measure_shape(run: Run, shape: Shape, names: Sequence[str], programs: dict[str, Any]) -> None:
    """All implementations of one shape on the same arrays."""
    import decode_peers
    import jax.numpy as jnp
    import numpy as np
    from decode_timing import default_of, reason

    default = default_of(shape)
    arrays: Any = None
    try:
        with run.watched(Row(shape, names[0], default)):
            make = programs["inputs"].result()
            made = [make(jnp.int32(seed)) for seed in range(run.timing.layers(shape))]
            q, caches = made[0][0], [cache for _, cache in made]
            del made
            lengths = jnp.asarray(shape.lengths, jnp.int32)
            expected = np.asarray(programs["exact"].result()(q, caches[0], lengths))
        arrays = q, caches, lengths, expected
    except Exception as error:
        for name in names:
            run.record(Row(shape, name, default, note=f"no inputs: {reason(error)}"))
        check_device(f"{shape.name}, making its inputs")
    for name in names if arrays else ():
        if run.left() <= 0:
            break
        row = Row(shape, name, default)
        try:
            with run.watched(row):
                row = measured(run, row, programs.get(name), arrays)
        except Exception as error:
            row = dataclasses.replace(row, note=reason(error))
        run.record(row)
        if not row.microseconds:
            check_device(f"{shape.name}, {name}")
        if name in report.PEERS:
            gc.collect()
            decode_peers.release()


def check_device(after: str) -> None:
    """After a failure: an error on the device may have spoilt it for this process.

    Raises:
        DeviceLostError: it has.
    """
    import jax
    import jax.numpy as jnp
    from decode_timing import reason

    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception as error:
        raise DeviceLostError(f"the device is lost after {after}: {reason(error)}") from None


def measured(run: Run, row: Row, program: Any, arrays: Any) -> Row:
    """The row with its error and, if that is small enough, its time."""
    import decode_peers
    import decode_timing

    q, caches, lengths, expected = arrays
    shape, name = row.shape, row.implementation
    timed: Callable[[], Any]
    if name in report.PEERS:
        if why := decode_peers.obstacle(name, shape):
            return dataclasses.replace(row, note=why)
        out, timed = decode_peers.measure(name, q, caches, shape, run.timing)
    else:
        compiled = program.result()
        row = dataclasses.replace(row, temporary_bytes=decode_timing.temporaries(compiled))
        out, once = decode_timing.measure(compiled, q, caches, lengths, shape, run.timing)
        timed = lambda: (once(), "")  # noqa: E731
    error = relative_error(out, expected)
    row = dataclasses.replace(row, error=error)
    if not error <= TOLERANCES[shape.dtype]:  # NaN too
        return dataclasses.replace(row, note=f"wrong (error {error:.1e})")
    found, note = timed()
    return dataclasses.replace(
        row, microseconds=found.seconds * 1e6, spread=found.spread, note=note
    )


def relative_error(out: Any, expected: Any) -> float:
    """Norm of the difference over the norm."""
    import numpy as np

    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def available(names: Sequence[str]) -> list[str]:
    """Without the peers that this machine lacks: another run may add them."""
    import decode_peers

    found = [name for name in names if name not in report.PEERS]
    for name in names:
        if name in report.PEERS:
            if why := decode_peers.missing(name):
                print(f"# {name} is left out: {why}", flush=True)
            else:
                found.append(name)
                print(f"# {name}: {decode_peers.version(name)}", flush=True)
    return found


def to_do(
    shapes: Sequence[Shape], names: Sequence[str], done: Sequence[Row], retry: bool
) -> list[tuple[Shape, list[str]]]:
    """What is not in the rows yet, shape by shape."""
    known = {row.key for row in done if row.microseconds or not retry}
    wanted = [(s, [name for name in names if (s, name) not in known]) for s in shapes]
    return [(shape, missing) for shape, missing in wanted if missing]


def earlier(out: Path, shapes: Sequence[Shape]) -> list[Row]:
    """The rows of the runs before this one into `out`.

    What was running when such a run died has no row: it gets one now, so as not to be tried again.
    """
    csv, running = out / "results.csv", out / RUNNING
    if running.exists():
        name, _, implementation = running.read_text("utf-8").strip().partition(" ")
        for shape in shapes:
            if shape.name == name:
                note = "the run ended while this ran; --retry tries again"
                report.append(csv, Row(shape, implementation, note=note))
        running.unlink()
    return report.read(csv) if csv.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 when all was tried or the deadline came, 1 when the device was lost."""
    text = parser()
    options = text.parse_args(arguments)
    began = time.monotonic()
    try:
        shapes = select(smoke_shapes() if options.smoke else SETS[options.shapes](), options.only)
        names = check_names(
            options.implementations or (("reference", "xla") if options.smoke else DEFAULT)
        )
        if options.source:
            write_report(report.read(options.source), options.out)
            return 0
        if options.list:
            for shape in shapes:
                print(f"{shape.name:34} {shape.kv_bytes / 1e6:9.1f} MB")
            return 0
        if options.out is None:
            raise ValueError("--out is missing: expected a folder for the results")
    except ValueError as error:
        text.error(str(error))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX is imported
    import jax
    from decode_timing import Timing, read_bandwidth

    device = jax.devices()[0]
    if not options.smoke and device.platform not in ("gpu", "cuda"):
        text.error(f"JAX finds a {device.platform} and no GPU; --smoke runs here")
    timing = Timing()
    if options.smoke:
        timing = Timing(2e-4, 1e-3, 3, rotation=40_000, most_layers=3, rate=1e9, fewest=1e-4)
    print(f"# {device.device_kind}, jax {jax.__version__}", flush=True)
    names = available(names)
    done = earlier(options.out, shapes)
    wanted = to_do(shapes, names, done, options.retry)
    print(f"# {len(shapes)} shapes, {sum(len(missing) for _, missing in wanted)} rows to measure, "
          f"{len(done)} there already", flush=True)  # fmt: skip
    status = 0
    if wanted:
        bandwidths = read_bandwidth(2**20 if options.smoke else 2**31, timing)
        for name, rate in bandwidths.items():
            print(f"# reads {rate / 1e12:.3f} TB/s ({name})", flush=True)
        if not bandwidths:
            text.error("the device could not read an array: no bandwidth to compare with")
        options.out.mkdir(parents=True, exist_ok=True)
        run = Run(
            options.out, timing, began + options.deadline, max(bandwidths.values()),
            device.device_kind, options.threads,
        )  # fmt: skip
        try:
            measure_all(run, wanted)
        except DeviceLostError as error:
            print(f"# {error}; run this again to go on behind it", flush=True)
            status = 1
        if run.left() <= 0:
            print(f"# stopped after {options.deadline:.0f} s; run this again to go on", flush=True)
        done = report.read(run.csv) if run.csv.exists() else []
    write_report(done, options.out)
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a compilation that the deadline left behind is not waited for
