"""What a pipeline asks of a recipe, and the step time that it can reach at best.

How layers are run in stages is `cla_jax.models.pipeline_layers`, which knows no mesh; which layers
can be is `KVSharing.pipeline`.
"""

import dataclasses

from cla_jax._mesh import MeshConfig
from cla_jax.configs import ExecutionConfig, ModelConfig, Remat
from cla_jax.models.pipeline import microbatches
from cla_jax.sharing import KVSharing


def check_pipeline(
    model: ModelConfig, execution: ExecutionConfig, mesh: MeshConfig, rows: int
) -> None:
    """Whether a batch goes through the stages of a mesh.

    Args:
        model: that the mesh fits (`Rules.of`).
        execution: whose `pipeline_microbatches` are checked.
        mesh: resolved.
        rows: of a forward and backward pass.

    Raises:
        ValueError: microbatches that do not divide the rows, or without stages; rows that layers
            outside the stages cannot be split by; names the nearest number that works.
    """
    count = execution.pipeline_microbatches
    if mesh.stage == 1:
        if count:
            raise ValueError(
                f"pipeline_microbatches={count}, but mesh {mesh} has no stages: leave them out, or "
                "name a mesh such as stage=2"
            )
        return
    microbatches(execution, rows, mesh.stage, mesh.batch_shards)
    parts = mesh.batch_shards * mesh.stage
    if len(model.sharing.segments) > 1 and rows % parts:
        raise ValueError(
            f"{model.name}: layers outside the pipeline's stages split {rows} rows by {parts} "
            f"(data, fsdp and stage of mesh {mesh}); the nearest number of rows that works is "
            f"{max(round(rows / parts), 1) * parts}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineIdeal:
    """The best that a pipeline can do, against one of its devices alone on the same rows.

    With `C` microbatches and `P` stages a pass has `C + P - 1` ticks, of which a stage works in
    `C`: the bubble. `body`, `outside` and `head` are shares of the arithmetic of a step (FLOPs of
    matrix products, forward and backward, without rematerialisation) and sum to 1. What is outside
    the body is split over the stages without a bubble: layers by rows, embedding and output
    projection by vocabulary or tokens. Sending costs nothing, and every device is as fast as one
    alone.

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
    # The map of the body is that of a stage, as often as there are stages.
    first, depth = layers[0], layers[-1].stop - layers[0].start
    owners = config.sharing.owners[first.start : first.start + depth]
    body_map = KVSharing(tuple(owner - first.start for owner in owners))
    body = dataclasses.replace(config, sharing=body_map)

    total = config.flops_per_token(sequence_length)
    head = 6 * config.vocab_size * config.d_model
    in_body = body.flops_per_token(sequence_length) - head
    length = sequence_length or config.sequence_length
    attention = 2 * depth * config.query_heads * config.head_dim * length
    again = {"none": 0.0, "full": 1 / 3, "dots": attention / in_body}[remat]
    return PipelineIdeal(
        stages=stages,
        microbatches=microbatches,
        body=in_body / total,
        outside=(total - head - in_body) / total,
        head=head / total,
        remat=1 + again,
    )
