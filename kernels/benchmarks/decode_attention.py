"""Decode attention on one GPU: shapes x implementations, and the share of the read bandwidth.

    PYTHONPATH=kernels python kernels/benchmarks/decode_attention.py --out OUT --deadline 540
    ... --processes 8                               # compiles faster; still measures one by one
    ... --shapes goals                              # the shapes of the goals alone
    ... --only 'B64-*-bf16' --implementations mosaic_gpu cudnn
    ... --implementations torch_flash torch_cudnn flashinfer   # the peers, into the same OUT
    ... --from OUT/results.csv                      # table and figure again; needs no GPU
    ... --smoke                                     # a few tiny shapes, on a processor too

Every time is of the device alone: of `decode_attention` called again and again inside one compiled
program (peers: in a CUDA graph), over several layers' caches in turn that together are twice
as large as the L2 (of 24 layers at most: under 5 MB a call, less), in steps of 20 calls, as of a
model of 20 layers, which share what depends on lengths alone; and from the slope between the
shortest of many short windows of two amounts of work. Where no three of them agree something
disturbed them: those rows are measured once more at the end, and the summary names what still is
disturbed. Every implementation is first compared with float32: one whose error is larger than
allowed gets no time. In the same run the device reads a 2 GB array: fractions are of that rate.

OUT gets `results.csv`, written row by row, `results.md`, `bandwidth.png` and `bandwidth.svg`. If it
has a `results.csv` already the run goes on: what is in it is not measured again (`--retry`: what
has no time is, or a disturbed one). cuDNN compiles one program at a time in a process, which takes
longer than to measure it: `--processes` share the shapes. They take turns: while one measures, the
others neither measure nor compile. A new version of a kernel wants a new OUT. After `--deadline`
seconds the run stops and still writes its tables. JAX shares the device with torch: its memory is
not taken in advance (XLA_PYTHON_CLIENT_PREALLOCATE=false, unless you set it).
"""

import argparse
import difflib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import decode_report as report
from decode_report import Row
from decode_run import (
    CEILING,
    RUNNING,
    TURNS,
    DeviceLostError,
    Run,
    ceiling,
    measure_all,
    write_report,
)
from decode_shapes import SETS, Shape, select, smoke_shapes

IMPLEMENTATIONS = (*report.JAX_PATHS, "reference", *report.PEERS)
DEFAULT = (*report.JAX_PATHS, *report.PEERS)


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
    text.add_argument(
        "--retry", action="store_true", help="measure anew what has no time yet, or was disturbed"
    )
    text.add_argument("--threads", type=int, default=min(12, os.cpu_count() or 1), metavar="N",
                      help="that compile; default %(default)s")  # fmt: skip
    text.add_argument("--processes", type=int, default=1, metavar="N",
                      help="that share the shapes; default %(default)s")  # fmt: skip
    text.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of so many: a process's own
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
    """What is not in the rows yet, shape by shape; `retry`: nor without a fault."""
    known = {
        row.key for row in done if not retry or (row.microseconds and row.agreed is not False)
    }  # fmt: skip
    wanted = [(s, [name for name in names if (s, name) not in known]) for s in shapes]
    return [(shape, missing) for shape, missing in wanted if missing]


def rows_of(out: Path) -> list[Row]:
    """The rows that are in `out`."""
    csv = out / "results.csv"
    return report.read(csv) if csv.exists() else []


def earlier(out: Path, shapes: Sequence[Shape]) -> None:
    """Gives what was running when a run into `out` died a row, so as not to be tried again."""
    csv, running = out / "results.csv", out / RUNNING
    if not running.exists():
        return
    name, _, implementation = running.read_text("utf-8").strip().partition(" ")
    timed = {row.key for row in rows_of(out) if row.microseconds}
    for shape in shapes:
        if shape.name == name and (shape, implementation) not in timed:
            note = "the run ended while this ran; --retry tries again"
            report.append(csv, Row(shape, implementation, note=note))
    running.unlink()


def in_parts(options: argparse.Namespace, arguments: Sequence[str], began: float) -> int:
    """This program, in so many processes; the worst of their codes."""
    left = max(0.0, began + options.deadline - time.monotonic())
    command = [sys.executable, __file__, *arguments, "--deadline", str(left)]
    parts = [subprocess.Popen([*command, "--part", str(n)]) for n in range(options.processes)]
    try:
        return max(abs(part.wait()) for part in parts)
    finally:
        for part in parts:
            part.kill()


def measure(
    text: argparse.ArgumentParser,
    options: argparse.Namespace,
    shapes: Sequence[Shape],
    names: Sequence[str],
    began: float,
) -> int:
    """What these shapes lack, on this device."""
    import jax
    from decode_timing import Timing, read_bandwidth

    device = jax.devices()[0]
    if not options.smoke and device.platform not in ("gpu", "cuda"):
        text.error(f"JAX finds a {device.platform} and no GPU; --smoke runs here")
    timing = Timing()
    if options.smoke:
        timing = Timing(
            2e-4, 1e-3, 3, agree=10.0, rotation=40_000, most_layers=3, step=4, rate=1e9, fewest=1e-4
        )
    print(f"# {device.device_kind}, jax {jax.__version__}", flush=True)
    names, done = available(names), rows_of(options.out)
    wanted = to_do(shapes, names, done, options.retry)
    print(f"# {len(shapes)} shapes, {sum(len(missing) for _, missing in wanted)} rows to measure, "
          f"{len(done)} there already", flush=True)  # fmt: skip
    if not wanted:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)

    def read() -> float:
        bandwidths = read_bandwidth(2**20 if options.smoke else 2**31, timing)
        for name, rate in bandwidths.items():
            print(f"# reads {rate / 1e12:.3f} TB/s ({name})", flush=True)
        if not bandwidths:
            text.error("the device could not read an array: no bandwidth to compare with")
        return max(bandwidths.values())

    run = Run(
        options.out, timing, began + options.deadline, ceiling(options.out, read),
        device.device_kind, options.threads, timed={row.key for row in done if row.microseconds},
    )  # fmt: skip
    try:
        measure_all(run, wanted)
    except DeviceLostError as error:
        print(f"# {error}; run this again to go on behind it", flush=True)
        return 1
    return 0


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
        if options.processes < 1:
            raise ValueError(f"--processes {options.processes}: expected 1 or more")
        if options.out is None:
            raise ValueError("--out is missing: expected a folder for the results")
        report.check_can_grow(options.out / "results.csv")
    except ValueError as error:
        text.error(str(error))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX is imported
    if options.part is not None:
        return measure(text, options, shapes[options.part :: options.processes], names, began)
    earlier(options.out, shapes)
    (options.out / CEILING).unlink(missing_ok=True)  # of a run that was killed, on another device
    if options.processes > 1:
        status = in_parts(options, sys.argv[1:] if arguments is None else arguments, began)
    else:
        status = measure(text, options, shapes, names, began)
    if time.monotonic() >= began + options.deadline:
        print(f"# stopped after {options.deadline:.0f} s; run this again to go on", flush=True)
    for name in (TURNS, CEILING):
        (options.out / name).unlink(missing_ok=True)
    write_report(rows_of(options.out), options.out)
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a compilation that the deadline left behind is not waited for
