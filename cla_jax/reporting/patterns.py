"""A drawing of sharing maps side by side, after CLA Figure 2."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cla_jax.configs import ModelConfig
from cla_jax.reporting._style import Picture
from cla_jax.sharing import KVSharing

__all__ = ["patterns"]

TITLE = "Only owners' keys and values are cached; the other layers read them"

_UNSHARED = "#0b62a4"
_GROUPS = ("#c1440e", "#e8912d")  # alternating, so that neighbouring groups stay apart
_KEY = ("filled: owns keys and values (cached)", "outline: reads an owner's (caches nothing)")
_ROW = 0.143  # inches of a layer
_INK, _MUTED = "#222222", "#6b6b6b"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "cla-jax",
}


def patterns(models: Sequence[ModelConfig], *, title: str = TITLE) -> Figure:
    """Every layer of each model: filled where it owns K/V, in outline where it reads them.

    A line joins readers to their owner; below each column, the KV layers and the bytes of a 16-bit
    cache per token. Save it with `cla_jax.reporting.figures.save`.

    Args:
        models: a column each; their depths may differ.
        title: one line above the columns.

    Raises:
        ValueError: no models.
    """
    if not models:
        raise ValueError("no models to draw: expected at least one")
    deepest = max(config.num_layers for config in models)
    with matplotlib.rc_context(_STYLE):
        width = 0.6 + 1.02 * len(models)
        head = textwrap.wrap(title, int(11.5 * width) - 2)
        key = [line for text in _KEY for line in textwrap.wrap(text, int(20 * width))]
        if len(" ".join(key)) < 20 * width:
            key = ["     ".join(key)]
        bottom, top = -2.7 - len(key), deepest + 2.9 + 1.2 * len(head)
        figure = Picture(figsize=(width, _ROW * (top - bottom)), facecolor="white")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(-0.62, len(models) - 0.45)
        axes.set_ylim(bottom, top)
        axes.axis("off")
        for column, config in enumerate(models):
            _draw_column(axes, column, config, deepest)
        axes.text(-0.57, 0.5, "layer 0", color=_MUTED, va="center", fontsize=6.5)
        axes.text(-0.57, deepest - 0.5, f"layer {deepest - 1}", color=_MUTED, va="center",
                  fontsize=6.5)  # fmt: skip
        axes.text(-0.57, top - 0.4, "\n".join(head), weight="bold", color=_INK, fontsize=9,
                  va="top")  # fmt: skip
        axes.text(-0.57, -2.5, "\n".join(key), color=_MUTED, fontsize=7, va="top")
    return figure


def _draw_column(axes: Axes, column: int, config: ModelConfig, deepest: int) -> None:
    sharing = config.sharing
    for layer, color in enumerate(_colors(sharing)):
        face = color if sharing.owns(layer) else "white"
        axes.add_patch(
            Rectangle(
                (column - 0.16, layer + 0.12),
                0.32,
                0.76,
                facecolor=face,
                edgecolor=color,
                linewidth=0.9,
            )
        )
    last = {owner: layer for layer, owner in enumerate(sharing.owners)}
    for owner, end in last.items():
        if end > owner:
            x, color = column + 0.22, _colors(sharing)[owner]
            axes.plot([x, x], [owner + 0.25, end + 0.75], color=color, linewidth=1.4,
                      solid_capstyle="butt")  # fmt: skip
    _, _, variant = config.name.rpartition("/")
    kind, _, shape = variant.rpartition("-") if variant.count("-") > 2 else (variant, "", "")
    axes.text(column, deepest + 1.5, kind, ha="center", weight="bold", color=_INK, fontsize=6.8)
    if shape:
        axes.text(
            column, deepest + 0.6, shape, ha="center", weight="bold", color=_INK, fontsize=6.8
        )
    axes.text(column, -0.65, f"{config.kv_layers} KV layers", ha="center", va="center", color=_INK)
    axes.text(
        column, -1.55, f"{config.kv_bytes_per_token:,} B/token", ha="center", va="center",
        color=_INK,
    )  # fmt: skip


def _colors(sharing: KVSharing) -> list[str]:
    """A colour for each layer: its group's, or blue for a layer that shares with no other."""
    owner_of = sharing.owners
    groups = [owner for owner in sharing.owner_layers if owner_of.count(owner) > 1]
    return [
        _GROUPS[groups.index(owner) % 2] if owner in groups else _UNSHARED for owner in owner_of
    ]
