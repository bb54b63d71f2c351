"""Attention, its choice of implementation and rotary embeddings against explicit loops."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cla_kernels import choose_implementation
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.models import KV, attend
from cla_jax.models import attention as attention_module
from cla_jax.models.attention import AttentionPath, attention_path
from cla_jax.models.rotary import positions_in_documents, rotary, rotate
from tests.models import reference


def by_hand(q, k, v, documents=None):
    """One query, one head, one key at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, head_dim = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(length):
            for n in range(heads):
                j = n // (heads // k.shape[2])
                seen = [s for s in range(t + 1)
                        if documents is None or documents[b, s] == documents[b, t]]  # fmt: skip
                scores = np.array([q[b, t, n] @ k[b, s, j] for s in seen]) / head_dim**0.5
                weights = np.exp(scores - scores.max())
                out[b, t, n] = (weights / weights.sum()) @ v[b, seen, j]
    return out


def inputs(heads=6, kv_heads=2, head_dim=5, length=7, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(2 * random.normal(size=s), jnp.float32) for s in shapes]


DOCUMENTS = np.array([[0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 9]], np.int32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_attend_is_the_loop(heads, kv_heads, documents):
    q, k, v = inputs(heads, kv_heads)
    found = attend(q, KV(k, v), None if documents is None else jnp.asarray(documents))
    np.testing.assert_allclose(found, by_hand(q, k, v, documents), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_zero_padding_the_head_dim_changes_nothing(monkeypatch, documents):
    """The route of head dims that a fused kernel does not take, here on XLA."""
    q, k, v = inputs(head_dim=6)
    documents = None if documents is None else jnp.asarray(documents)

    def scalar(q, k, v):
        return (attend(q, KV(k, v), documents) ** 2).sum()

    plain = attend(q, KV(k, v), documents), jax.grad(scalar, argnums=(0, 1, 2))(q, k, v)
    asked = []

    def padding(head_dim, dtype, masked_length=None):
        asked.append((head_dim, dtype))
        return AttentionPath("xla", 16, "padded by the test")

    monkeypatch.setattr(attention_module, "attention_path", padding)
    padded = attend(q, KV(k, v), documents), jax.grad(scalar, argnums=(0, 1, 2))(q, k, v)
    assert asked == [(6, jnp.float32)] * len(asked)
    assert asked
    reference.assert_close(padded, plain, 1e-6)


def test_a_cpu_takes_xla_unpadded():
    for head_dim in (46, 64, 90, 128, 512):
        path = attention_path(head_dim, jnp.dtype("bfloat16"))
        assert (path.implementation, path.head_dim) == ("xla", head_dim)
        assert "cpu" in path.reason


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "implementation", "padded"),
    [
        ("9.0", "bfloat16", 128, "cudnn", 128),
        ("9.0", "bfloat16", 256, "cudnn", 256),
        ("9.0", "bfloat16", 46, "cudnn", 48),
        ("9.0", "float16", 90, "cudnn", 96),
        ("9.0", "bfloat16", 512, "xla", 512),
        ("9.0", "float32", 128, "xla", 128),
        ("8.0", "bfloat16", 128, "cudnn", 128),
        ("8.6", "bfloat16", 256, "xla", 256),
        ("7.5", "float16", 64, "xla", 64),
        ("12.0", "bfloat16", 256, "cudnn", 256),
    ],
)
def test_a_gpu_takes_what_cudnn_can(
    monkeypatch, capability, dtype, head_dim, implementation, padded
):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    path = attention_path(head_dim, jnp.dtype(dtype))
    assert (path.implementation, path.head_dim) == (implementation, padded)
    assert path.reason


@pytest.mark.parametrize(("there", "implementation"), [("cpu", "xla"), ("tpu", "splash")])
def test_a_mesh_of_other_devices_counts_rather_than_this_machine(
    monkeypatch, there, implementation
):
    """As where a machine with a GPU compiles for devices that it has not."""
    gpu, real = types.SimpleNamespace(platform="gpu", compute_capability="9.0"), jax.devices

    def devices(platform=None):
        return [gpu] if platform is None else real(platform)

    kind = jax.sharding.AbstractDevice(there, num_cores=1, platform=there)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=kind)
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 1, 16, 128), (1, 8, 1024, 1, 128)))
    monkeypatch.setattr(jax, "devices", devices)
    assert attention_path(128, jnp.dtype("bfloat16")).implementation == "cudnn"
    assert choose_implementation(q, k)[0] == "mosaic_gpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention_path(128, jnp.dtype("bfloat16")).implementation == implementation
        taken, reason = choose_implementation(q, k)
    assert taken == "xla"
    assert f"{there} is no NVIDIA GPU" in reason


def test_a_gpu_that_is_not_there_has_no_known_capability():
    kind = jax.sharding.AbstractDevice("some GPU", num_cores=1, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        path = attention_path(128, jnp.dtype("bfloat16"))
    if jax.default_backend() != "gpu":
        assert path.implementation == "xla"
        assert "some GPU is not known" in path.reason


# --- rotary ---------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(0, 3), st.sampled_from([10_000.0, 7.0]))
def test_rotate_turns_pairs_of_the_leading_dimensions(half, rest, theta):
    if half + rest == 0:
        return
    x = np.random.default_rng(half).normal(size=(2, 5, 3, 2 * half + rest)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 90, 2]], np.int32)
    found = rotate(jnp.asarray(x), rotary(jnp.asarray(positions), 2 * half, theta, None))
    expected = x.astype(np.float64)
    for b in range(2):
        for t in range(5):
            for i in range(half):
                angle = positions[b, t] * theta ** (-i / half)
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                for n in range(3):
                    expected[b, t, n, [i, i + half]] = turn @ x[b, t, n, [i, i + half]]
    np.testing.assert_allclose(found, expected, atol=3e-5)


def test_scores_depend_on_distances_alone():
    q, k, _ = inputs(heads=1, kv_heads=1, head_dim=8, length=4)

    def scores(shift):
        angles = rotary(jnp.arange(4)[None] + shift, 8, 100.0, None)
        return jnp.einsum("BTNH,BSNH->BTS", rotate(q, angles), rotate(k, angles))

    np.testing.assert_allclose(scores(0), scores(11), atol=1e-4)
    assert float(jnp.abs(scores(0) - jnp.einsum("BTNH,BSNH->BTS", q, k)).max()) > 0.1


def test_rotation_keeps_the_dtype():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    assert rotate(x, rotary(jnp.arange(2)[None], 4, 10.0, None)).dtype == jnp.bfloat16


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_positions_restart_with_each_document(lengths):
    documents = np.repeat(np.arange(len(lengths)) + 3, lengths).astype(np.int32)[None]
    found = positions_in_documents(jnp.asarray(documents))
    assert np.asarray(found)[0].tolist() == [p for n in lengths for p in range(n)]
