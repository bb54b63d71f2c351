"""Signals that ask a run to stop: finish the step, save, and leave with a code of their own."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, after it saved a checkpoint.

    A `KeyboardInterrupt`, so that nothing that goes on after a failed run goes on after this.

    Attributes:
        exit_code: for the process: 128 and the signal's number, as shells report it (SIGTERM: 143,
            SIGINT: 130).
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"{signal.Signals(number).name}: saved at step {step}; --resume goes on from there"
        )
        self.exit_code = 128 + number


class StopRequest:
    """Remembers SIGTERM and SIGINT while it is entered, instead of ending the process at once.

    A second signal acts as usual. Outside the main thread, where Python delivers no signals,
    nothing is caught.

    Several processes must stop at the same step. There, JAX's preemption service takes SIGTERM: it
    tells the other processes, and all agree on a step (`came`). SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._several, self._asked = jax.process_count() > 1, 0

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def came(self) -> bool:
        """Whether to stop now; the same answer on all processes, which ask equally often."""
        if not self._several:
            return self.signal is not None
        self._asked += 1
        if self.signal is None and multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = number

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
