"""Logits and gradients of the decoder against the naive reference, for every pattern."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import ModelConfig
from cla_jax.sharing import KVSharing
from tests.models import reference

# Float32 against float64, of each array's largest entry. Measured: logits 2e-6, gradients mostly
# below 1e-5 and at worst 4.4e-5 (large weights amplify rounding); mutants are off by 0.4 or more.
LOGITS, GRADIENTS = 2e-5, 3e-4

PATTERNS = {
    "none": KVSharing.none(6),
    "CLA2": KVSharing.cla(6, 2),
    "CLA3-short-first": KVSharing.cla(7, 3),
    "CLA4": KVSharing.cla(8, 4),
    "KeepEnds": KVSharing.keep_ends(6),
    "DenseFront": KVSharing.dense_front(6),
    "DenseBack": KVSharing.dense_back(7),
    "MLKV": KVSharing.mlkv(7, 3),
    "SharedUpperHalf": KVSharing.shared_upper_half(7),
}
# As deep as they need be to be told apart: compilation is what time is spent on.
SHALLOW = {
    "none": KVSharing.none(3),
    "CLA2": KVSharing.cla(4, 2),
    "CLA3-short-first": KVSharing.cla(5, 3),
    "CLA4": KVSharing.cla(5, 4),
    "KeepEnds": KVSharing.keep_ends(4),
    "DenseFront": KVSharing.dense_front(4),
    "DenseBack": KVSharing.dense_back(5),
    "MLKV": KVSharing.mlkv(5, 2),
    "SharedUpperHalf": KVSharing.shared_upper_half(5),
}
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


def config_of(sharing, kv_heads, architecture="llama", **changes) -> ModelConfig:
    """Head dim 6 and 4 heads: N * H is not D. Different sizes everywhere, to catch mixed axes."""
    sizes = dict(d_model=28, ffn_dim=20, query_heads=4, kv_heads=kv_heads, head_dim=6,
                 vocab_size=19, name="test", sharing=sharing)  # fmt: skip
    neox = dict(rms_norm=False, swiglu=False, parallel_residual=True, use_bias=True, rotary_dim=4)
    llama = dict(separate_kv_norm=sharing.kv_layers < sharing.num_layers)
    switches = {"llama": llama, "neox": neox}[architecture]
    return ModelConfig(**{**sizes, **switches, **changes})  # type: ignore[arg-type]


def check(config: ModelConfig, seed: int = 0, documents: np.ndarray | None = None) -> None:
    model = reference.decoder(config, seed=seed)
    tokens = reference.tokens_for(config, seed=seed)
    logits, gradients = reference.library_loss_and_gradients(model, tokens, documents)
    expected = reference.loss_and_gradients(config, reference.extract(model), tokens, documents)
    reference.assert_close(logits, expected[0], LOGITS)
    reference.assert_close(gradients, expected[1], GRADIENTS)
    for layer, owner in zip(gradients["layers"], config.sharing.owners, strict=True):
        assert ("key" in layer) == (layer is gradients["layers"][owner])
        if "key" in layer:
            assert np.abs(layer["key"]).max() > 1e-3
            assert np.abs(layer["value"]).max() > 1e-3


# Every pattern once, with heads and architectures taking turns. The rest is the slow test.
QUICK = [
    (pattern, "neox" if p % 3 == 2 else "llama", list(HEADS)[(p + p // 3) % 3])
    for p, pattern in enumerate(PATTERNS)
]
ALL = list(itertools.product(PATTERNS, ("llama", "neox"), HEADS))


@pytest.mark.parity
@pytest.mark.parametrize(("pattern", "architecture", "heads"), QUICK)
def test_logits_and_gradients_are_the_references(pattern, architecture, heads):
    check(config_of(PATTERNS[pattern], HEADS[heads], architecture))


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("pattern", "architecture", "heads"),
    # Of `ALL` every other: every two of the three meet. Logits of all of them: test_contract.py.
    [case for i, case in enumerate(ALL) if (i + i // 6) % 2 == 0 and case not in QUICK],
)
def test_logits_and_gradients_of_the_other_combinations(pattern, architecture, heads):
    check(config_of(SHALLOW[pattern], HEADS[heads], architecture), seed=3)


@st.composite
def owner_maps(draw, max_layers):
    owners: list[int] = []
    for at in range(draw(st.integers(2, max_layers))):
        owners.append(draw(st.sampled_from([*sorted(set(owners)), at])))
    return tuple(owners)


@pytest.mark.parity
@settings(max_examples=2)
@given(owner_maps(5), st.sampled_from(["llama", "neox"]))
def test_random_backward_maps(owners, architecture):
    check(config_of(KVSharing(owners), 2, architecture))


@pytest.mark.slow
@pytest.mark.parity
@settings(max_examples=8)
@given(owner_maps(10), st.sampled_from(["llama", "neox"]), st.sampled_from([1, 2, 4]))
def test_many_random_backward_maps(owners, architecture, kv_heads):
    check(config_of(KVSharing(owners), kv_heads, architecture), seed=len(owners))


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": True, "rotary_dim": 2},
        {"separate_kv_norm": False, "use_bias": True, "rotary_dim": 0},
        pytest.param(
            {"rms_norm": False, "norm_epsilon": 1e-2, "rope_theta": 50.0, "swiglu": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_switches_one_does_not_meet_in_the_presets(changes):
    check(config_of(KVSharing((0, 0, 2, 0)), 2, **changes))


def test_gradients_are_the_slopes_of_the_reference_loss():
    """No automatic differentiation on one side: central differences in float64."""
    config = config_of(KVSharing((0, 1, 0, 1, 1)), 2)
    model = reference.decoder(config)
    tokens = reference.tokens_for(config)
    _, gradients = reference.library_loss_and_gradients(model, tokens)
    params = reference.extract(model)
    random = np.random.default_rng(5)
    with reference.double():
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

        def slope(direction):
            def at(step):
                moved = jax.tree.map(lambda a, d: jax.numpy.asarray(a + step * d), wide, direction)
                return float(reference.loss(reference.logits(config, moved, tokens), tokens))

            return (at(1e-5) - at(-1e-5)) / 2e-5

        for only in (None, "key", "value"):
            direction = jax.tree_util.tree_map_with_path(
                lambda path, a, only=only: (
                    random.normal(size=a.shape)
                    * (only is None or only in jax.tree_util.keystr(path))
                ),
                wide,
            )
            predicted = sum(
                float((np.asarray(g, np.float64) * d).sum())
                for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
            )
            assert predicted == pytest.approx(slope(direction), rel=1e-4)


# --- document mask --------------------------------------------------------------------------------

DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 3], [7, 7, 7, 7, 7, 7, 8, 8, 8]], np.int32)


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["llama", pytest.param("neox", marks=pytest.mark.slow)])
def test_document_mask_is_the_references(architecture):
    check(config_of(KVSharing.cla(4, 2), 2, architecture), documents=DOCUMENTS)


def test_documents_are_as_if_each_ran_alone():
    config = config_of(KVSharing.dense_back(6), 2)
    model = reference.decoder(config)
    tokens = reference.tokens_for(config)
    together = np.asarray(jax.jit(lambda m, t, d: m(t, d))(model, tokens, DOCUMENTS))
    alone = jax.jit(lambda m, t: m(t))
    # Padded behind to one length: a causal model does not see what follows.
    for row, document in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 7), (1, 8)]:
        where = np.flatnonzero(DOCUMENTS[row] == document)
        padded = np.zeros((1, tokens.shape[1]), np.int32)
        padded[0, : len(where)] = tokens[row, where]
        expected = np.asarray(alone(model, padded))[0, : len(where)]
        np.testing.assert_allclose(together[row, where], expected, atol=2e-5, rtol=1e-5)


def test_one_document_a_row_changes_nothing():
    config = config_of(KVSharing.cla(4, 2), 1)
    model = reference.decoder(config)
    tokens = reference.tokens_for(config)
    masked = jax.jit(lambda m, t, d: m(t, d))(model, tokens, np.ones_like(DOCUMENTS))
    plain = jax.jit(lambda m, t: m(t))(model, tokens)
    np.testing.assert_allclose(masked, plain, atol=2e-5, rtol=1e-5)


# --- single layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 6])
def test_a_layer_that_does_not_exist_is_refused(index):
    model = reference.decoder(config_of(KVSharing.keep_ends(6), 1))
    with pytest.raises(IndexError, match=rf"layer {index}: expected 0 to 5"):
        model.layer(index)


def test_readers_hold_no_kv_parameters():
    model = reference.decoder(config_of(KVSharing((0, 0, 2, 0)), 2))
    for index in range(4):
        layer = model.layer(index)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(layer)]
        owns = index in (0, 2)
        assert any("kv" in p for p in paths) == owns
        assert (layer.kv_projection is not None) == owns
        assert (layer.kv_norm is not None) == owns
