"""Measures every shape by every implementation, row by row, whatever fails on the way."""

import concurrent.futures
import dataclasses
import fcntl
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
from decode_shapes import Shape

TOLERANCE = 3e-3  # of the norm; rounding to bfloat16 alone gives 2.3e-3
PEERS_TOLERANCE = 1e-2  # theirs is not ours to hold; that they compute the same is
WAVE = 16  # shapes that are compiled together before they are timed: both at once disturb timing
RUNNING, TURNS, CEILING = "running", "turns", "ceiling"  # beside the results, while it runs
HANGS = 180.0  # seconds after which a call is taken for one that never ends


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
    # What has a time, and of that what no three windows agreed on.
    timed: set[tuple[Shape, str]] = dataclasses.field(default_factory=set)
    unsettled: set[tuple[Shape, str]] = dataclasses.field(default_factory=set)

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
            self.timed.add(row.key)
            (self.unsettled.discard if row.agreed else self.unsettled.add)(row.key)
        # An earlier time stays, unless the result is found to be wrong.
        if row.microseconds or row.error is not None or row.key not in self.timed:
            report.append(self.csv, row)
        text = row.note
        if row.microseconds:
            text = (
                f"{row.microseconds:9.2f} us {row.tb_per_second:6.3f} TB/s {row.fraction:5.3f}, "
                f"error {row.error:.1e}, {row.clean}/{row.windows} windows"
                + " (disturbed)" * (not row.agreed) + "; " * bool(text) + text
            )  # fmt: skip
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


@contextmanager
def turn(out: Path, *, alone: bool) -> Iterator[None]:
    """What is inside waits for the run's other processes, where they would disturb one another.

    Many compile at once; one measures (`alone`), while nobody compiles.
    """
    with (out / TURNS).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def ceiling(out: Path, read: Callable[[], float]) -> float:
    """Bytes a second: the first of the run's processes reads, the others take what it found.

    No process compiles before it has this, so nothing disturbs the one that reads.
    """
    with (out / CEILING).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if found := file.read():
            return float(found)
        rate = read()
        file.write(f"{rate!r}\n")
        return rate


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

    At the end, and once, again what was disturbed.

    Raises:
        DeviceLostError: the device answers no more.
    """
    _measure(run, wanted)
    again = [(s, [name for name in names if (s, name) in run.unsettled]) for s, names in wanted]
    again = [(shape, names) for shape, names in again if names]
    if again and run.left() > 0:
        count = sum(len(names) for _, names in again)
        print(f"# disturbed, measured again: {count}", flush=True)
        _measure(run, again)


def _measure(run: Run, wanted: Sequence[tuple[Shape, Sequence[str]]]) -> None:
    from decode_timing import compile_exact, compile_inputs, compile_timed

    for wave in itertools.batched(wanted, WAVE):
        if run.left() <= 0:
            return
        with turn(run.out, alone=False):
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
            programs = {name: jobs.pop((s, name)) for s, name in list(jobs) if s == shape}
            with turn(run.out, alone=True):
                if run.left() <= 0 or late:
                    return
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
        programs = program.result()
        row = dataclasses.replace(row, temporary_bytes=decode_timing.temporaries(programs))
        out, once = decode_timing.measure(programs, q, caches, lengths, shape, run.timing)
        timed = lambda: (once(), "")  # noqa: E731
    error = relative_error(out, expected)
    row = dataclasses.replace(row, error=error)
    allowed = PEERS_TOLERANCE if row.implementation in report.PEERS else TOLERANCE
    if not error <= allowed:  # NaN too
        return dataclasses.replace(row, note=f"wrong (error {error:.1e})")
    found, note = timed()
    return dataclasses.replace(
        row, microseconds=found.seconds * 1e6, agreed=found.agreed, windows=found.windows,
        clean=found.clean, note=note,
    )  # fmt: skip


def relative_error(out: Any, expected: Any) -> float:
    """Norm of the difference over the norm."""
    import numpy as np

    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
