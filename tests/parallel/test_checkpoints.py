"""A state that was saved on one mesh comes back bit by bit on any other."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from cla_jax.configs import OptimizerConfig
from cla_jax.training import init_state
from cla_jax.training.checkpoints import Checkpoints, load_params
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import abstract_state, state_shardings
from tests.parallel.models import layout_of, model_of

# Layers 1 to 4 of six are in stages.
MODEL = model_of("deep KeepEnds")
STAGES = "stage=2,fsdp=2,tensor=2"
MESHES = ("none", "data=8", "fsdp=8", "fsdp=4,tensor=2", "tensor=8", "stage=2,data=4", STAGES)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
IDENTITY = {"model": {"name": "KeepEnds"}}


@functools.cache
def values():
    """A state of random numbers, of which no bit may be lost: that of step 0 is mostly zeros."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_state(MODEL, OPTIMIZER, 0))
    return jax.tree.map(lambda x: np.asarray(1e6 * rng.normal(size=x.shape), x.dtype), shapes)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@functools.cache
def placed(mesh):
    layout = layout_of("deep KeepEnds", mesh)
    if layout is None:
        return jax.tree.map(jax.numpy.asarray, values())
    return jax.device_put(values(), state_shardings(MODEL, OPTIMIZER, layout))


@pytest.mark.parametrize(
    "saved_on",
    [STAGES, *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != STAGES)],
)  # fmt: skip
def test_any_mesh_to_any_other(saved_on, tmp_path):
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(placed(saved_on), {"next_index": 3})
    for mesh in MESHES:
        like = abstract_state(MODEL, OPTIMIZER, layout_of("deep KeepEnds", mesh))
        lies = [leaf.sharding for leaf in jax.tree.leaves(like)]
        assert lies == [leaf.sharding for leaf in jax.tree.leaves(placed(mesh))]
        with Checkpoints(tmp_path, IDENTITY) as checkpoints:
            restored = checkpoints.restore(like)
        assert restored is not None
        jax.tree.map(assert_same_bits, restored.state, values())
        for there, wanted in zip(
            jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True
        ):
            assert there.sharding == wanted.sharding
    shapes = jax.eval_shape(lambda: MODEL.init(0))
    _, params = load_params(tmp_path, IDENTITY["model"], shapes)
    jax.tree.map(assert_same_bits, params, values().params)
    assert all(isinstance(a.sharding, SingleDeviceSharding) for a in jax.tree.leaves(params))
