"""Where the device's time goes: operations of a profiler's trace, by kind."""

import dataclasses
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

__all__ = [
    "KINDS",
    "Operation",
    "Part",
    "breakdown",
    "kind_of",
    "layer_seconds",
    "op_names",
    "traced",
]

ATTENTION, PRODUCTS, WRITE, SAMPLING = "attention", "products", "cache write", "sampling"
REST, COPIES, GAPS = "norms, rotary, elementwise", "copies", "gaps"
KINDS: tuple[str, ...] = (ATTENTION, PRODUCTS, REST, WRITE, SAMPLING, COPIES, GAPS)

# What kernels are called whose names say nothing of the HLO that they come from: those of Mosaic
# GPU (in a step that decodes these are decode_attention's) and cuDNN; cuBLAS and Triton's products.
_ATTENTION = re.compile(r"^kernel(_|$)|mosaic|sdpa|flash|fmha|decode_attention")
_PRODUCTS = re.compile(r"nvjet|gemm|gemv|cublas|cutlass|xmma|splitk|(^|[^a-z])dot([^a-z]|$)")
_COPIES = re.compile(r"^(memcpy|memset)")
_CONTROL = re.compile(r"^(while|call|conditional)([.\d]|$)")  # they hold other operations


class Operation(NamedTuple):
    """What the device ran.

    Attributes:
        name: of the kernel, or of the operation in a trace of a CPU.
        start: in seconds.
        seconds: that it took.
        source: the HLO instruction, where the trace names it.
    """

    name: str
    start: float
    seconds: float
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one kind of operation takes of a step.

    Attributes:
        kind: one of `KINDS`.
        operations: a step.
        seconds: a step. Where operations overlap, the time is that of the one that began first, so
            that the parts add up to the step.
        share: of the step.
    """

    kind: str
    operations: float
    seconds: float
    share: float


def traced(call: Callable[[], Any], module: str) -> list[Operation]:
    """The operations that a call runs on the first device, in the order of their beginnings.

    Of a GPU, what its streams ran; of a CPU, the operations of one module.

    Args:
        call: waits for its results.
        module: HLO module, such as `jit_decode_block`.

    Raises:
        ValueError: the trace holds none.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        files = sorted(Path(folder).glob("**/*.xplane.pb"))
        if not files:
            raise ValueError("the profiler wrote no trace")
        data = jax.profiler.ProfileData.from_file(str(files[0]))
        with warnings.catch_warnings():
            # The first look at an event's statistics warns of how their type was made.
            warnings.simplefilter("ignore", DeprecationWarning)
            found = sorted(_operations(data.planes, module), key=lambda o: o.start)
    if not found:
        raise ValueError(f"the profiler's trace holds no operation of {module}")
    return found


def _operations(planes: Iterable[Any], module: str) -> Iterator[Operation]:
    """Of the first GPU that has any; otherwise of the CPU."""
    planes = list(planes)
    gpus = sorted((p for p in planes if p.name.startswith("/device:GPU")), key=lambda p: p.name)
    for plane in gpus[:1] or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # a summary of what the streams have
            for event in line.events:
                statistics = {name: value for name, value in event.stats}
                source, of = str(statistics.get("hlo_op", "")), statistics.get("hlo_module")
                # Kernels of a CUDA graph may not say whose they are.
                if (of is None and not gpus) or (of is not None and of != module):
                    continue
                if not _CONTROL.match(source):
                    yield Operation(
                        event.name, event.start_ns / 1e9, event.duration_ns / 1e9, source
                    )


def op_names(hlo: str) -> dict[str, str]:
    """What JAX calls each HLO instruction: the path of its scopes; of a fusion, that of its root.

    Args:
        hlo: text of a compiled program (`compiled.as_text()`).

    Returns:
        Paths by the instruction's name, in which all but letters and digits is `_`, as it is in the
        names of kernels.
    """
    paths, calls = dict[str, str](), dict[str, str]()
    roots, computation = dict[str, str](), ""
    for line in hlo.splitlines():
        if opening := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            computation = opening[1]
        if not (found := re.match(r"\s+(ROOT )?%([\w.-]+) = ", line)):
            continue
        name = _plain(found[2])
        if path := re.search(r'op_name="([^"]*)"', line):
            paths[name] = path[1]
        if found[1]:
            roots[computation] = name
        if called := re.search(r" fusion\(.*calls=%([\w.-]+)", line):
            calls[name] = called[1]
    for name, called in calls.items():
        root = roots.get(called, "")
        if name not in paths and root in paths:
            paths[name] = paths[root]
    return paths


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def kind_of(operation: Operation, paths: dict[str, str]) -> str:
    """Which of `KINDS` an operation is.

    Args:
        operation: it.
        paths: `op_names` of the program.
    """
    name = operation.name.lower()
    path = paths.get(_plain(operation.source)) or paths.get(_plain(operation.name)) or ""
    last = path.rpartition("/")[2]
    if "/decode_attention_" in path or _ATTENTION.search(name):
        return ATTENTION
    if "/cache_write/" in path:
        return WRITE
    if "/sample/" in path:
        return SAMPLING
    if last == "dot_general" or _PRODUCTS.search(name):
        return PRODUCTS
    if _COPIES.match(name):
        return COPIES
    return REST


def breakdown(
    operations: Sequence[Operation],
    paths: dict[str, str],
    steps: int,
    step_seconds: float | None = None,
) -> tuple[Part, ...]:
    """A step by kind, in the order of `KINDS`; the parts' seconds add up to the step's.

    Args:
        operations: of `steps` steps, in the order of their beginnings.
        paths: `op_names` of the program.
        steps: that were traced.
        step_seconds: of a step, measured without a profiler, which holds the host up: gaps are what
            the operations leave of it. Default: gaps are what lies between them in the trace.

    Raises:
        ValueError: no operations.
    """
    if not operations:
        raise ValueError("no operations to break down")
    seconds, counts = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    busy_until = operations[0].start
    for operation in operations:
        kind, end = kind_of(operation, paths), operation.start + operation.seconds
        seconds[GAPS] += max(0.0, operation.start - busy_until)
        seconds[kind] += max(0.0, end - max(operation.start, busy_until))
        counts[kind] += 1
        busy_until = max(busy_until, end)
    if step_seconds is not None:
        seconds[GAPS] = 0.0
        seconds[GAPS] = max(steps * step_seconds - sum(seconds.values()), 0.0)
    total = sum(seconds.values())
    return tuple(
        Part(
            kind,
            counts[kind] / steps,
            seconds[kind] / steps,
            seconds[kind] / total if total else 0.0,
        )
        for kind in KINDS
    )


def layer_seconds(
    operations: Sequence[Operation], paths: dict[str, str], steps: int, layers: int
) -> tuple[float, ...] | None:
    """Mean seconds of attention in each layer of a step; None where the trace does not tell.

    Kernels in CUDA graphs do not say which layer they belong to, but layers run in their order: a
    kernel that runs equally often in every layer is counted off. A layer's time is from the first
    such kernel's beginning to the last one's end.

    Args:
        operations: of `steps` steps, in the order of their beginnings.
        paths: `op_names` of the program.
        steps: that were traced.
        layers: that attend in a step.
    """
    attention = [o for o in operations if kind_of(o, paths) == ATTENTION]
    by_name = dict[str, list[Operation]]()
    for operation in attention:
        by_name.setdefault(operation.name, []).append(operation)
    calls = steps * layers
    regular = sorted(
        (o for found in by_name.values() if len(found) % calls == 0 for o in found),
        key=lambda o: o.start,
    )
    if not regular:
        return None
    each = len(regular) // calls
    sums = [0.0] * layers
    for call in range(calls):
        part = regular[call * each : (call + 1) * each]
        sums[call % layers] += max(o.start + o.seconds for o in part) - part[0].start
    return tuple(total / steps for total in sums)
