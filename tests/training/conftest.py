"""One small run, which others are compared with; steps are compiled once for all files."""

import functools

import jax
import jax.numpy as jnp
import pytest

from cla_jax.training import Model, init_state, make_train_step, train, trainer
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import make_eval_step
from tests.training.runs import CONFIG, TEXT, TRAINING
from tests.training.streams import write_streams


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return write_streams(tmp_path_factory.mktemp("streams"), TEXT)


@pytest.fixture(scope="session")
def _made_once():
    """What `trainer` makes its steps with, remembered over files."""
    initial = functools.cache(init_state)
    return {
        "Model": functools.cache(Model),
        "make_optimizer": functools.cache(make_optimizer),
        "make_train_step": functools.cache(make_train_step),
        "make_eval_step": functools.cache(make_eval_step),
        # A step donates its state.
        "init_state": lambda *a: jax.tree.map(jnp.copy, initial(*a)),
    }


@pytest.fixture(scope="module")
def compile_once(_made_once):
    """Every run of a file shares its compiled steps; nothing else about a run is shared."""
    with pytest.MonkeyPatch.context() as patch:
        for name, made in _made_once.items():
            patch.setattr(trainer, name, made)
        yield


@pytest.fixture(scope="module")
def straight(compile_once, streams, tmp_path_factory):
    """The run that every other one is compared with."""
    return train(CONFIG, TRAINING, streams, tmp_path_factory.mktemp("runs") / "straight")
