"""The loss and the train step, against numpy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import ExecutionConfig, ModelConfig, OptimizerConfig
from cla_jax.sharing import KVSharing
from cla_jax.training import Model, TrainState, make_train_step, token_losses, weighted_loss
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import make_eval_step

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=257, sequence_length=32, separate_kv_norm=True,
)  # fmt: skip
FLOAT32 = ExecutionConfig(compute_dtype="float32")
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0)
B, T = 4, 16


@pytest.fixture(scope="module")
def toy():
    return Model(CONFIG, FLOAT32)


@pytest.fixture(scope="module")
def params(toy):
    """Large values: as initialised, every token is almost equally likely, which hides errors."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32), toy.init(0)
    )


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 257, (B, T + 1), np.int32))


@functools.partial(jax.jit, static_argnums=0)
def losses_of(model, params, tokens, documents=None):
    return token_losses(model(params), tokens, documents)


def naive_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    losses = np.zeros(targets.shape)
    for row, t in np.ndindex(targets.shape):
        exps = np.exp(logits[row, t] - logits[row, t].max())
        losses[row, t] = -np.log(exps[targets[row, t]] / exps.sum())
    return losses


def test_loss_is_the_naive_cross_entropy(toy, params, tokens):
    logits = jax.jit(lambda p: toy(p)(tokens[:, :-1]))(params)
    expected = naive_losses(logits, np.asarray(tokens[:, 1:]))
    assert expected.std() > 0.5
    np.testing.assert_allclose(losses_of(toy, params, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [8, 24])
def test_chunked_losses_are_the_same(toy, params, tokens, chunk):
    chunked = Model(CONFIG, dataclasses.replace(FLOAT32, loss_chunk=chunk))
    np.testing.assert_allclose(
        losses_of(chunked, params, tokens), losses_of(toy, params, tokens), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(  # 24 does not divide the 64 tokens
    ("tied", "chunk"),
    [(False, 24), (True, 8)]
    + [pytest.param(t, c, marks=pytest.mark.slow) for t in (False, True) for c in (0, 64)]
    + [pytest.param(t, c, marks=pytest.mark.slow) for t, c in ((False, 8), (True, 24))],
)
def test_the_training_loss_and_its_own_gradient(tokens, chunk, tied):
    """Against automatic differentiation of the plain losses; some targets weigh nothing."""
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    model = Model(config, dataclasses.replace(FLOAT32, loss_chunk=chunk))
    params = model.init(0)
    weights = jax.random.uniform(jax.random.key(3), tokens[:, 1:].shape)
    weights = jnp.where(weights > 0.3, weights, jnp.float32(0))

    def plain(p):
        return (token_losses(model(p), tokens) * weights).sum() * 0.5

    def ours(p):
        return weighted_loss(model(p), tokens, weights) * 0.5

    expected, gradients = jax.jit(jax.value_and_grad(plain))(params)
    loss, found = jax.jit(jax.value_and_grad(ours))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(ours(params), expected, rtol=1e-6)  # without a gradient
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, gradients
    )


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_micro_batches_sum_to_the_whole_batch(toy, params, tokens, masked):
    """Also where rows hold different numbers of counted tokens."""
    optimizer = make_optimizer(OptimizerConfig(), 10)
    batch = {"tokens": tokens}
    if masked:
        counted = jnp.arange(tokens.shape[1] - 1)[None, :] < jnp.arange(1, 5)[:, None] * 4
        batch["mask"] = counted.astype(jnp.float32)
    results = []
    for micro_batches in (1, 2, 4):
        state = TrainState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params)
        )
        results.append(make_train_step(toy, optimizer, micro_batches)(state, batch)[1])
    if masked:
        losses = losses_of(toy, params, tokens)
        expected = (losses * batch["mask"]).sum() / batch["mask"].sum()
        np.testing.assert_allclose(results[0]["loss"], expected, rtol=1e-6)
    for result in results[1:]:
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(result[name], results[0][name], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(toy, params, tokens):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    bad = {**params, "head": params["head"].at[0, 0].set(jnp.inf)}
    state = TrainState(jnp.zeros((), jnp.int32), bad, optimizer.init(bad))
    before = jax.tree.map(np.asarray, state)
    after, metrics = make_train_step(toy, optimizer)(state, {"tokens": tokens})
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after))


def test_a_loss_chunk_larger_than_the_batch_is_the_whole_batch(toy, params, tokens):
    large = Model(CONFIG, dataclasses.replace(FLOAT32, loss_chunk=1000))
    np.testing.assert_array_equal(losses_of(large, params, tokens), losses_of(toy, params, tokens))


def test_document_ids_reach_the_model(toy, params, tokens):
    """A row of two documents has the losses of the second on its own; without ids it has not."""
    row, cut = tokens[:1], 7
    documents = np.where(np.arange(T + 1) < cut, 3, 4)[None].astype(np.int32)
    alone = losses_of(toy, params, row[:, cut:])
    together = losses_of(toy, params, row, documents)
    np.testing.assert_allclose(together[:, cut:], alone, rtol=1e-4, atol=1e-5)
    without = losses_of(toy, params, row)
    np.testing.assert_allclose(without[:, : cut - 1], together[:, : cut - 1], rtol=1e-4, atol=1e-5)
    assert np.abs(without[:, cut:] - alone).max() > 0.01


@pytest.fixture(scope="module")
def stepped(toy, params, tokens):
    """A step with and without documents in the batch, from copies of the same state."""
    # Clips all but nothing of the gradient: the metric is of what was before.
    optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, clip_norm=1e-3), steps=10)
    step, results = make_train_step(toy, optimizer), []
    documents = jnp.where(jnp.arange(T + 1) < 7, 0, 1)[None].repeat(B, 0).astype(jnp.int32)
    for batch in ({"tokens": tokens}, {"tokens": tokens, "documents": documents}):
        copies = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.zeros((), jnp.int32), copies, optimizer.init(copies))
        results.append((state, *step(state, batch)))
    return results, documents


def test_step_metrics(stepped, toy, params, tokens):
    ((_, _, plain), (_, _, masked)), documents = stepped
    for metrics, ids in ((plain, None), (masked, documents)):

        def loss(p, ids=ids):
            own = None if ids is None else ids[:, :-1]
            log_probabilities = jax.nn.log_softmax(toy(p)(tokens[:, :-1], own))
            return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1).mean()

        expected, grads = jax.jit(jax.value_and_grad(loss))(params)
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 0.1
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    assert abs(plain["loss"] - masked["loss"]) > 1e-3


def test_step_moves_every_parameter_and_donates_the_old_state(stepped, params):
    (old, new, _), _ = stepped[0]
    assert int(new.step) == 1
    assert new.step.dtype == jnp.int32
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(new.params), strict=True):
        assert after.dtype == jnp.float32
        assert np.any(np.asarray(before) != np.asarray(after))


def test_eval_step_sums_the_masked_losses(toy, params, tokens):
    mask = (np.random.default_rng(2).random((B, T)) < 0.6).astype(np.float32)
    total, count = make_eval_step(toy)(params, {"tokens": tokens, "mask": mask})
    assert float(count) == mask.sum()
    expected = (np.asarray(losses_of(toy, params, tokens), np.float64) * mask).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
