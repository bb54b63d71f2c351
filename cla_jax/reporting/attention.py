"""Attention maps of the layers that read the same keys and values."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cla_jax.reporting._style import INK, MUTED, SHARED, STYLE, canvas
from cla_jax.sharing import KVSharing

__all__ = ["attention_maps", "overlap"]

_SHADES = LinearSegmentedColormap.from_list("weights", ["#ffffff", "#f6c9a8", SHARED[0], "#3d1400"])
_LABELLED = 40  # tokens of which each is named


def attention_maps(
    weights: Sequence[np.ndarray],
    sharing: KVSharing,
    owner: int,
    tokens: Sequence[str],
    *,
    row: int = 0,
    title: str | None = None,
) -> Figure:
    """The maps of every query head of an owner and of its readers, over one set of K/V.

    A row of panels for each layer, a column for each query head; the darker, the larger the share
    of the query's attention. The colour scale is that of a square root: small weights are seen too.

    Args:
        weights: of every layer `[B, N, T, S]`, as `cla_jax.inference.attention_weights` gives them.
        sharing: who owns and who reads.
        owner: whose group is drawn.
        tokens: what the `T` positions hold, as short texts.
        row: of the batch.
        title: what is seen; by default how far the readers' maps overlap with the owner's.

    Raises:
        ValueError: a layer that owns nothing, or other counts of layers or tokens.
    """
    if not 0 <= owner < sharing.num_layers or not sharing.owns(owner):
        owners = ", ".join(map(str, sharing.owner_layers))
        raise ValueError(f"layer {owner} owns no K/V; the owners are {owners}")
    if len(weights) != sharing.num_layers:
        raise ValueError(f"{len(weights)} layers of weights; the map has {sharing.num_layers}")
    layers = [layer for layer, of in enumerate(sharing.owners) if of == owner]
    maps = [np.asarray(weights[layer][row], np.float64) for layer in layers]
    heads, length, _ = maps[0].shape
    if len(tokens) != length:
        raise ValueError(f"{len(tokens)} tokens were given for maps of {length}")
    gap, size, label = 8.0, 480.0 / heads, 44.0
    height = len(layers) * (size + gap) + 62
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or _title(maps, layers),
            "query heads from left to right; a query's row of weights sums to 1; darker is more",
            left=label, bottom=28.0, right=6.0, width=label + heads * (size + gap) + 6,
            height=height,
        )  # fmt: skip
        left, bottom, _, _ = made.room
        for i, (layer, of_layer) in enumerate(zip(layers, maps, strict=True)):
            y = bottom + (len(layers) - 1 - i) * (size + gap)
            for head in range(heads):
                axes = made.axes(left + head * (size + gap), y, size, size)
                axes.imshow(np.sqrt(of_layer[head]), cmap=_SHADES, vmin=0, vmax=1)
                _set_ticks(axes, tokens, size, rows=head == 0, columns=i == len(layers) - 1)
                if head == 0:
                    role = "owns" if layer == owner else "reads"
                    axes.set_ylabel(f"layer {layer} {role}\nquery", fontsize=7.5, color=INK)
                if i == len(layers) - 1:
                    axes.set_xlabel(f"key of layer {owner}", fontsize=7.5)
    return made.figure


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """How much of two layers' attention is the same, 0 to 1: the mean over heads and queries.

    Of a query, the sum over the keys of the smaller of both weights. The first query is left out:
    it sees one key.

    Args:
        one: `[N, T, S]`.
        other: alike.
    """
    return float(np.minimum(one, other).sum(-1)[:, 1:].mean())


def _title(maps: Sequence[np.ndarray], layers: Sequence[int]) -> str:
    if len(maps) == 1:
        return f"Layer {layers[0]}: no other layer reads its keys and values"
    shares = [f"{overlap(maps[0], of_reader):.0%}" for of_reader in maps[1:]]
    several = "s" if len(shares) > 1 else ""
    return (
        f"Same keys, other questions: layer{several} {' and '.join(map(str, layers[1:]))} "
        f"share{'' if several else 's'} {' and '.join(shares)} of layer {layers[0]}'s attention"
    )


def _set_ticks(
    axes: Axes, tokens: Sequence[str], size: float, *, rows: bool, columns: bool
) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0, pad=1.5, labelcolor=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#cccccc")
    named = range(len(tokens)) if len(tokens) <= _LABELLED else ()
    cell = size / len(tokens)
    shown = [tokens[i] for i in named]
    # A character is higher than wide.
    for ticks, wanted, share in ((axes.set_yticks, rows, 1.0), (axes.set_xticks, columns, 1.3)):
        ticks(
            [*named] if wanted else [], shown if wanted else [],
            fontsize=min(6.5, share * cell), family="DejaVu Sans Mono",
        )  # fmt: skip
