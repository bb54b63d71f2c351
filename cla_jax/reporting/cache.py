"""What lies in a KV cache, call by call; and what it takes against the context."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from cla_jax.configs import ModelConfig
from cla_jax.inference.cache import KVCache
from cla_jax.inference.planning import MemorySettings, cache_bytes, weight_bytes
from cla_jax.inference.sizes import format_size
from cla_jax.reporting._style import (
    GRID,
    INK,
    LABEL,
    MUTED,
    SHARED,
    STYLE,
    canvas,
    label_ends,
    line_styles,
    short_names,
    text_width,
)
from cla_jax.sharing import KVSharing

__all__ = ["cache_contents", "cache_memory"]

_NEW, _OLD, _UNSEEN = SHARED[0], "#f3b48c", "#d0d0d0"


def cache_contents(
    caches: Sequence[KVCache],
    calls: Sequence[str],
    sharing: KVSharing,
    *,
    title: str | None = None,
) -> Figure:
    """The cache after each call: what the call has written, what lay there, what nobody sees.

    Found in the arrays themselves: an entry is written by a call if its keys or values are others
    than before. A line of panels for each row of the batch, a column for each call.

    Args:
        caches: the empty one, then that after each call. (A donated cache is gone: keep copies.)
        calls: what each of the calls was, in a word or two; one fewer than the caches.
        sharing: whose KV layers these are.
        title: what is seen; by default how many layers write and how many read.

    Raises:
        ValueError: no calls, or another number of them.
    """
    if not calls or len(caches) != len(calls) + 1:
        raise ValueError(
            f"{len(caches)} caches for {len(calls)} calls: expected the empty cache and one for "
            "each call"
        )
    held = [_entries(cache, sharing.kv_layers) for cache in caches]
    rows, slots, length = caches[0].batch, sharing.kv_layers, caches[0].length
    names = [_readers(sharing, owner) for owner in sharing.owner_layers]
    left = float(max(text_width(name, LABEL) for name in names) + 18)
    panel, tall, gap = 84.0, 12.0 * slots + 6, 16.0
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or _contents_title(sharing),
            "cells: token positions of a KV layer; dark: written by this call; light: written "
            "before; grey: padding, which no query sees",
            left=left, bottom=34.0, width=left + len(calls) * (panel + 10) + 8,
            height=80 + rows * (tall + gap),
        )  # fmt: skip
        x, y, _, _ = made.room
        for call, name in enumerate(calls):
            new = (held[call + 1] != held[call]).any(-1)
            some = (held[call + 1] != 0).any(-1)
            for row in range(rows):
                axes = made.axes(
                    x + call * (panel + 10), y + (rows - 1 - row) * (tall + gap), panel, tall
                )
                end = int(caches[call + 1].lengths[row])
                _draw_entries(axes, new[:, row], some[:, row], end)
                axes.set_title(
                    f"{name}\nrow {row}: length {end}" if row == 0 else f"row {row}: length {end}",
                    fontsize=7, color=INK, pad=3,
                )  # fmt: skip
                axes.set_yticks(np.arange(slots) + 0.5, names if call == 0 else [])
                axes.tick_params(length=0, labelsize=LABEL, pad=2)
                axes.set_xticks([0.5, length - 0.5], ["0", str(length - 1)])
                if row == rows - 1:
                    axes.set_xlabel("position", fontsize=7, labelpad=1)
    return made.figure


def cache_memory(
    configs: Sequence[ModelConfig],
    context: int = 32_768,
    *,
    batch: int = 1,
    settings: MemorySettings = MemorySettings(),  # noqa: B008 (frozen)
    title: str | None = None,
) -> Figure:
    """Bytes of the KV cache against the context, log-log, a line for each model.

    Each line is labelled with its bytes at `context`; dotted is what the weights of the first
    model take.

    Args:
        configs: the models, at least one.
        context: tokens of a row at which the labels are.
        batch: rows.
        settings: dtypes of cache and weights.
        title: what is seen; by default the first model's cache and the last's.

    Raises:
        ValueError: no models, or a size below 1.
    """
    if not configs:
        raise ValueError("no models to draw: expected at least one")
    at = [cache_bytes(config, batch, context, settings) for config in configs]
    names = short_names(config.name for config in configs)
    labels = [f"{name}  {format_size(size)}" for name, size in zip(names, at, strict=True)]
    contexts = np.geomspace(max(context // 64, 1), 4 * context, 40).round().astype(int)
    styles = list(line_styles([config.kv_layers < config.num_layers for config in configs]))
    weights = weight_bytes(configs[0], settings)
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or f"At {context:,} tokens, {batch:,} {'row' if batch == 1 else 'rows'}: "
            f"{format_size(at[0])} of cache for {names[0]}, {format_size(at[-1])} for {names[-1]}",
            f"{settings.cache_dtype} cache; the labels' bytes are those at {context:,} tokens; "
            f"dotted: the weights of {names[0]}",
            left=54.0, right=float(max(text_width(label, LABEL) for label in labels) + 16),
        )  # fmt: skip
        axes = made.axes(*made.room)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        lines = [[cache_bytes(c, batch, int(s), settings) for s in contexts] for c in configs]
        for line, (color, dash) in zip(lines, styles, strict=True):
            axes.plot(contexts, line, color=color, linestyle=dash, linewidth=1.3)
        axes.axhline(weights, color=MUTED, linewidth=0.9, linestyle=":")
        axes.axvline(context, color=MUTED, linewidth=0.7, linestyle=":")
        axes.set_xlim(contexts[0], contexts[-1])
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=10))
        low, high = min(map(min, lines)), max(weights, *map(max, lines))
        axes.set_ylim(low / 1.5, high * 1.5)
        ticks = [2.0**p for p in range(10, 50, 2) if low / 1.5 <= 2**p <= high * 1.5]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _binary(round(x), "")))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _binary(round(y), "B")))
        axes.set_xlabel("Context, tokens, log scale")
        axes.set_ylabel("KV cache, log scale")
        ends = [(float(contexts[-1]), float(line[-1])) for line in lines]
        label_ends(axes, ends, labels, [color for color, _ in styles])
    return made.figure


def _entries(cache: KVCache, kv_layers: int) -> np.ndarray:
    """Keys and values of every entry, `[G, B, S, 2 K H]`."""
    layers = [cache.rows(slot, 0, cache.batch).layer(0, "float32") for slot in range(kv_layers)]
    flat = [
        np.concatenate(
            [np.asarray(a, np.float32).reshape(*a.shape[:2], -1) for a in (kv.k, kv.v)], axis=-1
        )
        for kv in layers
    ]
    return np.stack(flat)


def _draw_entries(axes: Axes, new: np.ndarray, some: np.ndarray, end: int) -> None:
    """One row's cells `[G, S]`; slot 0 below, as in the drawings of the patterns."""
    slots, length = new.shape
    for slot, position in np.ndindex(slots, length):
        seen = position < end
        color = "white"
        if some[slot, position]:
            color = (_NEW if new[slot, position] else _OLD) if seen else _UNSEEN
        axes.add_patch(
            Rectangle((position, slot + 0.08), 1, 0.84, facecolor=color, edgecolor=GRID,
                      linewidth=0.4)
        )  # fmt: skip
    axes.axvline(end, color=INK, linewidth=1.0, zorder=3)
    axes.set_xlim(0, length)
    axes.set_ylim(0, slots)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _readers(sharing: KVSharing, owner: int) -> str:
    readers = [i for i, of in enumerate(sharing.owners) if of == owner and i != owner]
    slot = sharing.cache_slots[owner]
    if not readers:
        return f"KV {slot}: layer {owner}"
    return f"KV {slot}: layer {owner}, read by {', '.join(map(str, readers))}"


def _contents_title(sharing: KVSharing) -> str:
    return (
        f"{sharing.num_layers} layers attend at every call, {sharing.kv_layers} of them write: "
        f"the cache has {sharing.kv_layers} KV layers"
    )


def _binary(count: int, unit: str) -> str:
    """`512`, `8 Ki`, `2 MiB`."""
    power = 0
    while count >= 1024 and power < 4:
        count, power = count // 1024, power + 1
    suffix = f"{('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}{unit}"
    return f"{count:,} {suffix}".rstrip()
