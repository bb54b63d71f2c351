"""The figure of `decode_attention.py`: the fraction of the read bandwidth against K/V bytes."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode_report import ORDER, OURS, Row

COLOURS = {
    "mosaic_gpu": ("#000000", "o"),
    "cudnn": ("#0072B2", "s"),
    "xla": ("#56B4E9", "^"),
    "jax_nn_xla": ("#999999", "v"),
    "reference": ("#999999", "x"),
    "torch_flash": ("#D55E00", "D"),
    "torch_cudnn": ("#E69F00", "P"),
    "flashinfer": ("#009E73", "X"),
}


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """The fraction of the bandwidth against K/V bytes, a panel a head dim, as `.png` and `.svg`.

    bf16 caches with full rows. Points are shapes, lines the median of those of one size.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    drawn = [row for row in rows if row.fraction and row.shape.dtype == "bf16" and row.shape.full]
    if not drawn:
        return []
    dims = sorted({row.shape.H for row in drawn})
    style: Any = {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "cla-jax"}
    with mpl.rc_context(style):
        figure = Figure((1.2 + 3.1 * len(dims), 3.6), layout="constrained")
        panels = figure.subplots(1, len(dims), sharex=True, sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for panel, dim in zip(panels, dims, strict=True):
            for name in ORDER:
                points = [r for r in drawn if (r.implementation, r.shape.H) == (name, dim)]
                if not points:
                    continue
                colour, marker = COLOURS[name]
                sizes: dict[int, list[float]] = {}
                for row in points:
                    sizes.setdefault(row.shape.kv_bytes, []).append(row.fraction or 0.0)
                x = sorted(sizes)
                y = [sorted(sizes[s])[len(sizes[s]) // 2] for s in x]
                front = 3 if name == OURS else 2
                panel.plot(
                    [r.shape.kv_bytes for r in points], [r.fraction or 0.0 for r in points], marker,
                    color=colour, alpha=0.35, markersize=3, markeredgewidth=0, zorder=front,
                )  # fmt: skip
                (handles[name],) = panel.plot(
                    x, y, color=colour, linewidth=1.8 if name == OURS else 1.1, marker=marker,
                    markersize=3.5, label=name, zorder=front + 2,
                )  # fmt: skip
            panel.set(title=f"head dim {dim}", xlabel="K/V that a call reads", xscale="log")
            panel.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=1)
            panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            least = min(r.shape.kv_bytes for r in drawn)
            most = max(r.shape.kv_bytes for r in drawn)
            ticks = [10.0**p for p in range(0, 12) if least / 2 <= 10.0**p <= most * 2]
            panel.xaxis.set_major_locator(FixedLocator(ticks))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _bytes(x)))
        panels[0].set_ylabel("fraction of the read bandwidth")
        panels[0].set_ylim(0, max(1.05, 1.05 * max(row.fraction or 0.0 for row in drawn)))
        names = [name for name in ORDER if name in handles]
        figure.legend(
            [handles[name] for name in names], names, loc="outside lower center",
            ncols=len(names), frameon=False, fontsize=8,
        )  # fmt: skip
        places = []
        for kind in ("png", "svg"):
            place = stem.with_suffix(f".{kind}")
            notes = {"Software": None} if kind == "png" else {"Date": None}
            handle, temporary = tempfile.mkstemp(dir=place.parent, suffix=f".{kind}")
            os.close(handle)
            figure.savefig(temporary, format=kind, dpi=200, metadata=notes)
            os.replace(temporary, place)
            places.append(place)
    return places


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"
