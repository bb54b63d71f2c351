"""Signals that ask a run to stop: finish the step, save, and leave with a code of their own."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):  # noqa: N818 (the run was asked to stop: nothing failed)
    """A run was stopped by a signal, after it saved a checkpoint.

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
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
