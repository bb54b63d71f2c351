"""MLKV Figures 3, 5 and 6, from what `experiments/mlkv/inference.py` measured."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from cla_jax import registry
from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
from cla_jax.reporting._style import (
    HEIGHT,
    LABEL,
    STYLE,
    WIDTH,
    canvas,
    line_styles,
    marker,
    short_names,
    text_width,
)
from cla_jax.reporting.papers import MLKV_LARGEST_BATCH
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table

__all__ = [
    "COLUMNS",
    "POINT_COLUMNS",
    "InferencePoint",
    "InferenceRecord",
    "Variant",
    "inference_costs",
    "load_inference",
    "variants",
    "write_inference_costs",
]

FIGURE_6_BATCH = 8


@dataclasses.dataclass(frozen=True)
class InferencePoint:
    """A model decoding a batch at the end of its context.

    Attributes:
        model: its name.
        batch: rows.
        largest_batch: that the planner lets fit.
        weight_bytes: held with the weights alone.
        held_bytes: held with weights and cache, when nothing runs.
        peak_bytes: the most that was held up to here; None where the device does not say.
        temporary_bytes: that XLA says the compiled loop needs beside its arguments.
        step_seconds: of a decoding step.
    """

    model: str
    batch: int
    largest_batch: int
    weight_bytes: int
    held_bytes: int
    peak_bytes: int | None
    temporary_bytes: int
    step_seconds: float

    @property
    def cache_bytes(self) -> int:
        """Held beyond the weights: what the paper's figures show."""
        return self.held_bytes - self.weight_bytes

    @property
    def workspace_bytes(self) -> int:
        """Needed while a step runs; by the device's peak, or where it has none by XLA."""
        if self.peak_bytes is None:
            return self.temporary_bytes
        return self.peak_bytes - self.held_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.batch / self.step_seconds


@dataclasses.dataclass(frozen=True)
class InferenceRecord:
    """What was measured, and how.

    Attributes:
        options: length, new tokens, dtypes and the like.
        device: its kind.
        counted: by whom memory was counted.
        memory: bytes that the planner counted on.
        points: in the order in which they were measured.
    """

    options: Mapping[str, Any]
    device: str
    counted: str
    memory: int
    points: tuple[InferencePoint, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model at all its batches.

    Attributes:
        points: by batch.
        context: tokens that a row's cache has room for.
    """

    points: tuple[InferencePoint, ...]
    context: int

    @property
    def name(self) -> str:
        """Of the model."""
        return self.points[0].model

    @property
    def shares_layers(self) -> bool:
        """Whether some layer reads another's K/V."""
        config = registry.model(self.name)
        return config.kv_layers < config.num_layers

    @property
    def expected_row_bytes(self) -> int:
        """KV bytes per token x length."""
        return registry.model(self.name).kv_bytes_per_token * self.context

    @property
    def row_bytes(self) -> float | None:
        """Slope of the held memory against the batch, by least squares; None of one batch."""
        if len(self.points) < 2:
            return None
        batches, held = np.array([(p.batch, p.cache_bytes) for p in self.points], np.float64).T
        return float(np.polyfit(batches, held, 1)[0])

    @property
    def deviation(self) -> float | None:
        """Of the slope, relative to what is expected."""
        return None if self.row_bytes is None else self.row_bytes / self.expected_row_bytes - 1

    def rate_at(self, batch: int) -> float | None:
        """Tokens/s at a batch that was measured."""
        return next((p.tokens_per_second for p in self.points if p.batch == batch), None)


COLUMNS: tuple[Column[Variant], ...] = (
    Column("model", "model", lambda v: v.name),
    Column("total_kv_heads", "KV heads in all",
           lambda v: registry.model(v.name).kv_layers * registry.model(v.name).kv_heads, "d"),
    Column("kv_bytes", "KV bytes/token", lambda v: registry.model(v.name).kv_bytes_per_token, "d"),
    Column("expected_row_bytes", "x length", lambda v: v.expected_row_bytes, "d"),
    Column("row_bytes", "bytes/row, measured", lambda v: v.row_bytes, ".0f"),
    Column("deviation", "deviation, %",
           lambda v: None if v.deviation is None else 100 * v.deviation, ".3f"),
    Column("largest_batch", "largest batch", lambda v: v.points[-1].largest_batch, "d"),
    Column("paper_largest", "paper's (12 GB)",
           lambda v: MLKV_LARGEST_BATCH.get(v.name.removeprefix("pythia-160m/")), "d"),
    Column("rate_8", f"tokens/s at {FIGURE_6_BATCH}", lambda v: v.rate_at(FIGURE_6_BATCH), ".0f"),
    Column("best_rate", "tokens/s at most",
           lambda v: max(p.tokens_per_second for p in v.points), ".0f"),
    Column("weight_mib", "weights, MiB", lambda v: v.points[-1].weight_bytes / 2**20, ".1f"),
    Column("held_mib", "held at the largest run, MiB",
           lambda v: v.points[-1].held_bytes / 2**20, ".1f"),
    Column("workspace_mib", "workspace there, MiB",
           lambda v: v.points[-1].workspace_bytes / 2**20, ".1f"),
)  # fmt: skip
POINT_COLUMNS: tuple[Column[InferencePoint], ...] = (
    Column("model", "model", lambda p: p.model),
    Column("batch", "batch", lambda p: p.batch, "d"),
    Column("largest_batch", "largest batch", lambda p: p.largest_batch, "d"),
    Column("cache_bytes", "cache, bytes", lambda p: p.cache_bytes, "d"),
    Column("weight_bytes", "weights, bytes", lambda p: p.weight_bytes, "d"),
    Column("held_bytes", "held, bytes", lambda p: p.held_bytes, "d"),
    Column("peak_bytes", "peak, bytes", lambda p: p.peak_bytes, "d"),
    Column("temporary_bytes", "temporaries by XLA, bytes", lambda p: p.temporary_bytes, "d"),
    Column("step_ms", "ms/step", lambda p: p.step_seconds * 1e3, ".3f"),
    Column("tokens_per_second", "tokens/s", lambda p: p.tokens_per_second, ".0f"),
)
_SHORT = ("model", "total_kv_heads", "kv_bytes", "deviation", "largest_batch", "paper_largest",
          "rate_8", "best_rate")  # fmt: skip


def load_inference(directory: Path) -> InferenceRecord:
    """Reads `inference.json`.

    Raises:
        ValueError: nothing, or something else; a model that the registry lacks.
    """
    path = directory / "inference.json"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        points = tuple(InferencePoint(**point) for point in values.pop("points"))
        for name in dict.fromkeys(point.model for point in points):
            registry.model(name)
        return InferenceRecord(**values, points=points)
    except FileNotFoundError:
        raise ValueError(f"nothing was measured in {directory}: {path.name} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no measurements: {error!r}") from None


def variants(record: InferenceRecord) -> tuple[Variant, ...]:
    """Its points by model, in the registry's order.

    Raises:
        ValueError: no points.
    """
    if not record.points:
        raise ValueError("nothing was measured: expected at least one point")
    order = {name: place for place, name in enumerate(registry.model_names())}
    points = sorted(record.points, key=lambda p: (order[p.model], p.batch))
    return tuple(
        Variant(tuple(group), record.options["context"])
        for _, group in itertools.groupby(points, key=lambda p: p.model)
    )


def inference_costs(rows: Sequence[Variant], *, subtitle: str = "") -> Figure:
    """Memory beyond the weights (MLKV Figures 3, 5) and tokens/s against the batch.

    Args:
        rows: models at their batches.
        subtitle: device and memory.
    """
    names = short_names(row.name for row in rows)
    styles = list(line_styles([row.shares_layers for row in rows]))
    gap = 30.0
    with matplotlib.rc_context(STYLE):
        made = canvas(
            f"{rows[0].name.partition('/')[0]}: a cache of {rows[0].context:,} tokens a row",
            subtitle, left=60.0, height=2 * HEIGHT - 10,
            right=float(max(text_width(name, LABEL) for name in names) + 34),
            width=WIDTH + 20,
        )  # fmt: skip
        left, bottom, width, height = made.room
        each = (height - gap) / 2
        upper = made.axes(left, bottom + each + gap, width, each)
        lower = made.axes(left, bottom, width, each)
        for row, name, (color, dash) in zip(rows, names, styles, strict=True):
            batch = [p.batch for p in row.points]
            look: dict[str, Any] = {
                "color": color, "linestyle": dash, "linewidth": 1.1, "markersize": 3,
                "marker": marker(row.shares_layers),
            }  # fmt: skip
            upper.plot(batch, [p.cache_bytes for p in row.points], label=name, **look)
            lower.plot(batch, [p.tokens_per_second for p in row.points], **look)
            limit = row.points[-1].largest_batch
            end = limit * row.expected_row_bytes
            upper.plot([limit], [end], "x", color="#d40000", markersize=5, zorder=5)
        _set_axes(upper, "Memory beyond the weights", bytes_=True)
        _set_axes(lower, "Tokens/s")
        lower.set_xlabel("Batch, log scale  (red cross: no larger one fits)")
        lower.set_xlim(upper.get_xlim())
        # 1, 2, 5 to a decade, while there is room for them.
        first, last = np.log10(upper.get_xlim())
        subs = (1.0, 2.0, 5.0) if last - first < 3 else (1.0,)
        for axes in (upper, lower):
            axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        upper.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=LABEL, handlelength=1.8,
            labelspacing=0.3,
        )  # fmt: skip
    return made.figure


def write_inference_costs(directory: Path, out: Path) -> Written:
    """Writes results.csv and .md (a row a model), points.csv, inference.png and .svg.

    Raises:
        ValueError: nothing was measured there.
    """
    record = load_inference(directory)
    rows = variants(record)
    columns = [c for c in COLUMNS if any(c.value(row) is not None for row in rows)]
    points = [point for row in rows for point in row.points]
    what = f"{record.device}, {record.memory / 1e9:,.3g} GB"
    document = [
        f"# MLKV Figures 3, 5 and 6: {rows[0].name.partition('/')[0]}",
        "",
        f"{what}; a cache of {record.options['length']:,} tokens a row, then "
        f"{record.options['new_tokens']} tokens; cache in {record.options['cache_dtype']}. Random "
        f"weights. Memory is counted by: {record.counted}. *Largest batch* is the planner's; "
        "every batch measured is a share of it. Workspace (what a step needs while it runs) is "
        "not in the other figures.",
        "",
        markdown(rows, columns),
        "![memory and tokens/s against batch](inference.png)",
    ]
    written = [
        write_atomically(out / "results.csv", csv_text(rows, COLUMNS).encode()),
        write_atomically(out / "points.csv", csv_text(points, POINT_COLUMNS).encode()),
        write_atomically(out / "results.md", ("\n".join(document) + "\n").encode()),
        *figures.save(inference_costs(rows, subtitle=what), out / "inference"),
    ]
    short = [column for column in columns if column.key in _SHORT]
    return Written(tuple(written), terminal_table(rows, short))


def _set_axes(axes: Axes, label: str, *, bytes_: bool = False) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel(f"{label}, log scale")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(
        EngFormatter("B", places=0) if bytes_ else FuncFormatter(lambda y, _: f"{y:,.0f}")
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
