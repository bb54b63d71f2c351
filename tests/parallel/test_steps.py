"""Losses, gradients and updates on meshes of eight devices are those of one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from cla_jax.configs import OptimizerConfig
from cla_jax.evaluation.collectives import bytes_by_axis, collectives
from cla_jax.parallel import in_force
from cla_jax.training import init_state, make_train_step
from cla_jax.training.loss import weighted_loss
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import make_eval_step, state_shardings
from tests.models.reference import QUICK_COMPILE
from tests.parallel.models import MESHES, PATTERNS, layout_of, model_of, params_of

# Of each array's largest element; measured at most 1.5e-6.
TOLERANCE = 1e-5
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
MASK = np.random.default_rng(1).integers(0, 2, (8, 16)).astype(np.float32)
DOCUMENTS = np.sort(np.random.default_rng(2).integers(0, 3, (8, 17)), axis=1).astype(np.int32)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)

# Together they have every axis, few KV heads and shared ones; all others are slow.
QUICK = {("MQA", "data=2,fsdp=2,tensor=2"), ("CLA4", "tensor=8")}
ALL = [
    pytest.param(p, m, marks=() if (p, m) in QUICK else pytest.mark.slow)
    for p in PATTERNS
    for m in MESHES
] + [
    # One scan over two sharing groups, as the paper's models have ten.
    pytest.param("deep CLA2", m, marks=pytest.mark.slow)
    for m in ("fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")
]


def traced(pattern, mesh, loss_chunk=8, *, tied=False, documents=False):
    """The loss and its gradients, in at least two chunks on each device, and their arguments."""
    model, layout = model_of(pattern, loss_chunk, tied), layout_of(pattern, mesh, tied)
    batch = {"tokens": TOKENS, "weights": MASK / MASK.sum()}
    batch |= {"documents": DOCUMENTS} if documents else {}
    params = params_of(model.config)
    if layout is not None:
        params, batch = jax.device_put(params, layout.of(model.axes)), layout.batch(batch)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, batch):
        return jax.value_and_grad(
            lambda p: weighted_loss(
                model(p), batch["tokens"], batch["weights"], batch.get("documents")
            )
        )(params)

    with in_force(layout):
        return run.trace(params, batch), (params, batch)


def loss_and_gradients(pattern, mesh, **options):
    program, arguments = traced(pattern, mesh, **options)
    return jax.tree.map(np.asarray, program.lower().compile()(*arguments))


@functools.cache
def alone(pattern, **options):
    return loss_and_gradients(pattern, "none", **options)


def assert_close(found, expected, tolerance=TOLERANCE):
    def check(path, a, b):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree.map_with_path(check, found, expected)


@pytest.mark.parametrize(("pattern", "mesh"), ALL)
def test_loss_and_gradients_are_those_of_one_device(pattern, mesh):
    assert_close(loss_and_gradients(pattern, mesh), alone(pattern))


@pytest.mark.parametrize("option", ["tied", "documents"])
@pytest.mark.parametrize(
    "mesh",
    ["data=2,fsdp=2,tensor=2",
     *(pytest.param(m, marks=pytest.mark.slow) for m in ("data=8", "fsdp=8", "tensor=8"))],
)  # fmt: skip
def test_so_they_are_with_tied_embeddings_and_document_masks(mesh, option):
    expected = alone("CLA2", **{option: True})
    assert_close(loss_and_gradients("CLA2", mesh, **{option: True}), expected)
    # Neither is what it would be without.
    assert abs(expected[0] - alone("CLA2")[0]) > 1e-3


@pytest.mark.parametrize(
    "mesh", ["data=2,fsdp=2,tensor=2", pytest.param("fsdp=4", marks=pytest.mark.slow)]
)
def test_a_chunk_of_the_loss_adds_nothing_that_is_sent_over_the_batch(mesh):
    """Devices sum the head's gradient over their own chunks and meet once."""
    sent, layout = [], layout_of("MQA", mesh)
    assert layout is not None
    for chunk in (2, 0):
        program = traced("MQA", mesh, chunk)[0].lower().compile()
        by_axis = bytes_by_axis(collectives(program.as_text() or "", layout.mesh.shape))
        sent.append({axis: size for axis, size in by_axis.items() if "tensor" not in axis})
    assert sent[0] == sent[1]
    assert sum(sent[0].values()) > 0


def test_updates_and_evaluation_are_those_of_one_device():
    """Two micro-batches, twice; what is donated keeps its place, so nothing compiles again."""
    model, results = model_of("MQA", loss_chunk=8), []
    for mesh in ("none", "data=2,fsdp=2"):
        layout = layout_of("MQA", mesh)
        batch = {"tokens": TOKENS, "mask": MASK}
        batch = batch if layout is None else layout.batch(batch)
        with in_force(layout):
            state = init_state(model, OPTIMIZER, 0, layout)
            step = make_train_step(model, OPTIMIZER, 2, layout)
            state, _ = step(state, batch)
            state, metrics = step(state, batch)
            evaluated = make_eval_step(model)(state.params, batch)
        assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
        if layout is not None:
            assert jax.tree.map(lambda a: a.sharding, state) == state_shardings(
                model, OPTIMIZER, layout
            )
        results.append(jax.tree.map(np.asarray, (state.params, metrics, evaluated)))
    assert_close(results[1], results[0], 1e-4)  # AdamW divides small numbers by small numbers


@pytest.mark.parametrize(
    ("mesh", "most"),
    [pytest.param("fsdp=8", 0.16, marks=pytest.mark.slow), ("fsdp=4,tensor=2", 0.17),
     pytest.param("tensor=8", 0.35, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_state_is_made_where_it_lies_and_is_the_same(mesh, most):
    """`most`: the largest share of the state's bytes on a device; MQA's K/V and norms are whole."""
    model, layout = model_of("MQA"), layout_of("MQA", mesh)
    assert layout is not None
    made = jax.jit(lambda: init_state(model, OPTIMIZER, 0, layout)).lower().compile()
    state = made()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for device in jax.devices():
        here = [
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        ]
        assert sum(here) < most * whole
    # While it is made, no device holds the largest parameter whole beside its share.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    analysis = made.memory_analysis()
    assert analysis is not None
    assert analysis.output_size_in_bytes < most * whole
    assert analysis.temp_size_in_bytes < largest
    one = init_state(model, OPTIMIZER, 0)
    jax.tree.map(np.testing.assert_array_equal, state, one)


def test_without_a_mesh_nothing_is_laid_out():
    model = model_of("MQA", loss_chunk=8)
    state = jax.eval_shape(lambda: init_state(model, OPTIMIZER, 0))
    text = make_train_step(model, OPTIMIZER).lower(state, {"tokens": TOKENS}).as_text()
    assert "sharding" not in text
    assert "mesh" not in text
    leaf = jax.tree.leaves(model.init(0))[0]
    assert isinstance(leaf.sharding, SingleDeviceSharding)
