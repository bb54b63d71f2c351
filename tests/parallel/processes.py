"""`cla-jax train` as several processes of this machine, each with CPU devices of its own."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAIN = "from cla_jax.cli import main; main()"
TRAIN = (
    "--out", "run", "--text", "my.txt", "--data-dir", "data",
    "--training.data.sequence-length", "32", "--training.data.batch-size", "8",
    "--training.eval-tokens", "300", "--training.execution.compute-dtype", "float32",
    "--training.log-every", "1",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(
    processes: int,
    cwd: Path,
    *arguments: str,
    devices: int = 1,
    gpus: bool = False,
    model: str = "tiny/MQA-CLA2",
    of_each: Sequence[Sequence[str]] = (),
    numbers: Sequence[int] | None = None,
    port: int | None = None,
) -> Iterator[list[subprocess.Popen[str]]]:
    """The training command with these arguments, in so many processes; killed at the end.

    Each has so many CPU devices; or (`gpus`) a GPU of its own, on which products are exact. What
    `of_each` holds are further arguments of each. Of so many, those of `numbers` are started: all,
    unless they are given; process 0 listens on `port`.
    """
    found_there = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), found_there)))
    environment = os.environ | {"PYTHONPATH": path}
    if gpus:
        environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    else:
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={devices}",
        }
    port = free_port() if port is None else port
    found = [
        subprocess.Popen(
            [sys.executable, "-c", MAIN, "train", model, *TRAIN, *arguments,
             *(of_each[index] if of_each else ()),
             *(("--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process",
                str(index)) if processes > 1 else ())],
            cwd=cwd, env=environment | ({"CUDA_VISIBLE_DEVICES": str(index)} if gpus else {}),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in (range(processes) if numbers is None else numbers)
    ]  # fmt: skip
    try:
        yield found
    finally:
        for process in found:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ended(
    processes: list[subprocess.Popen[str]], seconds: float = 900
) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]
