"""The optimizer against the CLA paper's formula and an AdamW written out by hand."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cla_jax.configs import OptimizerConfig
from cla_jax.models import Decoder
from cla_jax.registry import model
from cla_jax.sharing import KVSharing
from cla_jax.training.optimizer import learning_rate_schedule, make_optimizer

# optax mixes Python numbers and arrays as it likes; the train step allows it the same way.
pytestmark = pytest.mark.standard_dtype_promotion

CONFIG = OptimizerConfig(learning_rate=3e-4)


def cla_schedule(update: int, steps: int, config: OptimizerConfig) -> float:
    """CLA section 3.1: linear over 5 % of the steps, then a cosine down to 10 % of the peak."""
    warmup = round(config.warmup_fraction * steps)
    if update < warmup:
        return config.learning_rate * update / warmup
    done = (update - warmup) / (steps - warmup)
    share = config.final_fraction + (1 - config.final_fraction) * (1 + np.cos(np.pi * done)) / 2
    return config.learning_rate * share


def rates(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    schedule = learning_rate_schedule(config, steps)
    return lambda update: float(jnp.asarray(schedule(update)))


@pytest.mark.parametrize("steps", [1, 9, 200, 7153])
def test_schedule_is_the_papers(steps):
    schedule = rates(CONFIG, steps)
    warmup = round(0.05 * steps)
    for update in {0, 1, warmup // 2, warmup, (warmup + steps) // 2, steps - 1, steps}:
        if update <= steps:
            expected = cla_schedule(update, steps, CONFIG)
            assert schedule(update) == pytest.approx(expected, rel=2e-5, abs=1e-12)
    assert schedule(warmup) == pytest.approx(3e-4)
    assert schedule(steps) == pytest.approx(3e-5, rel=1e-4)


def test_schedule_without_warmup_or_with_nothing_else():
    config = dataclasses.replace(CONFIG, warmup_fraction=0.0)
    assert rates(config, 10)(0) == pytest.approx(3e-4)
    config = dataclasses.replace(CONFIG, warmup_fraction=1.0)
    found = [rates(config, 4)(i) for i in range(5)]
    assert found == pytest.approx([0, 0.75e-4, 1.5e-4, 2.25e-4, 3e-4])


def test_three_updates_equal_adamw_by_hand():
    config = OptimizerConfig(learning_rate=0.1, warmup_fraction=0.5, clip_norm=2.0)
    optimizer = make_optimizer(config, steps=4)
    random = np.random.default_rng(0)
    values = {"kernel": random.normal(size=(3, 4)), "scale": 1 + random.normal(size=4)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)
    state = optimizer.init(params)
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    for update, size in enumerate([0.1, 5.0, 0.2]):  # the second one is clipped
        grads = {name: size * random.normal(size=v.shape) for name, v in values.items()}
        updates, state = optimizer.update(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, params
        )
        params = jax.tree.map(jnp.add, params, updates)

        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert (norm > 2.0) == (size == 5.0)
        for name, grad in grads.items():
            clipped = grad * min(1.0, 2.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.95 * second[name] + 0.05 * clipped**2
            ahead = first[name] / (1 - 0.9 ** (update + 1))
            spread = second[name] / (1 - 0.95 ** (update + 1))
            decay = 0.1 * values[name] if name == "kernel" else 0.0
            rate = cla_schedule(update, 4, config)
            values[name] = values[name] - rate * (ahead / (np.sqrt(spread) + 1e-8) + decay)
    for name, expected in values.items():
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny/MQA-CLA2", "pythia-tiny/MLKV-6"])
def test_decay_spares_norms_and_biases(name):
    """With zero gradients only the decay is left: it must move matrices and nothing else."""
    config = OptimizerConfig(learning_rate=0.5, warmup_fraction=0.0)
    shallow = dataclasses.replace(model(name), sharing=KVSharing.cla(2, 2))
    decoder = nnx.eval_shape(lambda: Decoder(shallow, rngs=nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
    optimizer = make_optimizer(config, steps=10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    kinds = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        spared = any(word in jax.tree_util.keystr(path) for word in ("bias", "scale"))
        kinds.add(spared)
        np.testing.assert_allclose(update, 0.0 if spared else -0.5 * 0.1, rtol=1e-6)
    assert kinds == {True, False}
