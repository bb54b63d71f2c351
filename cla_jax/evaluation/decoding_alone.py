"""Decoding measured in a process of its own, so that the device's memory is one model's alone."""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import gc
import multiprocessing
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.evaluation.decoding import (
    DecodeCosts,
    bytes_in_use,
    decode_costs,
    memory_limit,
    random_decoder,
)

__all__ = ["DecodingDevice", "DecodingProcess"]

# In the child: the decoder that it was started for.
_held: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class DecodingDevice:
    """What a process decodes on.

    Attributes:
        kind: of the first device.
        memory: bytes that JAX may have of it; None where it does not say.
        counted: by whom memory is counted: `allocator`, or `live arrays` where there is none.
        weight_bytes: that the process holds with the decoder's weights alone.
    """

    kind: str
    memory: int | None
    counted: str
    weight_bytes: int


class DecodingProcess:
    """A process that holds one decoder with random weights; a context manager that ends it.

    This process must not hold the device's memory itself: it should not have run anything on it.

    Args:
        config: the model.
        execution: how it is run.

    Raises:
        RuntimeError: the process could not load it, in one line.
    """

    def __init__(self, config: ModelConfig, execution: ExecutionConfig) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
        try:
            self.device: DecodingDevice = self._call(_load, config, execution)
        except BaseException:
            self.close()
            raise

    def costs(self, batch: int, context: int, **options: Any) -> DecodeCosts:
        """`decode_costs` there; arguments as there.

        Raises:
            RuntimeError: what went wrong (such as memory that was too small), in one line. The
                process is still good for a smaller batch, unless it was killed.
        """
        return self._call(_costs, batch, context, options)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "DecodingProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call[T](self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return self._pool.submit(_guarded, function, *arguments).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RuntimeError("the process was killed: out of memory?") from None


def _load(config: ModelConfig, execution: ExecutionConfig) -> DecodingDevice:
    _held["decoder"] = jax.block_until_ready(random_decoder(config, execution))
    gc.collect()
    device = jax.devices()[0]
    counted = "allocator" if "bytes_in_use" in (device.memory_stats() or {}) else "live arrays"
    return DecodingDevice(device.device_kind, memory_limit(), counted, bytes_in_use())


def _costs(batch: int, context: int, options: dict[str, Any]) -> DecodeCosts:
    return decode_costs(_held["decoder"], batch, context, **options)


def _guarded[T](function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    except Exception as error:
        # Not every library's exceptions survive the way back.
        first = (str(error).strip() or repr(error)).splitlines()[0][:300]
        raise RuntimeError(f"{type(error).__name__}: {first}") from None
    finally:
        gc.collect()  # what one measurement held goes before the next one's comes
