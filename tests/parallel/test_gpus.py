"""Two GPUs have the losses and gradients of one; two processes with a GPU each too."""

import functools

import jax
import numpy as np
import pytest

from cla_jax.configs import ExecutionConfig, MeshConfig, ModelConfig
from cla_jax.inference import KVCache, extend, prefill
from cla_jax.parallel import in_force, make_layout
from cla_jax.sharing import KVSharing
from cla_jax.training import Model
from cla_jax.training.loss import weighted_loss
from tests.parallel.processes import ended, started
from tests.parallel.test_processes import TEXT, losses

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    name="small CLA2", sharing=KVSharing.cla(4, 2), d_model=128, ffn_dim=256, query_heads=4,
    kv_heads=1, head_dim=64, vocab_size=512, sequence_length=256, separate_kv_norm=True,
    init_std=0.1,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 512, (8, 129)).astype(np.int32)
WEIGHTS = np.full((8, 128), 1 / (8 * 128), np.float32)
# Norm of the difference over the norm. Exact products, summed in another order; and bfloat16 ones,
# where another split rounds other sums.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}


@pytest.fixture(autouse=True)
def _two_gpus():
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")


def norm_of_error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@functools.cache
def loss_and_gradients(mesh, dtype):
    layout = make_layout(MeshConfig.parse(mesh), CONFIG, jax.devices()[:2])
    model = Model(CONFIG, ExecutionConfig(compute_dtype=dtype, loss_chunk=256))
    params, batch = model.init(0), {"tokens": TOKENS, "weights": WEIGHTS}
    if layout is not None:
        params, batch = jax.device_put(params, layout.of(model.axes)), layout.batch(batch)

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(
            lambda p: weighted_loss(model(p), batch["tokens"], batch["weights"])
        )(params)

    with in_force(layout), jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, run(params, batch))


@pytest.mark.standard_dtype_promotion  # jax.nn's attention promotes in its gradient too
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "tensor=2", "stage=2"])
def test_loss_and_gradients_are_those_of_one_gpu(mesh, dtype):
    loss, gradients = loss_and_gradients(mesh, dtype)
    expected, of_one = loss_and_gradients("none", dtype)
    assert loss == pytest.approx(expected, rel=TOLERANCE[dtype] / 10)

    def check(path, found, expected):
        error = norm_of_error(found, expected)
        assert error < TOLERANCE[dtype], f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree.map_with_path(check, gradients, of_one)


def test_tensor_parallel_decoding_is_that_of_one_gpu():
    """Four rows of ragged lengths; the cache is split by rows, half of it on each GPU."""
    found = []
    for mesh in ("none", "tensor=2"):
        layout = make_layout(MeshConfig.parse(mesh), CONFIG, jax.devices()[:2])
        model = Model(CONFIG, ExecutionConfig())
        params = model.init(0)
        if layout is not None:
            params = jax.device_put(params, layout.of(model.axes))
        with in_force(layout):
            decoder = model(params).unstacked()
            cache = jax.jit(lambda: KVCache.create(CONFIG, 4, 128))()
            widths = np.array([64, 3, 40, 17], np.int32)
            _, cache = jax.jit(prefill)(decoder, TOKENS[:4, :64], cache, widths)
            logits, cache = jax.jit(extend)(decoder, TOKENS[:4, 64:65], cache)
        assert len(cache.k[0].addressable_shards) == (1 if layout is None else 2)
        assert {s.data.shape[1] for s in cache.k[0].addressable_shards} == {4 // (1 + len(found))}
        found.append(np.asarray(logits, np.float32))
    assert norm_of_error(found[1], found[0]) < TOLERANCE["bfloat16"]


def test_two_processes_have_the_losses_of_one(tmp_path):
    """One GPU each, joined by `jax.distributed`; what one process writes alone is float32."""
    (tmp_path / "my.txt").write_text(TEXT)
    more = ("--training.steps", "3")
    with started(1, tmp_path, *more, "--out", "one", gpus=True) as processes:
        said = ended(processes)
    assert [code for code, _, _ in said] == [0], said
    with started(
        2, tmp_path, *more, "--out", "two", "--mesh", "data=2", gpus=True
    ) as processes:  # fmt: skip
        said = ended(processes)
    assert [code for code, _, _ in said] == [0, 0], said
    expected = losses(tmp_path / "one")
    assert sum(is_training for _, is_training in expected) == 3
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
