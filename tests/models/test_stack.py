"""`scan_layers` on a user's own layers, and every way to execute a stack against every other."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models import Decoder, scan_layers, stack_layers, unstack_layer
from cla_jax.sharing import KVSharing
from tests.models import reference

D = 3


# --- a user's own layer: plain functions on plain pytrees ----------------------------------------


def user_layer(parameters, x, kv):
    """Owners hold `make`; what they share is a nested pytree, of which one leaf is an integer."""
    h, count = x
    if kv is None:
        k = jnp.tanh(h @ parameters["make"])
        kv = {"k": k, "more": (k * 2.0, count)}
    h = h + jnp.sin(h @ parameters["w"]) * kv["k"] + kv["more"][0] * parameters["b"][None]
    h = h + kv["more"][1].astype(h.dtype)[None, None] * 0.1
    return (h, count + 1), kv


def parameters_of(sharing, seed=0):
    random = np.random.default_rng(seed)
    layers = []
    for layer in range(sharing.num_layers):
        p = {"w": random.normal(size=(D, D)), "b": random.normal(size=(D,))}
        if sharing.owns(layer):
            p["make"] = random.normal(size=(D, D))
        layers.append(jax.tree.map(lambda a: jnp.asarray(a * 0.5, jnp.float32), p))
    return layers


def stacked(sharing, layers):
    """`[segment][position]`, stacked over repeats: plain lists."""
    return [
        [
            jax.tree.map(
                lambda *a: jnp.stack(a),
                *(layers[s.start + r * s.period + p] for r in range(s.repeats)),
            )
            for p in range(s.period)
        ]
        for s in sharing.segments
    ]


def loop(sharing, layers, x):
    made = {}
    for i, parameters in enumerate(layers):
        owner = sharing.owners[i]
        x, kv = user_layer(parameters, x, None if owner == i else made[owner])
        if owner == i:
            made[i] = kv
    return x


def start():
    x = np.random.default_rng(9).normal(size=(2, D))
    return jnp.asarray(x, jnp.float32), jnp.asarray(0, jnp.int32)


@st.composite
def owner_maps(draw, max_layers):
    owners: list[int] = []
    unit = draw(st.integers(1, 3))
    for at in range(draw(st.integers(1, max_layers))):
        back = owners[at - unit] + unit if at >= unit else -1
        options = [*sorted(set(owners)), at]
        if back in options and draw(st.booleans()):
            owners.append(back)
        else:
            owners.append(draw(st.sampled_from(options)))
    return tuple(owners)


def check_user_layers(sharing, execution):
    layers = parameters_of(sharing)
    expected = loop(sharing, layers, start())
    found = scan_layers(user_layer, sharing, stacked(sharing, layers), start(), execution)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert int(found[1]) == int(expected[1]) == sharing.num_layers


@settings(max_examples=15)
@given(owner_maps(9), st.booleans(), st.integers(1, 4))
def test_a_users_own_layers_equal_a_loop(owners, scan, unroll):
    execution = ExecutionConfig(scan=scan, unroll=unroll, remat="none")
    check_user_layers(KVSharing(owners), execution)


@pytest.mark.slow
@settings(max_examples=150)
@given(owner_maps(14), st.booleans(), st.integers(1, 5), st.sampled_from(["none", "full", "dots"]))
def test_a_users_own_layers_equal_a_loop_on_many_maps(owners, scan, unroll, remat):
    execution = ExecutionConfig(scan=scan, unroll=unroll, remat=remat)
    check_user_layers(KVSharing(owners), execution)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_a_users_own_layers_equal_the_loops(remat):
    # A scan of owners that exports, one of readers that closes over it, a pair that is scanned.
    sharing = KVSharing((0, 1, 2, 2, 2, 2, 6, 6, 8, 8, 1))
    layers = parameters_of(sharing)
    x, count = start()

    def of_loop(layers, x):
        return (loop(sharing, layers, (x, count))[0] ** 2).sum()

    def of_scan(layers, x):
        execution = ExecutionConfig(remat=remat)
        y, _ = scan_layers(user_layer, sharing, stacked(sharing, layers), (x, count), execution)
        return (y**2).sum()

    expected = jax.jit(jax.value_and_grad(of_loop, argnums=(0, 1)))(layers, x)
    found = jax.jit(jax.value_and_grad(of_scan, argnums=(0, 1)))(layers, x)
    reference.assert_close(found, expected, 1e-5)
    assert all(
        float(jnp.abs(expected[1][0][owner]["make"]).max()) > 1e-3 for owner in sharing.owner_layers
    )


def test_what_an_unrolled_scan_recomputes_is_not_merged_with_the_original():
    """XLA drops a loop of one step, and would keep every layer's activations instead."""
    matrices, x = jnp.ones((4, 256, 256)), jnp.ones((512, 256))

    def layer(matrix, x, kv):
        return jnp.sin(jnp.tanh(x @ matrix) @ matrix), x

    def temporaries(remat):
        execution = ExecutionConfig(remat=remat, unroll=4)

        def loss(matrices):
            return scan_layers(layer, KVSharing.none(4), [[matrices]], x, execution).sum()

        memory = jax.jit(jax.grad(loss)).lower(matrices).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries("full") < 0.75 * temporaries("none")


def test_scanned_stacks_compile_once_a_period():
    calls = []

    def counting(parameters, x, kv):
        calls.append(1)
        return user_layer(parameters, x, kv)

    for depth in (8, 64):
        sharing = KVSharing.cla(depth, 2)
        calls.clear()
        jax.make_jaxpr(
            lambda x, s=sharing: scan_layers(counting, s, stacked(s, parameters_of(s)), x)
        )(start())
        assert len(calls) <= 2 * 2  # a period of two, and once more for its shapes


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [KVSharing((0, 0)), KVSharing((0, 1, 2, 2)), KVSharing((0,))])
@pytest.mark.parametrize("scan", [True, False])
def test_an_owner_that_returns_no_kv_is_named(sharing, scan):
    layers = stacked(sharing, parameters_of(sharing))
    with pytest.raises(ValueError, match=r"layer 0 is an owner but returned no K/V"):
        scan_layers(
            lambda p, x, kv: (x, None), sharing, layers, start(), ExecutionConfig(scan=scan)
        )


@pytest.mark.parametrize(
    ("made_for", "used_for"),
    [
        (KVSharing.cla(8, 2), KVSharing.none(8)),
        (KVSharing.none(8), KVSharing.cla(8, 2)),
        (KVSharing.cla(8, 2), KVSharing.cla(10, 2)),
        (KVSharing.keep_ends(8), KVSharing.cla(8, 2)),
    ],
)
def test_layers_stacked_for_another_map_are_refused(made_for, used_for):
    layers = stacked(made_for, parameters_of(made_for))
    with pytest.raises(ValueError, match="build them with stack_layers"):
        scan_layers(user_layer, used_for, layers, start())


def small_config(sharing):
    return ModelConfig(
        name="test", sharing=sharing, d_model=8, ffn_dim=8, query_heads=2, kv_heads=1, head_dim=4,
        vocab_size=11,
    )  # fmt: skip


def test_decoder_layers_stacked_for_another_map_of_the_same_shape_are_refused():
    # Both are one scan of period 3, twice; layer 2 owns in one and reads in the other.
    made_for, used_for = KVSharing((0, 0, 2, 3, 3, 5)), KVSharing((0, 0, 0, 3, 3, 3))
    shapes = [[(s.period, s.repeats) for s in m.segments] for m in (made_for, used_for)]
    assert shapes[0] == shapes[1] == [(3, 2)]
    model = reference.decoder(small_config(made_for))
    model.config = small_config(used_for)
    with pytest.raises(ValueError, match="another sharing map"):
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 4), jnp.int32)), model)


def test_layers_without_parameters_run_or_are_refused_clearly():
    sharing = KVSharing((0, 1, 1))  # the readers hold nothing
    layers = [[{"w": jnp.ones((2, D))}], [{}]]
    assert [(s.period, s.repeats) for s in sharing.segments] in ([(1, 2), (1, 1)], [(1, 1)] * 3)

    def layer(p, x, kv):
        kv = x * p["w"][None] if kv is None else kv
        return x + kv, kv

    x = jnp.ones((2, D))
    np.testing.assert_allclose(scan_layers(layer, sharing, layers, x), 6 * x)


# --- memory ---------------------------------------------------------------------------------------


def test_a_long_segment_of_readers_saves_the_kv_once():
    """Temporaries of the gradient, per further reader, are far below one K/V."""
    width, kv_bytes = 1 << 18, 4 << 18

    def layer(scale, x, kv):
        if kv is None:
            kv = x[0] * jnp.linspace(0.0, 1.0, width)
        return x + scale * jnp.tanh(jnp.dot(kv, kv) * 1e-6 * x), kv

    def temporaries(readers):
        sharing = KVSharing((0,) * (readers + 1))
        assert [s.repeats for s in sharing.segments] == [1, readers]
        layers = [[jnp.ones((1,))], [jnp.ones((readers,))]]

        def scalar(layers, x):
            return scan_layers(layer, sharing, layers, x).sum()

        compiled = jax.jit(jax.grad(scalar)).lower(layers, jnp.ones((2,))).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    few, many = temporaries(4), temporaries(36)
    assert few > kv_bytes  # so the K/V is counted at all
    assert (many - few) / 32 < kv_bytes / 50


# --- the decoder, however it is executed ----------------------------------------------------------

# Segments of owners, of readers, and one layer alone.
SHARING = KVSharing.dense_front(6)
PAIRS = KVSharing.cla(6, 2)
EXECUTIONS = [
    (SHARING, dict(unroll=2)),
    (SHARING, dict(remat="full")),
    (PAIRS, dict(unroll=1000, remat="dots")),
    (PAIRS, dict(scan=False, remat="full")),
]
MORE_EXECUTIONS = [
    (sharing, dict(scan=scan, unroll=unroll, remat=remat))
    for sharing in (SHARING, PAIRS, KVSharing.keep_ends(8), KVSharing((0, 0, 2, 0, 4, 2)))
    for scan, unroll, remat in (
        (True, 1, "none"),
        (True, 2, "full"),
        (True, 100, "dots"),
        (False, 1, "none"),
        (False, 1, "full"),
    )
]


@functools.cache
def expected_of(sharing):
    """A decoder's parameters, and by the reference the loss and gradients of some tokens."""
    config = small_config(sharing)
    model, tokens = reference.decoder(config), reference.tokens_for(config, length=8)
    expected = reference.loss_and_gradients(config, reference.extract(model), tokens)
    return jax.tree.leaves(model), tokens, expected


def check_execution(sharing, settings_):
    leaves, tokens, expected = expected_of(sharing)
    execution = ExecutionConfig(compute_dtype="float32", **settings_)
    other = reference.decoder(small_config(sharing), execution)
    for a, b in zip(leaves, jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    found = reference.library_loss_and_gradients(other, tokens)
    reference.assert_close(found, expected, 3e-4)


@pytest.mark.parametrize(("sharing", "settings_"), EXECUTIONS)
def test_every_execution_computes_the_same(sharing, settings_):
    check_execution(sharing, settings_)


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "settings_"), MORE_EXECUTIONS)
def test_every_execution_of_every_kind_of_segment(sharing, settings_):
    check_execution(sharing, settings_)


def test_initial_parameters_do_not_depend_on_the_execution():
    config = small_config(KVSharing((0, 0, 2)))

    def leaves(**execution):
        built = Decoder(config, ExecutionConfig(**execution), rngs=nnx.Rngs(3))
        return {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(built)
        }

    expected = leaves()
    found = leaves(compute_dtype="float32", scan=False, remat="full", unroll=3)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(found[key], value)
    # Layers of one stack are different draws.
    built = Decoder(small_config(KVSharing.none(2)), rngs=nnx.Rngs(3))
    first, second = (built.layer(i).attention.query.kernel[...] for i in range(2))
    assert float(jnp.abs(first - second).max()) > 1e-3


# The transpose of jax.nn's attention mixes float32 and bfloat16.
@pytest.mark.standard_dtype_promotion
def test_bfloat16_is_near_float32():
    """Within 2 % (logits) and 20 % (each gradient) in norm; parameters and logits stay float32."""
    config = small_config(PAIRS)
    tokens = reference.tokens_for(config, length=8)

    def run(dtype):
        execution = ExecutionConfig(compute_dtype=dtype)
        model = reference.decoder(config, execution, spread=0.7)
        return reference.library_loss_and_gradients(model, tokens)

    wide, narrow = run("float32"), run("bfloat16")
    assert narrow[0].dtype == np.float32
    assert np.abs(narrow[0] - wide[0]).max() > 1e-6  # it did compute in bfloat16

    def distance(a, b):
        assert a.dtype == np.float32
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    assert distance(narrow[0], wide[0]) < 0.02
    assert max(jax.tree.leaves(jax.tree.map(distance, narrow[1], wide[1]))) < 0.2


# --- stack and unstack ----------------------------------------------------------------------------


@given(owner_maps(10))
def test_unstack_layer_is_the_inverse_of_stacking(owners):
    sharing = KVSharing(owners)
    layers = [{"index": np.asarray(i)} for i in range(len(owners))]
    grouped = [
        [
            {"index": np.array([s.start + r * s.period + p for r in range(s.repeats)])}
            for p in range(s.period)
        ]
        for s in sharing.segments
    ]
    for i, layer in enumerate(layers):
        assert unstack_layer(grouped, sharing, i)["index"] == layer["index"]


def test_stack_layers_asks_for_owners_where_the_map_has_them():
    asked = []

    class Probe(nnx.Module):
        def __init__(self, owns_kv, rngs):
            asked.append(owns_kv)
            self.w = nnx.Param(rngs.params.normal((2,)), out_sharding=("embed",),
                               eager_sharding=False)  # fmt: skip

    layers = stack_layers(
        lambda owns_kv, rngs: Probe(owns_kv, rngs), KVSharing.keep_ends(6), rngs=nnx.Rngs(0)
    )
    assert [[cast(Any, p).w.shape for p in segment] for segment in layers] == [
        [(1, 2)], [(2, 2), (2, 2)], [(1, 2)]
    ]  # fmt: skip
    assert asked == [True, True, False, True]
