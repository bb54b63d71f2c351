"""What a device's memory holds, as a table over sharing patterns and as a chart."""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cla_jax.configs import ModelConfig
from cla_jax.inference.planning import MemoryPlan, largest_batch, longest_context
from cla_jax.inference.sizes import format_size
from cla_jax.registry import match_models, model, model_names
from cla_jax.reporting._style import (
    LABEL,
    MUTED,
    STYLE,
    canvas,
    label_ends,
    line_styles,
    short_names,
    text_width,
)
from cla_jax.reporting.tables import Column
from cla_jax.sharing import KVSharing

__all__ = ["capacity", "columns", "variants"]

_PATTERNS = {"none": 1, "CLA2": 2, "CLA3": 3, "CLA4": 4}
_FIRST_CONTEXT, _LAST_CONTEXT = 512, 131_072


def variants(config: ModelConfig, patterns: Sequence[str] = ()) -> tuple[ModelConfig, ...]:
    """A model's architecture under several sharing patterns; the model itself is among them.

    A variant that is one of the registry's models has its name. All other sizes stay, so parameter
    counts differ by the K/V projections.

    Args:
        config: the model.
        patterns: sharing patterns (`CLA2`, `CLA2-KeepEnds`, `MLKV-6`), models of the registry or
            globs over them (`1B/H128-*`). Default: none, CLA2, CLA3 and CLA4.

    Raises:
        ValueError: an unknown pattern or model, or one that does not fit the depth.
    """
    named = {dataclasses.replace(model(name), name=""): name for name in model_names()}
    found: dict[ModelConfig, ModelConfig] = {}

    def add(variant: ModelConfig) -> None:
        found.setdefault(dataclasses.replace(variant, name=""), variant)

    for pattern in patterns or [p for p, n in _PATTERNS.items() if n <= config.num_layers]:
        if "/" in pattern:
            for name in match_models(pattern.partition("/")[0], [pattern]):
                add(model(name))
            continue
        sharing = KVSharing.from_name(pattern, config.num_layers, config.kv_heads)
        if sharing == config.sharing:
            add(config)
            continue
        # The norm of an owner's own comes and goes with sharing, as in the registry.
        shares, shared = (s.kv_layers < s.num_layers for s in (sharing, config.sharing))
        own_norm = shares and (config.separate_kv_norm if shared else config.rms_norm)
        variant = dataclasses.replace(config, sharing=sharing, separate_kv_norm=own_norm)
        name = named.get(dataclasses.replace(variant, name=""), f"{config.name} as {pattern}")
        add(dataclasses.replace(variant, name=name))
    add(config)
    return tuple(found.values())


def columns(batch: int, context: int, bandwidth: int | None) -> tuple[Column[MemoryPlan], ...]:
    """Columns of a table of plans for one batch, context and memory.

    Args:
        batch: of every plan.
        context: of every plan.
        bandwidth: bytes per second: adds the floor of a decode step at the largest batch.
    """

    def seconds(plan: MemoryPlan) -> float | None:
        if not plan.largest_batch or bandwidth is None:
            return None
        return plan.reads(plan.largest_batch).seconds(bandwidth)

    def milliseconds(plan: MemoryPlan) -> float | None:
        floor = seconds(plan)
        return None if floor is None else 1e3 * floor

    def rate(plan: MemoryPlan) -> float | None:
        floor = seconds(plan)
        return None if floor is None else plan.largest_batch / floor

    shown = (
        Column[MemoryPlan]("model", "model", lambda plan: plan.config.name),
        Column[MemoryPlan]("kv_layers", "KV layers", lambda plan: plan.config.kv_layers, "d"),
        Column[MemoryPlan](
            "kv_bytes_per_token", "KV bytes per token", lambda plan: plan.kv_bytes_per_token, "d"
        ),
        Column[MemoryPlan](
            "largest_batch", f"largest batch at {context:,}", lambda plan: plan.largest_batch, "d"
        ),
        Column[MemoryPlan](
            "longest_context",
            f"longest context at batch {batch:,}",
            lambda plan: plan.longest_context,
            "d",
        ),
    )
    if bandwidth is None:
        return shown
    return (
        *shown,
        Column("step_ms", "ms/step, largest batch", milliseconds, ".2f"),
        Column("tokens_per_second", "tokens/s, largest batch", rate, ".0f"),
    )


def capacity(plans: Sequence[MemoryPlan], *, title: str | None = None) -> Figure:
    """The largest batch that fits against the context, log-log, a line for each model.

    The lines run from 512 tokens to 128 Ki or to twice the plans' context; they end where the
    model with the largest cache holds a single sequence. Each is labelled with its largest batch
    at the plans' context. Save it with `cla_jax.reporting.figures.save`.

    Args:
        plans: of one context and memory; their batch does not matter.
        title: what is seen.

    Raises:
        ValueError: no plans, or none whose model fits with one sequence of the plans' context.
    """
    fitting = [plan for plan in plans if plan.largest_batch]
    if not fitting:
        raise ValueError("nothing to draw: no model fits into memory with one sequence")
    context, memory = fitting[0].context, fitting[0].memory
    longest = min(longest_context(p.config, 1, memory, p.settings) for p in fitting)
    last = min(max(_LAST_CONTEXT, 2 * context), longest)
    first = min(_FIRST_CONTEXT, context, max(1, last // 16))  # four ticks at least
    contexts = np.unique(np.geomspace(first, max(last, first + 1), 120).astype(int)).tolist()
    lines = [
        [largest_batch(p.config, length, memory, p.settings) for length in contexts]
        for p in fitting
    ]
    names = short_names(plan.config.name for plan in fitting)
    labels = [f"{n}  {p.largest_batch:,}" for n, p in zip(names, fitting, strict=True)]
    shares = [plan.config.kv_layers < plan.config.num_layers for plan in fitting]
    styles = list(line_styles(shares))
    settings = fitting[0].settings
    with matplotlib.rc_context(STYLE):
        made = canvas(
            title or f"Largest batch that fits into {format_size(memory)}",
            f"{settings.compute_dtype} weights, {settings.cache_dtype} cache; numbers: the largest "
            f"batch at a context of {context:,}",
            left=52.0, right=float(max(text_width(label, LABEL) for label in labels) + 16),
        )  # fmt: skip
        axes = made.axes(*made.room)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(contexts[0], contexts[-1])
        axes.set_ylim(max(0.8, 0.8 * min(map(min, lines))), 1.5 * max(map(max, lines)))
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=10))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(round(x))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.axvline(context, color=MUTED, linewidth=0.7, linestyle=":")
        for line, (color, dash) in zip(lines, styles, strict=True):
            axes.plot(contexts, line, color=color, linestyle=dash, linewidth=1.2)
        axes.set_xlabel("Context, tokens, log scale")
        axes.set_ylabel("Largest batch, log scale")
        ends = [(float(contexts[-1]), float(line[-1])) for line in lines]
        label_ends(axes, ends, labels, [color for color, _ in styles])
    return made.figure


def _tokens(count: int) -> str:
    """`512`, `8 Ki`."""
    return f"{count // 1024} Ki" if count >= 1024 and count % 1024 == 0 else f"{count:,}"
