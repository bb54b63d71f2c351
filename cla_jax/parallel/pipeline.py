"""How the rows of a step go through a mesh, and the step time that a pipeline can reach at best.

How layers are run in stages is `cla_jax.models.pipeline_layers`, which knows no mesh; which layers
can be is `KVSharing.pipeline`.
"""

import dataclasses
from typing import Any

from cla_jax._mesh import MeshConfig
from cla_jax.configs import ModelConfig, Remat, TrainConfig
from cla_jax.models.pipeline import MICROBATCHES_PER_STAGE, microbatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the rows of a forward and backward pass are dealt out.

    Attributes:
        rows: of a pass, over all devices.
        shards: parts that they are split into, over `data` and `fsdp`.
        stages: of the pipeline; 1: none.
        microbatches: that a pass is cut into for it; 1 without stages.
    """

    rows: int
    shards: int
    stages: int
    microbatches: int

    @classmethod
    def of(cls, training: TrainConfig, mesh: MeshConfig) -> "Schedule":
        """Of a recipe on a resolved mesh.

        Raises:
            ValueError: rows of a pass that `data` and `fsdp` do not divide; microbatches that do
                not divide the rows, or without stages; fewer microbatches than stages, where nobody
                has asked for so few. Names what works.
        """
        wanted = training.execution.pipeline_microbatches
        if mesh.stage == 1 and wanted:
            raise ValueError(
                f"pipeline_microbatches={wanted}, but mesh {mesh} has no stages: leave them out, "
                "or name a mesh such as stage=2"
            )
        rows, shards = training.micro_batch_size or training.data.batch_size, mesh.batch_shards
        if rows % shards:
            what = "micro-batch" if training.micro_batch_size else "batch"
            raise ValueError(
                f"mesh {mesh} splits rows by {shards} (data and fsdp), which does not divide a "
                f"{what} of {rows} rows; the nearest that works is {_nearest(training, mesh)}"
            )
        count = 1
        if mesh.stage > 1:
            count = microbatches(training.execution, rows, mesh.stage, shards)
        if count < mesh.stage and not wanted:
            raise ValueError(_too_few(training, mesh, count))
        return cls(rows=rows, shards=shards, stages=mesh.stage, microbatches=count)

    @property
    def rows_per_device(self) -> int:
        """That a device runs at a time: of a pass, in a pipeline of a microbatch."""
        return self.rows // (self.shards * self.microbatches)

    @property
    def bubble(self) -> float:
        """Time that a stage waits over that in which it works: `(P - 1) / C`."""
        return (self.stages - 1) / self.microbatches

    @property
    def record(self) -> dict[str, Any]:
        """As JSON values, for what a run keeps."""
        return {
            "rows": self.rows,
            "rows_per_device": self.rows_per_device,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "bubble_percent": round(100 * self.bubble, 1),
        }

    def __str__(self) -> str:
        each = f"{self.rows_per_device} on a device"
        if self.stages == 1:
            return f"passes of {self.rows} rows, {each}"
        return (
            f"passes of {self.rows} rows in {self.microbatches} "
            f"microbatch{'es' * (self.microbatches > 1)}, {each} at a time; bubble "
            f"{self.bubble:.1%} of a stage's work"
        )


def _passes(batch: int, training: TrainConfig, mesh: MeshConfig) -> list[int]:
    """Rows that the passes of a batch can have on a mesh, fewest first."""
    shards, stages = mesh.batch_shards, mesh.stage
    wanted = training.execution.pipeline_microbatches

    def fits(rows: int) -> bool:
        if wanted:
            return rows // shards % wanted == 0
        return stages == 1 or microbatches(training.execution, rows, stages, shards) >= stages

    multiples = range(shards, batch + 1, shards)
    return [rows for rows in multiples if batch % rows == 0 and fits(rows)]


def _batch_that_works(training: TrainConfig, mesh: MeshConfig) -> int:
    """The recipe's batch, or the nearest that has a pass for the mesh."""
    batch, wanted = training.data.batch_size, training.execution.pipeline_microbatches
    if _passes(batch, training, mesh):
        return batch
    least = mesh.batch_shards * (wanted or mesh.stage)
    return max(round(batch / least), 1) * least


def _nearest(training: TrainConfig, mesh: MeshConfig) -> str:
    """The rows of a pass, or of the batch, that work and are nearest to a recipe's."""
    batch, micro = training.data.batch_size, training.micro_batch_size
    works = _batch_that_works(training, mesh)
    if not micro:
        return f"{works}"
    near = min(_passes(works, training, mesh), key=lambda rows: abs(rows - micro))
    return f"{near}" if works == batch else f"{near}, of a batch of {works}"


def _too_few(training: TrainConfig, mesh: MeshConfig, count: int) -> str:
    """Says that a pipeline would have fewer microbatches than stages, and what gives it more."""
    shards, stages = mesh.batch_shards, mesh.stage
    rows, batch = training.micro_batch_size or training.data.batch_size, training.data.batch_size
    whole = _batch_that_works(training, mesh)
    enough = {n: microbatches(training.execution, n, stages, shards)
              for n in _passes(whole, training, mesh)}  # fmt: skip
    fewest, most = min(enough), [n for n in enough if enough[n] == MICROBATCHES_PER_STAGE * stages]
    works = " or ".join(
        f"of {n} rows ({enough[n]} microbatches, bubble {(stages - 1) / enough[n]:.0%})"
        for n in dict.fromkeys([fewest, *most[:1]])
    )
    split = f", {rows // shards} on each of {shards} data and fsdp shards" if shards > 1 else ""
    return (
        f"mesh {mesh} leaves its pipeline {count} microbatch{'es' * (count > 1)}, fewer than its "
        f"{stages} stages (bubble {(stages - 1) / count:.0%}): a pass has {rows} rows{split}. What "
        f"works: {f'a batch of {whole}, ' if whole != batch else ''}micro-batches {works}; or "
        f"pipeline_microbatches={count} (--microbatches {count}), if that is meant"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineIdeal:
    """The best that a pipeline can do, against one of its devices alone on the same rows.

    With `C` microbatches and `P` stages a pass has `C + P - 1` ticks, of which a stage works in
    `C`: the bubble. `body`, `outside` and `head` are shares of the arithmetic of a step (FLOPs of
    matrix products, forward and backward, without rematerialisation) and sum to 1. What is outside
    the body is split over the stages without a bubble: layers by rows, embedding and output
    projection by vocabulary or tokens, what fills these up not counted. Sending costs nothing, and
    every device is as fast as one alone.

    Attributes:
        stages: `P`.
        microbatches: `C`.
        body: share of the layers in stages.
        outside: share of the layers in none.
        head: share of the output projection.
        remat: arithmetic of the body over that without rematerialisation.
    """

    stages: int
    microbatches: int
    body: float
    outside: float
    head: float
    remat: float

    @property
    def bubble(self) -> float:
        """Ticks over those in which a stage works: `(C + P - 1) / C`."""
        return (self.microbatches + self.stages - 1) / self.microbatches

    @property
    def step(self) -> float:
        """Step time over that of one device, without rematerialisation.

        `(body * remat * bubble + outside + head) / P`.
        """
        return (self.body * self.remat * self.bubble + self.outside + self.head) / self.stages


def pipeline_ideal(
    config: ModelConfig,
    stages: int,
    microbatches: int,
    *,
    remat: Remat = "none",
    sequence_length: int | None = None,
) -> PipelineIdeal:
    """The ideal of a model on `stages` devices, which a measured step is compared with.

    `remat`: `full` runs the forward pass of the body once more, a third of its arithmetic; `dots`
    only attention's two products of it. Layers outside are counted without.

    Args:
        config: the model.
        stages: of the pipeline, one device each.
        microbatches: of a pass.
        remat: as in `ExecutionConfig`.
        sequence_length: of the training rows; default the model's.

    Raises:
        ValueError: stages that the model cannot be cut into, no microbatches.

    Examples:
        >>> from cla_jax.registry import model
        >>> ideal = pipeline_ideal(model("1B/H128-MQA-CLA2"), stages=2, microbatches=8)
        >>> ideal.bubble, round(ideal.head, 3), round(1 / ideal.step, 2)  # times as fast as one
        (1.125, 0.1, 1.8)
    """
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}: expected at least 1")
    layers = config.sharing.pipeline(stages)
    stretch = range(layers[0].start, layers[-1].stop)
    body = dataclasses.replace(config, sharing=config.sharing.part(stretch))

    total = config.flops_per_token(sequence_length)
    head = 6 * config.vocab_size * config.d_model
    in_body = body.flops_per_token(sequence_length) - head
    length = sequence_length or config.sequence_length
    attention = 2 * len(stretch) * config.query_heads * config.head_dim * length
    again = {"none": 0.0, "full": 1 / 3, "dots": attention / in_body}[remat]
    return PipelineIdeal(
        stages=stages,
        microbatches=microbatches,
        body=in_body / total,
        outside=(total - head - in_body) / total,
        head=head / total,
        remat=1 + again,
    )
