"""Training and decoding on several devices, beside one of them."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from cla_jax.parallel import PipelineIdeal, pipeline_ideal
from cla_jax.registry import model
from cla_jax.reporting.tables import Column, markdown

__all__ = [
    "COLUMNS",
    "Compared",
    "DeviceMeasurement",
    "compared",
    "ideal_ratio",
    "report",
    "timings",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMeasurement:
    """One program on one mesh; seconds and bytes.

    Attributes:
        part: of the benchmark.
        model: its name.
        mesh: `none` for one device.
        devices: of the mesh.
        rows: in all.
        length: tokens of a row: of training, or keys of the cache.
        microbatches: of a pipeline; else 0.
        remat: of training.
        seconds: median of a step.
        fastest: of the timed steps.
        slowest: likewise.
        rate: tokens per second; of `links`, bytes of the array per second.
        mfu: model FLOPs over the data sheets' peak of all devices, where it is known.
        loss: of the first step, at step 0.
        cache_bytes: on each device, the most of any.
        logits_error: norm of the difference from one device's logits, over their norm.
        sent_bytes: that a device sends in a run of the program, as its HLO says.
        temporary_bytes: of the program on a device.
        compile_seconds: of it, others being compiled at the same time.
        attention: the implementation, and the kernels that the program calls.
        device: kind.
        jax: version.
    """

    part: str
    model: str
    mesh: str
    devices: int
    rows: int
    length: int
    microbatches: int = 0
    remat: str = ""
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    rate: float | None = None
    mfu: float | None = None
    loss: float | None = None
    cache_bytes: float | None = None
    logits_error: float | None = None
    sent_bytes: float | None = None
    temporary_bytes: float | None = None
    compile_seconds: float | None = None
    attention: str = ""
    device: str = ""
    jax: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        micro = f" in {self.microbatches} microbatches" if self.microbatches else ""
        return f"{self.part} {self.mesh}, {self.rows} rows{micro}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What is measured."""
        return (self.part, self.model, self.mesh, self.rows, self.length, self.microbatches,
                self.remat)  # fmt: skip


def timings(seconds: Sequence[float], work: float) -> dict[str, float]:
    """Median, range and rate of timed runs that each do so much work."""
    median = statistics.median(seconds)
    return {"seconds": median, "fastest": min(seconds), "slowest": max(seconds),
            "rate": work / median}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compared:
    """A measurement beside one device's, and beside the ideal of a pipeline.

    Attributes:
        one: the measurement.
        ratio: its tokens per second over one device's.
        ideal: the ratio of the pipeline's ideal.
    """

    one: DeviceMeasurement
    ratio: float | None
    ideal: float | None

    @property
    def of_ideal(self) -> float | None:
        """The share of the ideal that was reached."""
        return self.ratio / self.ideal if self.ratio and self.ideal else None


def compared(found: Sequence[DeviceMeasurement]) -> list[Compared]:
    """Every measurement but those of links, with its rate over one device's."""
    rows = list[Compared]()
    for m in found:
        if m.part == "links" or not m.rate:
            continue
        rate = next((a.rate for a in found if _alone(a, m)), None)
        ratio = m.rate / rate if rate and m.mesh != "none" else None
        rows.append(Compared(m, ratio, ideal_ratio(m) if m.part == "pipeline" else None))
    return rows


def _alone(one: DeviceMeasurement, m: DeviceMeasurement) -> bool:
    """Whether this is the one device that a measurement is compared with."""
    part = "decode" if m.part == "decode" else "train"
    alike = (one.model, one.length, one.remat) == (m.model, m.length, m.remat)
    rows = one.rows in (m.rows, m.rows // m.devices)
    return (one.part, one.mesh) == (part, "none") and alike and rows


def ideal_of(m: DeviceMeasurement) -> PipelineIdeal:
    """The ideal of a measured pipeline."""
    remat: Any = m.remat
    return pipeline_ideal(
        model(m.model), m.devices, m.microbatches, remat=remat, sequence_length=m.length
    )


def ideal_ratio(m: DeviceMeasurement) -> float:
    """Times as fast as one device that rematerialises alike, as the measured one does."""
    ideal = ideal_of(m)
    return (ideal.body * ideal.remat + ideal.outside + ideal.head) / ideal.step


def shares(m: DeviceMeasurement) -> str:
    """What the ideal step of a pipeline consists of."""
    ideal = ideal_of(m)
    parts = {
        "layers in stages": ideal.body,
        "rematerialisation": ideal.body * (ideal.remat - 1),
        "bubble": ideal.body * ideal.remat * (ideal.bubble - 1),
        "layers outside": ideal.outside,
        "head": ideal.head,
    }
    whole = ideal.step * ideal.stages
    said = ", ".join(f"{name} {part / whole:.1%}" for name, part in parts.items() if part)
    return (
        f"ideal step of {m.microbatches} microbatches in {m.devices} stages: {said}; "
        f"{ideal_ratio(m):.2f} times as fast as one device that rematerialises too, "
        f"{1 / ideal.step:.2f} times one that does not"
    )


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _giga(number: float | None) -> float | None:
    return None if number is None else number / 1e9


COLUMNS = (
    Column[Compared]("part", "part", lambda r: r.one.part),
    Column[Compared]("mesh", "mesh", lambda r: r.one.mesh),
    Column[Compared]("rows", "rows", lambda r: r.one.rows, "d"),
    Column[Compared]("length", "length", lambda r: r.one.length, "d"),
    Column[Compared]("microbatches", "micro", lambda r: r.one.microbatches or None, "d"),
    Column[Compared]("ms", "ms", lambda r: _milli(r.one.seconds), ".3f"),
    Column[Compared]("fastest", "fastest", lambda r: _milli(r.one.fastest), ".3f"),
    Column[Compared]("slowest", "slowest", lambda r: _milli(r.one.slowest), ".3f"),
    Column[Compared]("rate", "tokens/s", lambda r: r.one.rate, ".0f"),
    Column[Compared]("mfu", "MFU", lambda r: r.one.mfu, ".3f"),
    Column[Compared]("ratio", "of one device", lambda r: r.ratio, ".3f"),
    Column[Compared]("ideal", "ideal", lambda r: r.ideal, ".3f"),
    Column[Compared]("of_ideal", "of ideal", lambda r: r.of_ideal, ".3f"),
    Column[Compared]("sent", "sent, GB", lambda r: _giga(r.one.sent_bytes), ".3f"),
    Column[Compared]("temporary", "temporaries, GB", lambda r: _giga(r.one.temporary_bytes), ".1f"),
    Column[Compared]("cache", "cache a device, GB", lambda r: _giga(r.one.cache_bytes), ".4f"),
    Column[Compared]("error", "logits' error", lambda r: r.one.logits_error, ".1e"),
    Column[Compared]("loss", "first loss", lambda r: r.one.loss, ".4f"),
    Column[Compared]("attention", "attention", lambda r: r.one.attention),
)


def report(found: Sequence[DeviceMeasurement]) -> str:
    """The table, the pipelines' ideals and the links, as Markdown."""
    lines = [markdown(compared(found), COLUMNS)]
    lines += [f"{shares(m)}\n" for m in found if m.part == "pipeline"]
    lines += [
        f"an all-reduce of {4 * m.length / 2**20:,.2f} MiB over {m.devices} devices: "
        f"{1e6 * m.seconds:,.1f} us, {m.rate / 1e9:.1f} GB/s\n"
        for m in found if m.part == "links" and m.rate and m.seconds
    ]  # fmt: skip
    return "\n".join(lines)
