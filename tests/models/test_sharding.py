"""Logical axes: on every parameter, and inert or harmless whatever mesh they are resolved on."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from cla_jax.configs import MeshConfig, ModelConfig
from cla_jax.models import Decoder, DecoderLayer
from cla_jax.models.sharding import (
    constrain,
    laid_out_as,
    logical_axes,
    partition_spec,
    shards,
)
from cla_jax.parallel import Layout
from cla_jax.sharing import KVSharing
from tests.models import reference

LEGEND = {
    "vocab": "vocab_size", "embed": "d_model", "heads": "query_heads", "kv_heads": "kv_heads",
    "head_dim": "head_dim", "mlp": "ffn_dim", "norm": "d_model",
}  # fmt: skip


def config_of(architecture, sharing) -> ModelConfig:
    sizes = dict(name="test", sharing=sharing, d_model=24, ffn_dim=20, query_heads=4, kv_heads=2,
                 head_dim=10, vocab_size=18)  # fmt: skip
    if architecture == "neox":
        sizes |= dict(rms_norm=False, swiglu=False, parallel_residual=True, use_bias=True)
    else:
        sizes |= dict(separate_kv_norm=True)
    return ModelConfig(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "neox"])
@pytest.mark.parametrize("sharing", [KVSharing.keep_ends(6), KVSharing((0, 0, 2, 0))])
def test_every_parameter_names_every_axis_by_its_size(architecture, sharing):
    config = config_of(architecture, sharing)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert len(parameters) == len(jax.tree.leaves(model))  # nothing but parameters
    for path, parameter in parameters:
        axes, shape = logical_axes(parameter), parameter.get_value().shape
        assert len(axes) == len(shape), path
        assert len(set(axes)) == len(axes), path
        assert (axes[0] in ("layers", "layers_outside")) == ("layers" in path), path
        for axis, size in zip(axes, shape, strict=True):
            if axis in ("layers", "layers_outside"):
                assert size == sharing.segments[path[1]].repeats, path
            elif axis == "pair":
                assert size in (1, 2), path
            else:
                assert axis is not None
                assert size == getattr(config, LEGEND[axis]), path


@pytest.mark.parametrize(
    "sharing", [KVSharing.cla(6, 2), KVSharing.dense_front(6), KVSharing((0, 0, 2, 0))]
)
def test_segments_of_readers_have_no_kv_parameters(sharing):
    config = config_of("neox", sharing)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    of_kv = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        if "kv_" in jax.tree_util.keystr(path)
    ]
    per_owner = 2 * config.kv_heads * config.head_dim * (config.d_model + 1)
    assert sum(leaf.size for leaf in of_kv) == sharing.kv_layers * per_owner


# --- meshes ---------------------------------------------------------------------------------------

ALL_AXES = (
    ("vocab", "tensor"), ("embed", "fsdp"), ("heads", "tensor"), ("kv_heads", "tensor"),
    ("head_dim", None), ("mlp", "tensor"), ("layers", None), ("pair", None), ("batch", "data"),
    ("length", None), ("model", None), ("norm", None),
)  # fmt: skip
DATA_ONLY = tuple((axis, ("data", "fsdp") if axis == "batch" else None) for axis, _ in ALL_AXES)


def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("rules", "architecture"),
    [(ALL_AXES, "llama"), pytest.param(ALL_AXES, "neox", marks=pytest.mark.slow),
     pytest.param(DATA_ONLY, "llama", marks=pytest.mark.slow)],
)  # fmt: skip
def test_sharded_forward_and_gradients_are_the_unsharded(rules, architecture):
    config = config_of(architecture, KVSharing((0, 0, 2, 2, 2)))
    model = reference.decoder(config)
    tokens = reference.tokens_for(config, batch=4, length=8)
    expected = reference.library_loss_and_gradients(model, tokens)
    with jax.set_mesh(mesh()) as _, nnx.logical_axis_rules(rules):
        current = jax.sharding.get_mesh()
        state = nnx.state(model, nnx.Param)
        shardings = jax.tree.map(
            lambda v: v.replace(NamedSharding(current, partition_spec(logical_axes(v)))),
            state,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
        nnx.update(model, jax.device_put(state, shardings))
        if rules is ALL_AXES:
            stacked = cast(DecoderLayer, model.layers[0][0])
            kernel = stacked.attention.query.kernel[...]
            assert len({str(s.index) for s in kernel.addressable_shards}) == 4
        found = reference.library_loss_and_gradients(model, tokens)
    reference.assert_close(found, expected, 3e-4)


def test_a_constraint_lays_activations_out_only_where_a_mesh_and_rules_are():
    x = jnp.zeros((4, 8, 24))
    axes = ("batch", "length", "model")
    assert constrain(x, *axes) is x
    with nnx.logical_axis_rules(ALL_AXES):
        assert constrain(x, *axes) is x
    with jax.set_mesh(mesh()):
        assert constrain(x, *axes) is x
        with nnx.logical_axis_rules(ALL_AXES):
            y = jax.jit(lambda x: constrain(x, *axes))(x)
            assert y.sharding.spec[0] == "data"
    np.testing.assert_array_equal(x, y)


def test_an_axis_that_the_rules_do_not_know_is_refused():
    """It would be copied to every device, without a word."""
    x = jnp.zeros((8, 4))
    with jax.set_mesh(mesh()), nnx.logical_axis_rules(ALL_AXES):
        with pytest.raises(ValueError, match=r"logical axis='batches'.*the nearest is 'batch'"):
            constrain(x, "batches", None)
        with pytest.raises(ValueError, match=r"logical axis='lenght'.*the nearest is 'length'"):
            shards("lenght")
        with (
            pytest.raises(ValueError, match=r"logical axis='batch_ouside'"),
            laid_out_as(batch="batch_ouside"),
        ):
            pass
    layout = Layout.on(MeshConfig(data=2), config_of("llama", KVSharing.none(2)))
    for refused in (lambda: layout.of(("batches",)), lambda: layout.shards("batches")):
        with pytest.raises(ValueError, match=r"logical axis='batches'.*the nearest is 'batch'"):
            refused()
