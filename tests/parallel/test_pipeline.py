"""Pipelines: losses and gradients are those of one device, and what crosses stages is known."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import ExecutionConfig, MeshConfig
from cla_jax.evaluation.collectives import read_groups
from cla_jax.models import pipeline_layers, scan_layers
from cla_jax.models.attention import AttentionPath
from cla_jax.parallel import in_force, make_layout, pipeline_ideal
from cla_jax.registry import model as registered
from cla_jax.sharing import KVSharing
from cla_jax.training import Model
from cla_jax.training.loss import token_losses, weighted_loss
from tests.jaxprs import equations
from tests.models.reference import QUICK_COMPILE
from tests.parallel.hlo import across_stages, permuted
from tests.parallel.models import PIPELINED, config_of, params_of

ROWS, T, D, MICROBATCHES, CHUNK = 16, 16, 32, 4, 32
# Of each array's largest element. Measured: at most 8e-6 with AVX-512, 1.8e-5 with AVX2, in a norm
# of the first of eight layers. A microbatch or a document mixed up costs 1e-2.
TOLERANCE = 4e-5
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 63, (ROWS, T + 1)).astype(np.int32)
MASK = RNG.integers(0, 2, (ROWS, T)).astype(np.float32)
DOCUMENTS = np.sort(RNG.integers(0, 3, (ROWS, T + 1)), axis=1).astype(np.int32)
MESHES = ("stage=2", "stage=2,data=2,tensor=2", "stage=2,data=4", "stage=2,fsdp=4",
          "stage=2,tensor=4")  # fmt: skip

# Layers beside the stages, few KV heads, and products; all others are slow.
QUICK = {("deep CLA2", "stage=2,data=2,tensor=2"), ("deep KeepEnds", "stage=2,fsdp=4")}
ALL = [
    pytest.param(p, m, marks=() if (p, m) in QUICK else pytest.mark.slow)
    for i, p in enumerate(PIPELINED)
    # Every pattern has the first two, and of the others those whose turn it is.
    for m in (
        *MESHES[:2],
        *MESHES[3 - i % 2 :: 2],
        *(["stage=4,data=2"] if p in ("deep MQA", "deep GQA4") else []),
    )
] + [
    # Three stages divide neither a shard's rows, of which the layers outside make copies, nor the
    # vocabulary and the loss's tokens.
    pytest.param("long KeepEnds", "stage=3,data=2", marks=pytest.mark.slow),
    pytest.param("long KeepEnds", "stage=3,tensor=2", marks=pytest.mark.slow),
    pytest.param("long KeepEnds", "stage=3", marks=pytest.mark.slow),
    # A stage scans two sharing groups.
    pytest.param("long CLA2", "stage=2,fsdp=4", marks=pytest.mark.slow),
]


@functools.cache
def step(pattern, mesh, documents=False, vocab=64, **execution):
    """The traced loss and gradients, and what they are called with."""
    settings = {"compute_dtype": "float32", "loss_chunk": CHUNK} | execution
    config = dataclasses.replace(config_of(pattern), vocab_size=vocab)
    model = Model(config, ExecutionConfig(pipeline_microbatches=MICROBATCHES, **settings))
    layout = make_layout(MeshConfig.parse(mesh), config)
    batch = {"tokens": TOKENS, "weights": MASK / MASK.sum()}
    batch |= {"documents": DOCUMENTS} if documents else {}
    params = params_of(config)
    if layout is not None:
        params, batch = jax.device_put(params, layout.of(model.axes)), layout.batch(batch)

    def loss(params, batch):
        return weighted_loss(
            model(params), batch["tokens"], batch["weights"], batch.get("documents")
        )

    with in_force(layout):
        run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK_COMPILE)
        return run.trace(params, batch), (params, batch), layout


@functools.cache
def compiled(*arguments, **execution):
    traced, given, layout = step(*arguments, **execution)
    with in_force(layout):
        return traced.lower().compile(), given


@functools.cache
def loss_and_gradients(*arguments, **execution):
    program, given = compiled(*arguments, **execution)
    return jax.tree.map(np.asarray, program(*given))


def errors(found, expected):
    """The largest of any array, or NaN, which is below no tolerance."""
    of_each = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), found, expected)
    return np.max(jax.tree.leaves(of_each))


@pytest.mark.parametrize(("pattern", "mesh"), ALL)
def test_loss_and_gradients_are_those_of_one_device(pattern, mesh):
    assert (
        errors(loss_and_gradients(pattern, mesh), loss_and_gradients(pattern, "none")) < TOLERANCE
    )


@pytest.mark.parametrize(
    ("remat", "mesh"),
    [("full", "stage=2,data=2"), pytest.param("dots", "stage=2", marks=pytest.mark.slow),
     pytest.param("none", "stage=3,data=2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_stage_reads_its_microbatchs_documents(remat, mesh):
    pattern = "long KeepEnds" if "stage=3" in mesh else "deep CLA2"
    found = loss_and_gradients(pattern, mesh, documents=True, remat=remat)
    expected = loss_and_gradients(pattern, "none", documents=True)
    assert errors(found, expected) < TOLERANCE
    assert errors(expected, loss_and_gradients(pattern, "none")) > 1e-2


@pytest.mark.slow
def test_evaluation_leaves_out_what_fills_up_chunks():
    """A shard's 128 tokens are 43 of each of three stages: two chunks of 22."""
    expected = None
    for mesh in ("none", "stage=3,data=2"):
        model = Model(
            config_of("long KeepEnds"), ExecutionConfig(compute_dtype="float32", loss_chunk=CHUNK)
        )
        layout = make_layout(MeshConfig.parse(mesh), model.config)
        batch, params = {"tokens": TOKENS}, params_of(model.config)
        if layout is not None:
            params, batch = jax.device_put(params, layout.of(model.axes)), layout.batch(batch)
        with in_force(layout):
            run = jax.jit(lambda params, tokens: token_losses(model(params), tokens))  # noqa: B023
            losses = np.asarray(run(params, batch["tokens"]))
        expected = losses if expected is None else expected
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_masks_for_cudnn_have_every_head_in_a_stage(monkeypatch):
    """Its batching rule reshapes them to all query heads."""
    seen, attention = [], jax.nn.dot_product_attention

    def record(*arrays, mask, implementation, **options):
        seen.append((implementation, mask.shape))
        return attention(*arrays, mask=mask, **options)

    path = AttentionPath("cudnn", 4, "as if")
    monkeypatch.setattr("cla_jax.models.attention.attention_path", lambda *_: path)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    for mesh, rows, heads in (("none", ROWS, 1), ("stage=2", ROWS // MICROBATCHES, 8)):
        seen.clear()
        step.__wrapped__("deep CLA2", mesh, documents=True)
        assert set(seen) == {("cudnn", (rows, heads, T, T))}


@pytest.mark.standard_dtype_promotion
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("stage=2,data=2", "stage=2,tensor=4")],
)
def test_bfloat16_is_as_near_to_float32_as_on_one_device(mesh):
    expected = loss_and_gradients("deep CLA2", "none")
    alone = loss_and_gradients("deep CLA2", "none", compute_dtype="bfloat16")
    found = loss_and_gradients("deep CLA2", mesh, compute_dtype="bfloat16")
    assert errors(found, expected) < 2 * errors(alone, expected)
    sent = permuted(step("deep CLA2", mesh, compute_dtype="bfloat16")[0].jaxpr)
    assert {dtype for _, dtype in sent} == {"bfloat16"}


@pytest.mark.standard_dtype_promotion
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_parameters_are_rounded_before_the_microbatches(remat):
    """XLA on GPUs would round them again at every tick; gradients are summed in float32."""
    traced, *_ = step("deep CLA2", "stage=2", compute_dtype="bfloat16", remat=remat)
    config, program = config_of("deep CLA2"), traced.jaxpr.jaxpr
    down = config.ffn_dim, config.d_model

    def rounds(equation):
        given, found = equation.invars[:1], equation.outvars[:1]
        dtypes = tuple(one.aval.dtype for one in (*given, *found))
        return (
            equation.primitive.name == "convert_element_type"
            and dtypes == (jnp.float32, jnp.bfloat16)
            and given[0].aval.shape[-2:] == down
        )

    loops = [e.params["jaxpr"].jaxpr for e in equations(program) if e.primitive.name == "scan"]
    assert loops
    assert not any(rounds(e) for loop in loops for e in equations(loop))
    assert any(rounds(e) for e in equations(program))
    gradients = jax.tree.leaves(traced.out_info[1])
    assert {leaf.dtype for leaf in gradients} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("pattern", "mesh"),
    [pytest.param("deep CLA2", "stage=2", marks=pytest.mark.slow),
     pytest.param("deep KeepEnds", "stage=2,data=2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_head_is_split_though_stages_do_not_divide_the_vocabulary(pattern, mesh):
    """By tokens then; no device makes all logits of a chunk."""
    for vocab, own in ((64, 32), (63, 63)):
        program, given = compiled(pattern, mesh, vocab=vocab, loss_chunk=64)
        text = program.as_text() or ""
        assert re.search(rf"f32\[(1,)?64,{own}\]", text)
        assert not re.search(rf"f32\[(2,64|(1,)?128),{own}\]", text)
        assert not re.search(rf"f32\[(1,)?64,{2 * own}\]", text)
        found = jax.tree.map(np.asarray, program(*given))
        assert errors(found, loss_and_gradients(pattern, "none", vocab=vocab)) < TOLERANCE


@pytest.mark.parametrize("mesh", ["none", "stage=2,data=4"])
@pytest.mark.parametrize(
    ("x", "context", "part"),
    [((16, 4), (3, 4), "context['angles'] has shape [3, 4]: expected a first axis of 16 rows"),
     ((16, 4), (), "context['angles'] has shape []: expected a first axis of 16 rows"),
     ((), (1, 4), "x['h'] has shape []: expected a first axis of B, 1 or more, rows"),
     ((0, 4), (1, 4), "x holds no rows"),
     ((16, 4), (1, 4), "x['more'] has shape [8]: expected a first axis of 16 rows"),
     ((12, 4), (1, 4), "pipeline_microbatches=4 does not divide the 3 rows of a forward"),
     ((6, 4), (1, 4), "6 rows: the mesh splits them by 4 (data and fsdp); the nearest number")],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(x, context, part, mesh):
    """Also on one device, but for what only a mesh asks."""
    execution = ExecutionConfig(pipeline_microbatches=MICROBATCHES)
    given = {"h": np.ones(x, np.float32)} | ({"more": np.ones(8)} if "'more'" in part else {})
    angles = {"angles": np.ones(context, np.float32)}

    def run():
        return pipeline_layers(
            lambda scale, x, kv, context: (x, x), KVSharing.none(4), [[np.ones(4, np.float32)]],
            given, angles, execution,
        )  # fmt: skip

    with in_force(make_layout(MeshConfig.parse(mesh), config_of("deep MQA"))):
        if mesh == "none" and x in ((12, 4), (6, 4)):
            assert run()["h"].shape == x
            return
        with pytest.raises(ValueError, match=re.escape(part)):
            jax.eval_shape(run)


# --- what crosses stages --------------------------------------------------------------------------


def not_activations(sent, outside=()):
    """What is sent across stages and is neither an activation nor a parameter outside the body.

    Activations of rows, of microbatches, and of chunks of the loss, the last with two statistics
    of each token's softmax.
    """
    filled_up = (3, 2, 22, D)  # a shard's 128 tokens as two chunks in each of three stages
    statistics = {(), (CHUNK,), (CHUNK, D), filled_up}
    return [
        s
        for s in sent
        if s.shape[-2:] != (T, D)
        and s.shape not in statistics
        and tuple(sorted(s.shape)) not in outside
        and math.prod(s.shape) > 1
    ]


def outside_shapes(pattern, params):
    """Shapes on a device of the parameters that are in no stage, with and without `fsdp`.

    Sorted: a product may make a gradient transposed.
    """
    body = config_of(pattern).sharing.pipeline_body
    whole = {k: v for k, v in params.items() if k != "layers"}
    layers = [v for k, v in params["layers"].items() if int(k) != body]
    leaves = jax.tree.leaves((whole, layers))
    shapes = {
        shape for leaf in leaves for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
    }
    return {tuple(sorted(n for n in shape if n != 1)) for shape in shapes}


@pytest.mark.parametrize(
    ("pattern", "mesh"),
    [("deep CLA2", "stage=2,data=2,tensor=2"), ("deep KeepEnds", "stage=2,fsdp=4")]
    + [pytest.param(p, m, marks=pytest.mark.slow)
       for p in ("deep CLA4", "deep GQA4", "deep KeepEnds")
       for m in ("stage=2,data=4", "stage=2,tensor=4")]
    + [pytest.param("long KeepEnds", "stage=3,data=2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_only_activations_cross_stages(pattern, mesh):
    traced, (params, _), _ = step(pattern, mesh)
    sizes = MeshConfig.parse(mesh)
    shards = sizes.batch_shards
    microbatch = ROWS // MICROBATCHES
    # Forward and backward: nothing else is permuted, in the program as it is written.
    assert permuted(traced.jaxpr) == [((1, microbatch, T, D), "float32")] * 2
    program, _ = compiled(pattern, mesh)
    sent = across_stages(program.as_text() or "", sizes.stage, sizes.devices)
    rows = microbatch // shards
    activations = tuple(n for n in (rows, T, D) if n != 1)
    assert [s.shape for s in sent if s.kind == "collective-permute"] == [activations] * 2
    outside = outside_shapes(pattern, params)
    assert not not_activations(sent, outside)


H = 4


def split_group(x, parameters):
    """A layer that takes its owner's K/V from wherever they come: here, from the stage before."""
    h, kv = x
    weights, owns = parameters
    kv = jnp.where(owns > 0, h @ weights, kv)
    scores = jnp.where(jnp.tri(T) > 0, (h @ weights) @ kv.swapaxes(1, 2), -1e9)
    return h + (jax.nn.softmax(scores) @ kv) @ weights.T, kv


def test_a_split_group_is_seen():
    """Owners in one stage, readers in the next: K/V ride along with the activations."""
    sharing = KVSharing.none(2)
    weights = RNG.normal(scale=0.1, size=(2, D, H)).astype(np.float32)
    owns = np.array([1, 0], np.float32)
    x = (RNG.normal(size=(ROWS, T, D)).astype(np.float32), np.zeros((ROWS, T, H), np.float32))
    execution = ExecutionConfig(pipeline_microbatches=MICROBATCHES)
    layout = make_layout(MeshConfig(stage=2, data=4), config_of("deep MQA"))

    def loss(weights, x):
        def layer(parameters, x, kv, context):
            return split_group(x, parameters), x[1]

        return (
            pipeline_layers(layer, sharing, [[(weights, owns)]], x, (), execution)[0] ** 2
        ).sum()

    def alone(weights, x):
        def layer(parameters, x, kv):
            return split_group(x, parameters), x[1]

        return (scan_layers(layer, sharing, [[(weights, owns)]], x, execution)[0] ** 2).sum()

    with in_force(layout):
        traced = jax.jit(jax.value_and_grad(loss)).trace(weights, x)
        program = traced.lower().compile()
        found = program(weights, x)
    # It computes what it should: only what it sends gives it away.
    assert errors(found, jax.value_and_grad(alone)(weights, x)) < TOLERANCE
    microbatch = ROWS // MICROBATCHES
    assert ((1, microbatch, T, H), "float32") in permuted(traced.jaxpr)
    shapes = {s.shape for s in not_activations(across_stages(program.as_text() or "", 2, 8))}
    assert (T, H) in shapes


@pytest.mark.parametrize(
    ("text", "groups"),
    [("{{0,2},{1,3}}", [(0, 2), (1, 3)]), ("[2,2]<=[4]", [(0, 1), (2, 3)]),
     ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]), ("{}", [(0, 1, 2, 3)]),
     ("mesh['stage'=2,'data'=2] {'stage'}", [(0, 2), (1, 3)]),
     ("mesh['stage'=2,'data'=2] {'data'}", [(0, 1), (2, 3)]),
     ("mesh['axis_0'=2,'axis_1'=2] {'axis_1','axis_0'}", [(0, 2, 1, 3)]),
     ("mesh['data'=1,'tensor'=4] {'tensor':(2)2}", [(0, 1), (2, 3)]),
     ("mesh['data'=1,'tensor'=4] {'tensor':(1)2}", [(0, 2), (1, 3)])],
)  # fmt: skip
def test_groups_of_devices_are_read(text, groups):
    assert read_groups(text, 4) == groups


# --- the ideal ------------------------------------------------------------------------------------


def test_the_ideal_step():
    config = registered("1B/H128-MQA-CLA2")
    one = pipeline_ideal(config, 1, 8)
    assert (one.bubble, one.step) == (1.0, pytest.approx(1.0))
    two = pipeline_ideal(config, 2, 8)
    assert two.bubble == 9 / 8
    # By hand: 2 D V of 2 D V + layers' products and causal attention, forward.
    layer = 2 * 2048 * (2 * 2048 + 3 * 5472 + 2 * 128 / 2) + 2 * 2048 * 2048
    head = 2 * 2048 * config.vocab_size
    assert two.head == pytest.approx(head / (head + 20 * layer), rel=1e-3)
    assert two.step == pytest.approx((two.body * 9 / 8 + two.head) / 2)
    full = pipeline_ideal(config, 2, 8, remat="full")
    assert full.step - two.step == pytest.approx(two.body / 3 * 9 / 16)
    assert two.step < pipeline_ideal(config, 2, 8, remat="dots").step < full.step
    ends = pipeline_ideal(registered("1B/H128-MQA-CLA2-KeepEnds"), 3, 12)
    assert ends.outside == pytest.approx(0.1 * (1 - ends.head), rel=1e-2)
    assert ends.body + ends.outside + ends.head == pytest.approx(1)
    with pytest.raises(ValueError, match="stage counts that work: 1, 3, 9"):
        pipeline_ideal(registered("1B/H128-MQA-CLA2-KeepEnds"), 2, 8)
    with pytest.raises(ValueError, match="microbatches=0"):
        pipeline_ideal(config, 2, 0)
