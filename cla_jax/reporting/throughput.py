"""Tokens per second at the largest batch that fits, against the sharing factor."""

import dataclasses
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cla_jax.reporting._style import LABEL, SHARED, STYLE, canvas, label_ends, text_width
from cla_jax.reporting.tables import Column

__all__ = ["COLUMNS", "Throughput", "throughput"]


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Decoding at the largest batch that fits.

    Attributes:
        model: whose architecture it is.
        factor: layers that share each K/V.
        kv_layers: that leaves.
        context: keys of each row.
        largest_batch: that the planner lets fit.
        batch: that was run.
        step_ms: of a decoding step.
        tokens_per_second: of the batch.
        of_ceiling: share of the measured read bandwidth that the step's bytes come to.
    """

    model: str
    factor: int
    kv_layers: int
    context: int
    largest_batch: int
    batch: int
    step_ms: float
    tokens_per_second: float
    of_ceiling: float

    def is_of(self, model: str, factor: int, context: int) -> bool:
        """Whether it measured that point."""
        return (self.model, self.factor, self.context) == (model, factor, context)


COLUMNS = (
    Column[Throughput]("factor", "sharing factor", lambda r: r.factor, "d"),
    Column[Throughput]("kv_layers", "KV layers", lambda r: r.kv_layers, "d"),
    Column[Throughput]("context", "context", lambda r: r.context, "d"),
    Column[Throughput]("largest_batch", "largest batch", lambda r: r.largest_batch, "d"),
    Column[Throughput]("batch", "batch run", lambda r: r.batch, "d"),
    Column[Throughput]("step_ms", "ms/step", lambda r: r.step_ms, ".3f"),
    Column[Throughput]("tokens_per_second", "tokens/s", lambda r: r.tokens_per_second, ".0f"),
    Column[Throughput]("of_ceiling", "of read ceiling", lambda r: r.of_ceiling, ".3f"),
)


def throughput(rows: Sequence[Throughput], *, subtitle: str = "") -> Figure:
    """Tokens/s against the sharing factor, a line for each context; numbers are the batches run.

    Args:
        rows: measurements of one architecture.
        subtitle: device and memory.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("nothing to draw: no measurement")
    factors = sorted({row.factor for row in rows})
    contexts = sorted({row.context for row in rows})
    labels = [f"context {context:,}" for context in contexts]
    with matplotlib.rc_context(STYLE):
        made = canvas(
            f"{rows[0].model}: tokens/s at the largest batch that fits",
            f"{subtitle}; small numbers: the batch" if subtitle else "Small numbers: the batch",
            left=52.0, right=float(max(text_width(label, LABEL) for label in labels) + 16),
        )  # fmt: skip
        axes = made.axes(*made.room)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ends: list[tuple[float, float]] = []
        for context, color in zip(contexts, SHARED * len(contexts), strict=False):
            line = sorted((r for r in rows if r.context == context), key=lambda r: r.factor)
            x, y = [row.factor for row in line], [row.tokens_per_second for row in line]
            axes.plot(x, y, color=color, marker="s", markersize=3, linewidth=1.2)
            for row in line:
                axes.annotate(
                    f"{row.batch:,}", (row.factor, row.tokens_per_second), (0, 4),
                    textcoords="offset points", ha="center", fontsize=5.5, color=color,
                )  # fmt: skip
            ends.append((float(x[-1]), y[-1]))
        rates = [row.tokens_per_second for row in rows]
        axes.set_xlim(0.85 * factors[0], 1.15 * factors[-1])
        axes.set_ylim(0.75 * min(rates), 1.5 * max(rates))
        axes.xaxis.set_major_locator(FixedLocator(factors))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        few = max(rates) < 10 * min(rates)  # perhaps no power of ten among them
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if few else ""))
        axes.set_xlabel("Sharing factor: layers that share each K/V, log scale")
        axes.set_ylabel("Tokens/s, log scale")
        label_ends(axes, ends, labels, list((SHARED * len(contexts))[: len(contexts)]))
    return made.figure
