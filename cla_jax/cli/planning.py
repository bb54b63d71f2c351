"""`cla-jax plan` and `plan-mesh`: what fits into memory, before anything is run."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from cla_jax import registry
from cla_jax.configs import CacheDtype, MeshConfig, ModelConfig, Remat
from cla_jax.recipes import RECIPES

if TYPE_CHECKING:
    from cla_jax.evaluation.mesh_plan import MeshPlan
    from cla_jax.inference.planning import MemoryPlan


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what fits into a device's memory: the largest batch at a context, the longest context.

    Also under other sharing patterns and, with --bandwidth, how fast a decode step can be at most.
    Nothing is run. Example: `cla-jax plan --model 1B/H128-MQA-CLA2 --memory 141GB --context 8192
    --batch 64 --bandwidth 4.47TB/s --figure capacity`
    """

    model: str
    """The model; `cla-jax models` lists them."""
    memory: str
    """What JAX may use: 141GB (10^9 bytes each), 80GiB (2^30) or bytes. Of a GPU it takes 75 %
    unless XLA_CLIENT_MEM_FRACTION says otherwise."""
    context: int | None = None
    """Tokens of each sequence, prompt and new ones. Default: as many as in training."""
    batch: int = 1
    """Sequences at once."""
    cache_dtype: CacheDtype = "bfloat16"
    """Of the K/V cache; 8-bit ones with their scales."""
    bandwidth: str | None = None
    """Of the memory, such as 4.47TB/s: adds the least time of a decode step."""
    patterns: tuple[str, ...] = ()
    """What to compare with: sharing patterns (CLA2, CLA2-KeepEnds, MLKV-6), models, or globs over
    models ('1B/H128-*'). Default: none, CLA2, CLA3, CLA4."""
    figure: Path | None = None
    """Draw the largest batch against the context: as FILE.png and FILE.svg, or, where FILE ends in
    .png, .svg or .pdf, as that alone."""

    def run(self) -> None:
        """Print it."""
        config = registry.model(self.model)  # before the slow imports: a bad name fails at once
        from cla_jax.inference import planning
        from cla_jax.inference.sizes import format_size, parse_bandwidth, parse_size
        from cla_jax.reporting import figures
        from cla_jax.reporting.planning import capacity, columns, variants
        from cla_jax.reporting.tables import terminal_table

        if self.figure is not None:
            figures.files_of(self.figure)
        memory = parse_size(self.memory)
        bandwidth = None if self.bandwidth is None else parse_bandwidth(self.bandwidth)
        context = config.sequence_length if self.context is None else self.context
        settings = planning.MemorySettings(cache_dtype=self.cache_dtype)
        plan, *others = (
            planning.MemoryPlan(one, self.batch, context, memory, settings)
            for one in (config, *variants(config, self.patterns))
        )
        if plan.weights >= memory:
            raise ValueError(planning.weights_do_not_fit(plan))
        console = Console()
        print(
            f"{config.name}, batch {self.batch:,}, context {context:,}, "
            f"{settings.cache_dtype} cache, in {format_size(memory)}\n"
        )
        console.print(_summary(plan, bandwidth))
        if context > config.sequence_length:
            print(_longer(config, context))
        print()
        console.print(terminal_table(others, columns(self.batch, context, bandwidth)))
        if self.figure is not None:
            for path in figures.save(capacity(others), self.figure):
                print(f"wrote {path}")


def _summary(plan: "MemoryPlan", bandwidth: int | None) -> Table:
    """Where the memory goes, and what would fit."""
    from cla_jax.inference.sizes import format_size

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()

    def add(name: str, size: str, note: str = "") -> None:
        table.add_row(name, size, note)

    fits = plan.total <= plan.memory
    difference = format_size(abs(plan.memory - plan.total))
    cached = f"{plan.config.kv_layers} of {plan.config.num_layers} layers own K/V"
    add("weights", format_size(plan.weights), f"{plan.settings.compute_dtype}, norms float32")
    add("KV per token", f"{plan.kv_bytes_per_token:,} B", cached)
    add("KV cache", format_size(plan.cache), f"{plan.cache:,} B")
    add("workspace", format_size(plan.workspace), "upper estimate")
    verdict = f"fits, {difference} to spare" if fits else f"does not fit: {difference} too much"
    add("total", format_size(plan.total), verdict)
    add("largest batch", f"{plan.largest_batch:,}", f"at context {plan.context:,}")
    trained = plan.config.sequence_length
    beyond = f"; trained on {trained:,}" if plan.longest_context > trained else ""
    add("longest context", f"{plan.longest_context:,}", f"at batch {plan.batch:,}{beyond}")
    if bandwidth is not None:
        reads = plan.reads()
        seconds = reads.seconds(bandwidth)
        add("decode floor", f"{1e3 * seconds:,.3f} ms",
            f"a step, {plan.batch / seconds:,.0f} tokens/s: {format_size(reads.weights)} of "
            f"weights and {format_size(reads.kv)} of K/V, every layer's, read at "
            f"{format_size(bandwidth)}/s")  # fmt: skip
    return table


@dataclasses.dataclass(frozen=True)
class PlanMesh:
    """Compile a model for a mesh of devices that need not be there: memory and traffic of each.

    The training step, the prefill of whole prompts and a step of decoding are compiled by XLA and
    read; nothing is run. TPU targets need the libtpu package, on any machine. Example: `cla-jax
    plan-mesh --model tiny/MQA-CLA2 --mesh fsdp=2,tensor=2 --target cpu:4`
    """

    model: str
    """The model; `cla-jax models` lists them."""
    mesh: str
    """Devices along each axis, as in fsdp=4,tensor=4."""
    target: str
    """Devices: a TPU topology (v5e:4x4, v5p:4x4x4, v6e:4x4, v4:2x2x4), or cpu:8 without libtpu.
    XLA for CPUs sends 16-bit values as 32-bit ones, and its temporaries are not a TPU's."""
    programs: tuple[Literal["train", "prefill", "decode"], ...] | None = None
    """What is compiled. Default: all; with stages or a preset train alone, with a longer context
    than in training the others."""
    preset: Literal["tiny", "cla-1b", "cla-3b", "mlkv"] | None = None
    """The training step that `cla-jax train` takes with it, but for what is named here."""
    batch: int | None = None
    """Rows over all devices. Default: the preset's, or as many as there are devices."""
    micro_batch: int | None = None
    """Of the training step: rows of a forward and backward pass. Default: the preset's, or all."""
    microbatches: int | None = None
    """Of a pipeline: parts that these are cut into. Default: up to four a stage."""
    context: int | None = None
    """Tokens of a row; of a cache, its room. Default: as many as in training."""
    remat: Remat | None = None
    """Of the training step: what its backward pass recomputes. Default: the preset's, or none."""
    unroll: int | None = None
    """Of its scans over layers; more compiles longer. Default: the preset's, or 1."""
    cache_dtype: CacheDtype = "bfloat16"
    """Of the K/V cache."""
    json: bool = False
    """Print JSON, bytes as they are, instead of a table."""

    def run(self) -> None:
        """Compile and print."""
        config = registry.model(self.model)  # before the slow imports: a bad name fails at once
        mesh = MeshConfig.parse(self.mesh)
        from cla_jax.evaluation.mesh_plan import MeshWork, plan_mesh

        plans = plan_mesh(
            config, mesh, self.target, self.programs,
            MeshWork(
                batch=self.batch, context=self.context, remat=self.remat, unroll=self.unroll,
                cache_dtype=self.cache_dtype, micro_batch=self.micro_batch,
                microbatches=self.microbatches,
                recipe=None if self.preset is None else RECIPES[self.preset],
            ),
        )  # fmt: skip
        if self.json:
            print(json.dumps([_values(plan) for plan in plans], indent=2))
            return
        one = plans[0]
        devices = f"{one.target} ({one.device})"
        print(
            f"{one.model} on {devices}, mesh {one.mesh}, batch {one.batch:,}, context "
            f"{one.context:,}; of each device\n"
        )
        if one.schedule is not None:
            print(f"train: {one.schedule}\n")
        Console().print(_mesh_table(plans))
        if one.context > config.sequence_length:
            print(_longer(config, one.context))
        if not all(plan.fits for plan in plans):
            print(
                "\nWhat does not fit may with fewer rows (--batch, --micro-batch), --remat full or "
                "more fsdp."
            )


def _longer(config: ModelConfig, context: int) -> str:
    return (
        f"\nnote: the model was trained on {config.sequence_length:,} tokens; a context of "
        f"{context:,} is planned for memory alone"
    )


def _values(plan: "MeshPlan") -> dict[str, object]:
    schedule = None if plan.schedule is None else plan.schedule.record
    return {**dataclasses.asdict(plan), "schedule": schedule}


def _mesh_table(plans: "list[MeshPlan]") -> Table:
    from cla_jax.inference.sizes import format_size

    table = Table(box=None, pad_edge=False)
    table.add_column("program", no_wrap=True)
    for name in ("arguments", "temporaries", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("of memory", justify="right")
    table.add_column("sent in a run, by mesh axis")
    for plan in plans:
        sizes = (plan.arguments, plan.temporaries, plan.total)
        share = "" if not plan.memory else f"of {format_size(plan.memory)}"
        if plan.memory and plan.total:
            share = f"{plan.total / plan.memory:.0%} {share}"
        sent = ", ".join(f"{axis} {format_size(count)}" for axis, count in plan.sent.items())
        if not plan.counted:  # XLA does not tell how often some loop runs
            sent = f"at least {sent}"
        table.add_row(
            plan.program,
            *("" if size is None else format_size(size) for size in sizes),
            share,
            (sent or "nothing") if plan.fits else "does not fit",
        )
    return table
