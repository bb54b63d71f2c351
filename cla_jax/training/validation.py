"""The mean loss over the validation stream, in nats per token."""

from collections.abc import Callable

import jax

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.data.pipeline import evaluation_batches
from cla_jax.data.token_stream import Streams
from cla_jax.parallel import Layout, check_mesh, in_force, make_layout
from cla_jax.training.checks import check_streams
from cla_jax.training.initial import InitialParams
from cla_jax.training.step import Batch, Model, Params, make_eval_step

__all__ = ["mean_loss", "validate"]

type EvalStep = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]


def validate(
    config: ModelConfig, training: TrainConfig, streams: Streams, initial: InitialParams
) -> float:
    """The mean loss of given parameters, as `train` measures it, on the recipe's mesh.

    Raises:
        ValueError: streams that do not go with the model, parameters of another, a mesh that does
            not fit devices, model or batch.
    """
    check_streams(config, training.data, streams)
    check_mesh(config, training)
    model, layout = Model(config, training.execution), make_layout(training.mesh, config)
    shardings = None if layout is None else layout.of(model.axes)
    params = initial.on_device(jax.eval_shape(lambda: model.init(0)), config.name, shardings)
    with in_force(layout):
        return mean_loss(make_eval_step(model), params, training, streams, layout)


def mean_loss(
    eval_step: EvalStep,
    params: Params,
    training: TrainConfig,
    streams: Streams,
    layout: Layout | None,
    *,
    before_each: Callable[[], None] | None = None,
) -> float:
    """Over as much of the stream as the recipe says; with the layout in force.

    Args:
        eval_step: `make_eval_step`'s.
        params: where the layout has them.
        training: the recipe.
        streams: of which the validation stream is read.
        layout: of the model; None: on one device.
        before_each: called before each batch.
    """
    data, rows = training.data, training.micro_batch_size or training.data.batch_size
    batches = evaluation_batches(
        streams.validation, data.sequence_length, rows, limit=training.eval_tokens,
        document_ids=data.document_mask, rows=None if layout is None else layout.rows(rows),
    )  # fmt: skip
    total = count = 0.0
    for batch in batches:
        if before_each is not None:
            before_each()
        losses, tokens = eval_step(params, batch if layout is None else layout.batch(batch, rows))
        total, count = total + float(losses), count + float(tokens)
    return total / count
