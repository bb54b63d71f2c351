"""What all figures share: look, canvas, names. Lengths are in points of 1/72 inch.

Models that share K/V across layers are red and square, the others blue and round, in every figure
(blue and vermilion stay apart in the common kinds of colour blindness).
"""

import base64
import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

SHARED = ("#c1440e", "#e8912d", "#7f2704")
UNSHARED = ("#0b62a4", "#56a7dc", "#08306b")
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e6e6e6"
LABEL = 6.5  # the size of a model's name in the plot
FEW = 6  # as many models are labelled in full
WIDTH, HEIGHT = 360.0, 244.8
SCREEN = 1.6  # pixels of a notebook to a point: text of 8 points is read at 13 pixels
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: same figure on every machine
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cla-jax",
}


class Picture(Figure):
    """A figure that a notebook shows as `figures.save` writes it, without `pyplot`."""

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        content = io.BytesIO()
        # Ticks are made when a figure is drawn: the look must be in force then too.
        with matplotlib.rc_context(STYLE):
            self.savefig(content, format="png", dpi=2 * 72 * SCREEN, metadata={"Software": None})
        width, height = (round(72 * SCREEN * inches) for inches in self.get_size_inches())
        image = base64.b64encode(content.getvalue()).decode("ascii")
        return {"image/png": image}, {"image/png": {"width": width, "height": height}}


class Canvas(NamedTuple):
    """A figure with fixed margins, so that labels can be placed before it is drawn.

    Attributes:
        figure: with title and subtitle.
        room: left, bottom, width and height of what is left.
    """

    figure: Figure
    room: tuple[float, float, float, float]

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """New axes with this frame."""
        size = 72 * self.figure.get_size_inches()
        frame = np.divide((left, bottom, width, height), (*size, *size))
        return self.figure.add_axes(tuple(frame.tolist()))


def canvas(
    title: str,
    subtitle: str,
    *,
    left: float = 44.0,
    bottom: float = 36.0,
    right: float = 10.0,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Canvas:
    """An empty figure and, inside its margins, the room for axes."""
    title = textwrap.fill(title, int(0.178 * width))
    subtitle = textwrap.fill(subtitle, int(0.27 * width))
    top = 7 + 12 * (title.count("\n") + 1)
    under = 9 * (subtitle.count("\n") + 2) if subtitle else 9
    room = (left, bottom, float(width - left - right), float(height - bottom - top - under))
    figure = Picture(figsize=(width / 72, height / 72), dpi=72, facecolor="white")
    figure.text(8 / width, 1 - 7 / height, title, fontsize=9, weight="bold", va="top")
    figure.text(8 / width, 1 - (top + 3) / height, subtitle, color=MUTED, fontsize=7, va="top")
    return Canvas(figure, room)


def short_names(names: Iterable[str]) -> list[str]:
    """Model names, without the scale where it is the same for all."""
    names = list(names)
    if len({name.partition("/")[0] for name in names}) > 1 or any("/" not in n for n in names):
        return names
    return [name.partition("/")[2] for name in names]


def color(shares_layers: bool) -> str:
    """Of a family of models."""
    return (SHARED if shares_layers else UNSHARED)[0]


def marker(shares_layers: bool) -> str:
    """Of a family of models."""
    return "s" if shares_layers else "o"


def line_styles(shares_layers: Sequence[bool]) -> Iterator[tuple[str, str]]:
    """A colour of each one's family and a dash pattern, no pair twice among nine of a family."""
    seen = Counter[bool]()
    for shared in shares_layers:
        palette, number = SHARED if shared else UNSHARED, seen[shared]
        seen[shared] += 1
        yield palette[number % 3], ("-", "--", ":")[number // 3 % 3]


def text_width(text: str, size: float) -> float:
    """Width of a text, known without drawing."""
    return TextPath((0, 0), text, size=size).get_extents().width


def points(axes: Axes, data: np.ndarray) -> np.ndarray:
    """Data coordinates `[n, 2]` to points from the figure's corner: a canvas's pixel is a point."""
    return axes.transData.transform(data)


def label_ends(
    axes: Axes,
    ends: Sequence[tuple[float, float]],
    labels: Sequence[str],
    colors: Sequence[str],
) -> None:
    """Labels right of the lines' ends, pushed apart, with hairlines to where they belong."""
    at = points(axes, np.array(ends))
    order = np.argsort(at[:, 1], kind="stable")
    steps = (LABEL + 2.5) * np.arange(len(ends))
    y = at[order, 1] - steps
    # Each half alone spreads to one side; their mean keeps the gaps and stays about the ends.
    y = (np.maximum.accumulate(y) + np.minimum.accumulate(y[::-1])[::-1]) / 2 + steps
    y += max(0.0, axes.transAxes.transform((0, 0))[1] + 4 - y[0])
    right = float(axes.transAxes.transform((1, 0))[0])
    for i, height in zip(order, y, strict=True):
        axes.annotate(
            str(labels[i]), ends[i], (max(right, at[i, 0]) + 8 - at[i, 0], height - at[i, 1]),
            textcoords="offset points", va="center", fontsize=LABEL, color=colors[i],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colors[i], "linewidth": 0.4, "shrinkA": 0.5,
                        "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
