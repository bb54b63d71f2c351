"""Several processes as one program: how they join, agree, and leave when one is lost.

JAX's own distributed runtime (`jax.distributed`) does the work. What is added here is a plain
message where it would abort: a coordinator that does not answer, processes that do not come, one
that is lost in the middle of a run.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = [
    "SLURM",
    "AgreedError",
    "ProcessConfig",
    "ProcessLostError",
    "agree",
    "check_same",
    "first_says",
    "is_first",
    "join",
    "leave",
    "loss_of_a_process",
    "naming_lost_processes",
]

SLURM = "slurm"
JOIN_SECONDS = 120
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
HEARTBEAT_SECONDS = 30
_SLURM_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
)  # fmt: skip
_TEXT_BYTES = 4096
# What JAX's runtime says when a process has gone: gloo (CPU), NCCL (GPU), the coordination service.
_LOST = re.compile(
    r"gloo|nccl|coordination ?service|heartbeat|barrier|connection (reset|closed)", re.IGNORECASE
)


class AgreedError(ValueError):
    """All processes refuse, and know it: they can leave together."""


class ProcessLostError(ConnectionError):
    """Another process has gone; this one cannot go on, and must not wait for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Which process of how many this is.

    Attributes:
        coordinator: `HOST:PORT` of process 0, the same for all; `slurm`: all three are found in the
            environment that `srun` makes. Empty: one process alone.
        processes: how many there are.
        process: which this is, from 0.

    Raises:
        ValueError: some of the three but not all, no port, a process that is not below `processes`.
    """

    coordinator: str = ""
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        counts = (self.processes, self.process)
        if not self.coordinator or self.coordinator == SLURM:
            if counts != (None, None):
                raise ValueError(
                    "coordinator=slurm finds processes and process itself: leave them out"
                    if self.coordinator
                    else "processes and process say which of several processes this is: give "
                    "coordinator=HOST:PORT too, that of process 0"
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"coordinator={self.coordinator!r}: expected HOST:PORT of process 0, such as "
                "node0:9876, or slurm"
            )
        if self.processes is None or self.process is None:
            raise ValueError(
                f"coordinator={self.coordinator}: give processes (how many there are) and process "
                "(which this is, from 0) too"
            )
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise ValueError(
                f"process={self.process} of processes={self.processes}: expected 0 to "
                f"{max(self.processes, 1) - 1}"
            )

    def resolved(self, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
        """Which process this is and how many there are; None for one alone.

        Raises:
            ValueError: `slurm`, and `srun` did not start this process.
        """
        if not self.coordinator:
            return None
        if self.coordinator != SLURM:
            assert self.process is not None
            assert self.processes is not None
            return self.process, self.processes
        if missing := [name for name in _SLURM_VARIABLES if name not in environment]:
            raise ValueError(
                f"coordinator=slurm: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                "not set: start every process with srun, or name the coordinator as HOST:PORT"
            )
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])


def join(config: ProcessConfig, seconds: int = JOIN_SECONDS) -> None:
    """Make this process one of several; nothing for one alone. Before JAX is used.

    If the others do not come in time, the process ends with a message and exit code 1: the runtime
    waits below Python, and would abort.

    Args:
        config: which this is.
        seconds: to wait for the others.

    Raises:
        ValueError: see `ProcessConfig.resolved`; the coordinator counts other processes; on process
            0, a port that is taken.
    """
    resolved = config.resolved()
    if resolved is None:
        return
    process, processes = resolved
    who = f"process {process} of {processes}"
    explicit = config.coordinator != SLURM
    if explicit and process == 0:
        _check_port(config.coordinator)

    def give_up() -> None:
        print(f"cla-jax: {who}: {_why_alone(config.coordinator, process, processes, seconds)}",
              file=sys.stderr)  # fmt: skip
        leave(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator if explicit else None,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate" if explicit else SLURM,
            initialization_timeout=seconds + 60,  # the timer comes first
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        counted = jax.process_count()
    finally:
        timer.cancel()
    if counted != processes:
        raise ValueError(f"{who}: the coordinator was started with processes={counted}")


def is_first() -> bool:
    """Whether this is the process that prints, draws and writes; true for one alone."""
    return jax.process_index() == 0


def agree[T](check: Callable[[], T]) -> T:
    """Every process runs `check`; if any refuses, all do. All must call it, and wait for all.

    Raises:
        ValueError: that of `check`, for one process alone; else an `AgreedError` on all, which
            names the process.
    """
    if jax.process_count() == 1:
        return check()
    result, refused = None, ""
    try:
        result = check()
    except (ValueError, OSError) as error:
        refused = str(error) or repr(error)
    said = _gather(refused)
    if not any(said):
        return result  # pyright: ignore[reportReturnType]  # no error: it was assigned
    if len({*said}) == 1:
        raise AgreedError(refused)
    process = next(i for i, text in enumerate(said) if text)
    raise AgreedError(f"process {process} of {len(said)}: {said[process]}")


def first_says[T](find: Callable[[], T]) -> T:
    """What process 0 finds, on every process: a JSON value.

    Files are looked at by one process alone: over a network, others may see them as they were.

    Raises:
        ValueError: that of `find`, as an `AgreedError` on all.
    """
    if jax.process_count() == 1:
        return find()
    found = agree(lambda: json.dumps(find()) if is_first() else "")
    data = np.frombuffer(found.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = data if is_first() else np.zeros(length, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def check_same(what: str, values: Any) -> None:
    """Whether all processes have the same: the same command, the same data.

    Args:
        what: for the message.
        values: JSON values.

    Raises:
        ValueError: they have not; names the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True)
    digests = _gather(hashlib.sha256(text.encode()).hexdigest())
    if others := [str(i) for i, digest in enumerate(digests) if digest != digests[0]]:
        raise AgreedError(
            f"process {', '.join(others)} has another {what} than process 0: give all "
            f"{len(digests)} processes the same command and the same files"
        )


def loss_of_a_process(error: BaseException) -> ProcessLostError | None:
    """What an error of JAX's runtime means, if it is that another process has gone."""
    if isinstance(error, ProcessLostError):
        return error
    # What we refuse ourselves may hold any word, in a path for example.
    ours = isinstance(error, ValueError | FloatingPointError)
    if jax.process_count() == 1 or ours or not _LOST.search(str(error)):
        return None
    return ProcessLostError(
        f"process {jax.process_index()} of {jax.process_count()}: another process has gone, and "
        "this one cannot go on alone; the run goes on from its last checkpoint (--resume), also "
        f"on fewer processes. {str(error).splitlines()[0][:200]}"
    )


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Errors of JAX's runtime that mean that another process has gone say so.

    Raises:
        ProcessLostError: instead of such an error.
    """
    try:
        yield
    except Exception as error:
        if (lost := loss_of_a_process(error)) is None or lost is error:
            raise
        raise lost from error


def leave(code: int) -> NoReturn:
    """End this process at once, without waiting for others, which may never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _gather(text: str) -> list[str]:
    """A text of every process, cut to 4 KiB, on every process."""
    padded = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:
        _try_to_listen(port)
    except OSError as error:
        raise ValueError(
            f"coordinator={coordinator}: process 0 cannot listen on port {port} of this "
            f"machine ({error.strerror}); choose another port, for all processes. If another of "
            "them is process 0 here already, give every one a number of its own"
        ) from None


def _try_to_listen(port: int) -> None:
    """On every address: on those of IPv4 alone where the kernel has no IPv6, or it is off.

    Raises:
        OSError: it cannot be.
    """
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in _NO_IPV6:
                continue
            raise
        return


def _why_alone(coordinator: str, process: int, processes: int, seconds: int) -> str:
    if coordinator != SLURM and process:
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"nothing has answered at {coordinator} for {seconds} s ({error.strerror}): is "
                "process 0 running there (it ends where two are given the same number), and is "
                "the port open from here?"
            )
    return (
        f"not all of {processes} processes have come within {seconds} s: start every one, with the "
        "same coordinator and number of processes and another process each"
    )
