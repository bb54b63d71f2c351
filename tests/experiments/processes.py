"""Experiments as processes of their own, by their paths."""

import csv
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def compiled_programs() -> "tempfile.TemporaryDirectory[str]":
    """Where these processes, one after the other, keep compiled programs: many are the same.

    Not shared with other processes of pytest: JAX does not write there in one piece.
    """
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def start(experiment: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """One that runs, such as `cla/design_space`."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_COMPILATION_CACHE_DIR": compiled_programs().name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, str(ROOT / f"experiments/{experiment}.py"), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(experiment: str, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Its exit code, standard output and standard error, when it has ended."""
    with start(experiment, *arguments, cwd=cwd) as process:
        out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Looks often, while it runs, and for 20 minutes at most."""
    deadline = time.monotonic() + 1200
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_behind_a_checkpoint(process: subprocess.Popen[str], run_directory: Path) -> None:
    """SIGKILL, when a run's first checkpoint is whole."""
    checkpoints = run_directory / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("*/commit_success.txt")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def check_refused(
    experiment: str, arguments: list[str], code: int, parts: list[str], cwd: Path
) -> None:
    """Refuses its options in a line that has these parts, and writes nothing to an empty folder."""
    found, out, err = run(experiment, *arguments, "--out", "out", cwd=cwd)
    assert (found, out) == (code, "")
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
    assert code == 2 or len(err.splitlines()) == 1
    assert not any(cwd.iterdir())


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))
