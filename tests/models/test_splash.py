"""TPU's attention kernel, interpreted: the attention of `jax.nn`, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import MeshConfig
from cla_jax.models import KV, attend, attention
from cla_jax.models.splash import splash_attend
from cla_jax.parallel import Layout, Rules, in_force, make_mesh
from tests.parallel.models import config_of

MESH = MeshConfig(data=2, tensor=4)


def inputs(length, query_heads, kv_heads, head_dim):
    rng = np.random.default_rng(0)

    def normal(heads):
        return jnp.asarray(rng.normal(size=(2, length, heads, head_dim)), jnp.float32)

    return normal(query_heads), KV(normal(kv_heads), normal(kv_heads)), normal(query_heads)


@pytest.mark.parametrize(
    ("length", "kv_heads", "head_dim", "documents", "mesh"),
    [(130, 1, 46, False, False), (128, 2, 128, True, False), (96, 4, 64, True, True)],
    ids=["MQA, padded", "GQA, documents", "on a mesh"],
)
def test_it_is_the_attention_of_jax_nn(length, kv_heads, head_dim, documents, mesh):
    q, kv, weights = inputs(length, 4, kv_heads, head_dim)
    ids = None
    if documents:
        ids = jnp.asarray(np.arange(length)[None, :] // np.array([[50], [31]]), jnp.int32)

    def with_gradients(attention):
        def weighted(q, kv):
            out = attention(q, kv)
            return (out * weights).sum(), out

        return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(q, kv)

    expected = with_gradients(lambda q, kv: attend(q, kv, ids))
    layout = None
    if mesh:
        layout = Layout(make_mesh(MESH), Rules.of(config_of("GQA4"), MESH), MESH)
    with in_force(layout):
        found = with_gradients(lambda q, kv: splash_attend(q, kv.k, kv.v, ids, interpret=True))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


def test_attend_takes_it_on_tpu(monkeypatch):
    """Whatever this machine is: the mesh in force may be of TPUs that are not there."""
    q, kv, _ = inputs(128, 4, 1, 64)
    expected = attend(q, kv)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    taken = []

    def interpreted(*arguments):
        taken.append(arguments)
        return splash_attend(*arguments, interpret=True)

    monkeypatch.setattr(attention.splash, "splash_attend", interpreted)
    np.testing.assert_allclose(attend(q, kv), expected, atol=3e-5)
    assert len(taken) == 1
    path = attention.attention_path(46, jnp.dtype("bfloat16"))
    assert (path.implementation, path.head_dim) == ("splash", 128)
