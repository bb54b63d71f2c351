"""What the second read of K/V costs that two layers share, against the first."""

import dataclasses
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cla_jax.reporting._pareto import format_bytes
from cla_jax.reporting._style import (
    INK,
    LABEL,
    STYLE,
    canvas,
    label_ends,
    line_styles,
    marker,
    text_width,
)
from cla_jax.reporting.tables import Column

__all__ = ["COLUMNS", "Reread", "rereads", "verdict"]

FASTER = 0.9  # of the first read's time: what the verdict calls a reuse
MOST_NOISE = 0.3  # of a ratio that the verdict counts


@dataclasses.dataclass(frozen=True)
class Reread:
    """The second read of one layer's K/V, behind the first and the products between them.

    Times are in microseconds. Those of part `reads` are of two reads and the products behind each;
    those of part `step` are of a whole step.

    Attributes:
        part: `reads`, a chain of reads and products, or `step`, a model that decodes.
        name: of the heads, as `16/1x128`, or of the model.
        kv_bytes: K/V of one layer.
        weight_bytes: that are read between the two reads.
        first: one read whose K/V come from memory, nothing else between reads.
        apart: the second read comes when the K/V are long gone (`step`: the readers are as many
            layers behind their owners as can be).
        together: the second read is the next one (`step`: CLA, each reader behind its owner).
        noise: of `apart - together`: half the range over the repeats.
        readers: second reads in the time of `apart` and `together`: 1, or those of a step.
        halves: like `together`, but one half of the batch after the other.
        unshared: the step of the same model with K/V in every layer.
        traced_first: mean time of an owner's attention in a trace of the `together` step.
        traced_second: of a reader's.
        attention: the implementation of `decode_attention`.
        device: that it was measured on.
    """

    part: str
    name: str
    kv_bytes: int
    weight_bytes: int
    first: float
    apart: float
    together: float
    noise: float
    readers: int = 1
    halves: float | None = None
    unshared: float | None = None
    traced_first: float | None = None
    traced_second: float | None = None
    attention: str = ""
    device: str = ""

    @property
    def ratio(self) -> float:
        """The second read's time over the first's, from the difference of the two orders."""
        return 1 - (self.apart - self.together) / self.readers / self.first

    @property
    def ratio_noise(self) -> float:
        """Of the ratio, up or down."""
        return self.noise / self.readers / self.first

    @property
    def traced_ratio(self) -> float | None:
        """The same from the trace."""
        if not self.traced_first or self.traced_second is None:
            return None
        return self.traced_second / self.traced_first

    @property
    def found(self) -> tuple[float, float]:
        """The ratio to be told and its noise: from the trace, with none known, where there is one.

        The difference of two whole steps drowns in their noise.
        """
        traced = self.traced_ratio
        return (self.ratio, self.ratio_noise) if traced is None else (traced, 0.0)

    @property
    def line(self) -> tuple[str, str, int]:
        """Which line of the figure it belongs to."""
        return self.part, self.name, self.weight_bytes


COLUMNS = (
    Column[Reread]("part", "part", lambda r: r.part),
    Column[Reread]("name", "heads or model", lambda r: r.name),
    Column[Reread]("weights", "weights between, MB", lambda r: r.weight_bytes / 1e6, ".0f"),
    Column[Reread]("kv", "K/V of a layer, MB", lambda r: r.kv_bytes / 1e6, ".1f"),
    Column[Reread]("first", "first read, us", lambda r: r.first, ".2f"),
    Column[Reread]("apart", "apart, us", lambda r: r.apart, ".2f"),
    Column[Reread]("together", "together, us", lambda r: r.together, ".2f"),
    Column[Reread]("halves", "in halves, us", lambda r: r.halves, ".2f"),
    Column[Reread]("unshared", "unshared, us", lambda r: r.unshared, ".2f"),
    Column[Reread]("ratio", "second read / first", lambda r: r.ratio, ".3f"),
    Column[Reread]("noise", "+-", lambda r: r.ratio_noise, ".3f"),
    Column[Reread]("traced", "traced", lambda r: r.traced_ratio, ".3f"),
    Column[Reread]("attention", "attention", lambda r: r.attention),
)


def _lines(rows: Sequence[Reread]) -> dict[tuple[str, str, int], list[Reread]]:
    lines: dict[tuple[str, str, int], list[Reread]] = {}
    for row in sorted(rows, key=lambda r: (r.part, r.weight_bytes, r.name, r.kv_bytes)):
        lines.setdefault(row.line, []).append(row)
    return lines


def _label(row: Reread, heads: int) -> str:
    """Of a line; the heads are named where there are several."""
    if row.part == "step":
        return f"step of {row.name}"
    which = f", {row.name}" if heads > 1 else ""
    if not row.weight_bytes:
        return f"reads alone{which}"
    return f"{row.weight_bytes / 1e6:.0f} MB between{which}"


def verdict(rows: Sequence[Reread]) -> str:
    """What was found, a sentence for each line and one for the halves.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("nothing to say: no measurement")
    lines = _lines(rows)
    heads = len({row.name for row in rows if row.part == "reads"})
    sentences: list[str] = []
    for line in lines.values():
        sure = [row for row in line if row.found[1] < MOST_NOISE]
        reused = [row for row in sure if sum(row.found) < FASTER]
        best = min(reused or sure or line, key=lambda row: row.found[0])
        ratio, noise = best.found
        at_best = (
            f"the second read takes {ratio:.2f} of the first's time at best "
            f"({f'+- {noise:.2f}' if noise else 'in the trace'}, {best.kv_bytes / 1e6:.1f} MB a "
            "layer)"
        )
        label = _label(line[0], heads)
        if not sure:
            found = f"too noisy to tell (+- {MOST_NOISE} or more at every size)"
        elif not reused:
            found = f"no reuse: {at_best}"
        else:
            most = max(row.kv_bytes for row in reused)
            found = f"{at_best}, and less than {FASTER} of it up to {most / 1e6:.1f} MB"
        sentences.append(f"{label[0].upper()}{label[1:]}: {found}.")
    halved = [(row.halves / row.together, row) for row in rows if row.halves]
    if halved:
        share, row = min(halved, key=lambda found: found[0])
        sentences.append(
            f"One half of the batch after the other takes {share:.2f} of the time of the whole at "
            f"best ({row.kv_bytes / 1e6:.1f} MB a layer, {row.weight_bytes / 1e6:.0f} MB between), "
            f"and less in {sum(s < 1 for s, _ in halved)} of {len(halved)} cases."
        )
    return "\n".join(sentences)


def rereads(rows: Sequence[Reread]) -> Figure:
    """The second read's time over the first's against the K/V of a layer.

    A line for each amount of weights between the two, with the range of the repeats as bars, and
    for each model that decodes, from its trace where there is one.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("nothing to draw: no measurement")
    lines = list(_lines(rows).values())
    heads = len({row.name for row in rows if row.part == "reads"})
    labels = [_label(line[0], heads) for line in lines]
    styles = list(line_styles([line[0].part == "step" for line in lines]))
    with matplotlib.rc_context(STYLE):
        made = canvas(
            "Do readers find their owner's K/V in the L2?",
            f"time of the second read over the first's; {rows[0].device}",
            right=float(max(text_width(label, LABEL) for label in labels) + 16),
        )
        axes = made.axes(*made.room)
        axes.set_xscale("log", base=2)
        axes.axhline(1, color=INK, linewidth=0.8)
        for line, (color, dash) in zip(lines, styles, strict=True):
            shared = line[0].part == "step"
            x = [row.kv_bytes for row in line]
            axes.errorbar(
                x, [row.found[0] for row in line], [row.found[1] for row in line], color=color,
                linestyle=dash, marker=marker(shared), markersize=3, linewidth=1.2, elinewidth=0.6,
            )  # fmt: skip
        sizes = sorted({row.kv_bytes for row in rows if row.part == "reads"} or {
            row.kv_bytes for row in rows
        })  # fmt: skip
        ratios = [row.found[0] for row in rows]
        axes.set_ylim(min(0.0, *ratios) - 0.05, max(1.2, *ratios) + 0.05)
        ticks = sizes[:1]
        for size in sizes:  # as many as have room for their names
            if size >= 3 * ticks[-1]:
                ticks.append(size)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(round(x))))
        axes.set_xlabel("K/V of a layer, log scale")
        axes.set_ylabel("Second read / first")
        ends = [(float(line[-1].kv_bytes), line[-1].found[0]) for line in lines]
        label_ends(axes, ends, labels, [color for color, _ in styles])
    return made.figure
