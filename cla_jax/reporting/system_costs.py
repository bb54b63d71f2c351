"""CLA section 2.3 in numbers, from what `experiments/cla/system_costs.py` measured."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cla_jax import registry
from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
from cla_jax.reporting._pareto import format_bytes
from cla_jax.reporting._style import INK, LABEL, STYLE, canvas, color, short_names, text_width
from cla_jax.reporting.papers import CLA_TABLE_1, variant_in_paper
from cla_jax.reporting.tables import Column, Written, csv_text, markdown, terminal_table

__all__ = ["COLUMNS", "CostRow", "cost_rows", "system_costs", "write_system_costs"]


@dataclasses.dataclass(frozen=True)
class CostRow:
    """A model's costs beside the first model's.

    Attributes:
        costs: fields of `cla_jax.evaluation.Costs`.
        baseline: the first model's.
        tokens: of one step.
    """

    costs: Mapping[str, Any]
    baseline: Mapping[str, Any]
    tokens: int

    def ratio(self, key: str) -> float | None:
        """To the first model's."""
        if self.costs[key] is None or not self.baseline[key]:
            return None
        return self.costs[key] / self.baseline[key]

    @property
    def paper_kv_bytes(self) -> int | None:
        """CLA Table 1's, for its models."""
        scale, _, _ = self.costs["model"].partition("/")
        paper = CLA_TABLE_1.get(variant_in_paper(self.costs["model"]))
        return paper.kv_bytes_per_token if scale == "1B" and paper else None


def _field(key: str, heading: str, spec: str, per: float = 1.0) -> Column[CostRow]:
    def value(row: CostRow) -> float | None:
        return None if row.costs[key] is None else row.costs[key] / per

    def whole(row: CostRow) -> int | None:
        return None if row.costs[key] is None else int(row.costs[key])

    return Column(key, heading, whole if spec == "d" else value, spec)


def _ratio(key: str) -> Column[CostRow]:
    return Column(f"{key}_ratio", "ratio", lambda row: row.ratio(key), ".3f")


COLUMNS: tuple[Column[CostRow], ...] = (
    Column("model", "model", lambda row: row.costs["model"]),
    _field("kv_bytes_per_token", "KV bytes/token", "d"),
    _ratio("kv_bytes_per_token"),
    Column("paper_kv_bytes", "paper's KV bytes", lambda row: row.paper_kv_bytes, "d"),
    _field("parameters", "parameters", "d"),
    _ratio("parameters"),
    _field("flops_per_token", "FLOPs/token", "d"),
    _ratio("flops_per_token"),
    _field("xla_flops_per_token", "FLOPs/token, XLA", "d"),
    _ratio("xla_flops_per_token"),
    _field("state_bytes", "state, MiB", ".1f", 2.0**20),
    _field("temporary_bytes", "temporaries, MiB", ".1f", 2.0**20),
    _ratio("temporary_bytes"),
    _field("peak_bytes", "device peak, MiB", ".1f", 2.0**20),
    _ratio("peak_bytes"),
    _field("step_seconds", "step, ms", ".2f", 1e-3),
    _ratio("step_seconds"),
    Column("tokens_per_second", "tokens/s", lambda row: row.costs["step_seconds"]
           and row.tokens / row.costs["step_seconds"], ".0f"),
)  # fmt: skip
_SHORT = ("model", "kv_bytes_per_token", "flops_per_token", "temporary_bytes", "step_seconds")
_IN_SHORT = tuple(column for column in COLUMNS if column.key in _SHORT)


def cost_rows(costs: Sequence[Mapping[str, Any]], tokens: int) -> tuple[CostRow, ...]:
    """Costs in the order given; the first is the baseline.

    Raises:
        ValueError: no costs.
    """
    if not costs:
        raise ValueError("no costs were measured: expected at least one model's")
    return tuple(CostRow(one, costs[0], tokens) for one in costs)


_BARS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("kv_bytes_per_token", "KV cache per token", lambda v: format_bytes(round(v))),
    ("parameters", "Parameters", lambda v: _engineering(v)),
    ("flops_per_token", "FLOPs per token", lambda v: _engineering(v)),
    ("temporary_bytes", "Training temporaries", lambda v: format_bytes(round(v))),
    ("peak_bytes", "Device peak", lambda v: format_bytes(round(v))),
    ("step_seconds", "Training step", lambda v: f"{1e3 * v:,.{0 if v >= 0.1 else 1}f} ms"),
)


def system_costs(rows: Sequence[CostRow], *, title: str | None = None) -> Figure:
    """A row for each model, a column of bars for each cost that was measured."""
    bars = [bar for bar in _BARS if any(row.costs[bar[0]] is not None for row in rows)]
    names = short_names(row.costs["model"] for row in rows)
    label = max(text_width(name, LABEL) for name in names) + 14
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or "What sharing keys and values costs and saves",
            f"in brackets: ratio to {names[0]}; {rows[0].costs['device']}",
            left=float(label), bottom=8.0, width=max(360.0, label + 92.0 * len(bars)),
            height=62.0 + 12.0 * len(rows),
        )  # fmt: skip
        left, bottom, width, height = made.room
        each = width / len(bars)
        for number, (key, heading, shown) in enumerate(bars):
            axes = made.axes(left + number * each, bottom, each - 8, height - 12)
            values = [float(row.costs[key] or 0.0) for row in rows]
            axes.barh(
                range(len(rows)), values, height=0.72, alpha=0.35,
                color=[color(_shares(row.costs["model"])) for row in rows],
            )  # fmt: skip
            axes.set_xlim(0, max(values) or 1.0)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_title(heading, fontsize=7, loc="left", pad=3)
            axes.grid(visible=False)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(range(len(rows)), names if number == 0 else [""] * len(rows))
            axes.tick_params(axis="y", length=0, labelsize=LABEL)
            for place, row in enumerate(rows):
                if row.costs[key] is None:
                    continue
                ratio = row.ratio(key)
                text = shown(float(row.costs[key])) + (
                    f"  ({ratio:.3g})" if ratio and place else ""
                )
                axes.text(
                    0.02, place, text, fontsize=6, va="center", color=INK,
                    transform=axes.get_yaxis_transform(),
                )  # fmt: skip
    return made.figure


def write_system_costs(directory: Path, out: Path) -> Written:
    """Writes results.csv, results.md and the figure of the costs in `directory/costs.json`.

    Raises:
        ValueError: no such file, or it is damaged or empty.
    """
    path = directory / "costs.json"
    try:
        saved = json.loads(path.read_bytes())
        options, costs = saved["options"], list(saved["costs"].values())
        rows = cost_rows(costs, options["batch_size"] * options["sequence_length"])
        table = csv_text(rows, COLUMNS)
    except FileNotFoundError:
        raise ValueError(f"no costs in {directory}: {path.name} is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    settings = ", ".join(f"{key} {value}" for key, value in options.items())
    document = (
        f"# System costs (CLA section 2.3)\n\nDevice: {costs[0]['device']}. {settings}. Ratios are "
        f"to {costs[0]['model']}.\n\n{markdown(rows, COLUMNS)}\n"
        "The paper's claims: the KV cache shrinks by the sharing factor (slightly less where it "
        "does not divide the depth); training memory, parameters and FLOPs fall slightly; decode "
        "attention reads as much as before.\n\n"
        "FLOPs are those of a training step: by formula (causal half of the attention square, "
        "matrix products alone) and as XLA counts them (all of the square, elementwise operations "
        "too). Temporaries are what the compiled step needs beside parameters and optimizer "
        "state.\n\n![costs](system_costs.png)\n"
    )
    written = (
        write_atomically(out / "results.csv", table.encode()),
        write_atomically(out / "results.md", document.encode()),
        *figures.save(system_costs(rows), out / "system_costs"),
    )
    return Written(written, terminal_table(rows, _IN_SHORT))


def _shares(name: str) -> bool:
    config = registry.model(name)
    return config.kv_layers < config.num_layers


def _engineering(value: float) -> str:
    """`1.08 M`, `6.3 G`."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3f}"[:5].rstrip(".") + f" {unit}"
    return f"{value:.0f}"
