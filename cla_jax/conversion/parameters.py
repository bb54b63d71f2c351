"""The parameter tree of a decoder as plain dictionaries of numpy arrays, and its layers one by one.

The tree is the one that training and `nnx` work with (`nnx.to_pure_dict`): layers of the same role
are stacked along a leading axis, as the sharing map's segments say (`cla_jax.models.stack`). A
layer's own parameters are views into it.
"""

from typing import cast

import jax
import numpy as np
from flax import nnx

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models import Decoder
from cla_jax.sharing import KVSharing
from cla_jax.training.initial import check_params
from cla_jax.training.step import Model, Params

__all__ = ["layer_place", "parameter_shapes", "split_layers", "stack_split_layers", "to_decoder"]


def parameter_shapes(config: ModelConfig) -> Params:
    """The parameter tree of a decoder, with `jax.ShapeDtypeStruct` leaves."""
    template = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return cast(Params, nnx.to_pure_dict(nnx.state(template, nnx.Param)))


def to_decoder(
    config: ModelConfig,
    params: Params,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
) -> Decoder:
    """A decoder with these parameters, as float32 on the default device.

    Args:
        config: the architecture.
        params: its parameters, of any floating dtype.
        execution: how the decoder is run.

    Raises:
        ValueError: a parameter is missing, not expected, or of another shape; names it.
    """
    check_params(params, parameter_shapes(config), config.name)
    arrays = jax.tree.map(lambda a: jax.numpy.asarray(np.asarray(a, np.float32)), params)
    return Model(config, execution)(arrays)


def layer_place(sharing: KVSharing, layer: int) -> tuple[int, int, int]:
    """Where a layer's parameters lie: segment, position in its period, index on the stacked axis.

    Raises:
        IndexError: no such layer.
    """
    if not 0 <= layer < sharing.num_layers:
        raise IndexError(f"layer {layer}: expected 0 to {sharing.num_layers - 1}")
    for index, segment in enumerate(sharing.segments):
        if layer < segment.stop:
            repeat, position = divmod(layer - segment.start, segment.period)
            return index, position, repeat
    raise AssertionError("the segments end before the last layer")


def split_layers(params: Params, sharing: KVSharing) -> list[Params]:
    """Every layer's own parameters, in order, without the stacked axis: views."""
    layers: list[Params] = []
    for layer in range(sharing.num_layers):
        segment, position, repeat = layer_place(sharing, layer)
        stacked = params["layers"][segment][position]
        layers.append(jax.tree.map(lambda a, r=repeat: np.asarray(a)[r], stacked))
    return layers


def stack_split_layers(layers: list[Params], sharing: KVSharing) -> dict[int, dict[int, Params]]:
    """The `layers` entry of a parameter tree from the layers' own parameters."""
    return {
        index: {
            position: jax.tree.map(
                lambda *leaves: np.stack(leaves),
                *(layers[i] for i in range(segment.start + position, segment.stop, segment.period)),
            )
            for position in range(segment.period)
        }
        for index, segment in enumerate(sharing.segments)
    }
