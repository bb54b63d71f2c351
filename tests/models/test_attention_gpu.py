"""The attention paths of a real GPU against a float64 softmax in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import ExecutionConfig
from cla_jax.models.attention import KV, attend, attention_path
from cla_jax.registry import model
from cla_jax.training.step import Model, token_losses

pytestmark = pytest.mark.gpu

# (query heads, KV heads, head dim): the papers' head sizes, scaled in number only.
SHAPES = [(4, 1, 32), (5, 1, 46), (4, 4, 64), (2, 1, 90), (8, 2, 128), (4, 1, 256), (2, 1, 512)]


def softmax_attention(q, k, v, documents):
    """Float64, a loop over heads."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    visible = np.tri(q.shape[1], dtype=bool)[None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    group = q.shape[2] // k.shape[2]
    out = np.empty_like(q)
    for head in range(q.shape[2]):
        keys, values = k[:, :, head // group], v[:, :, head // group]
        scores = np.einsum("bth,bsh->bts", q[:, :, head], keys) / np.sqrt(q.shape[-1])
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, head] = np.einsum(
            "bts,bsh->bth", weights / weights.sum(-1, keepdims=True), values
        )
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), SHAPES)
def test_attend(query_heads, kv_heads, head_dim, masked):
    keys = jax.random.split(jax.random.key(head_dim), 3)
    q = jax.random.normal(keys[0], (2, 256, query_heads, head_dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (2, 256, kv_heads, head_dim), jnp.bfloat16) for key in keys[1:])
    documents = np.arange(512, dtype=np.int32).reshape(2, 256) // 100 if masked else None
    expected = softmax_attention(q, k, v, documents)
    ids = None if documents is None else jnp.asarray(documents)
    found = np.asarray(jax.jit(attend)(q, KV(k, v), ids).astype(jnp.float32))
    # bfloat16 weights and output: 2.3e-3 is the best that there is.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 5e-3


def test_paths():
    cudnn, padded = (
        attention_path(128, jnp.dtype("bfloat16")),
        attention_path(46, jnp.dtype("bfloat16")),
    )
    assert (cudnn.implementation, cudnn.head_dim) == ("cudnn", 128)
    assert (padded.implementation, padded.head_dim) == ("cudnn", 48)
    assert attention_path(512, jnp.dtype("bfloat16")).implementation == "xla"
    assert attention_path(128, jnp.dtype("float32")).implementation == "xla"


@pytest.mark.parametrize("name", ["mini/H46-MQA", "mini/H90-MQA-CLA2", "pythia-160m/MLKV-6"])
def test_gradients_near_float32(name):
    """A whole model's gradients in bfloat16 (cuDNN) are those in float32 (XLA), up to rounding."""
    config = model(name)
    tokens = jax.random.randint(jax.random.key(1), (1, 257), 0, config.vocab_size, jnp.int32)
    gradients = []
    for dtype in ("bfloat16", "float32"):
        decoder = Model(config, ExecutionConfig(compute_dtype=dtype))
        params = decoder.init(0)
        loss = jax.jit(jax.grad(lambda p, d=decoder: token_losses(d(p), tokens).mean()))
        gradients.append(jax.tree.leaves(loss(params)))
    for low, high in zip(*gradients, strict=True):
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        assert np.linalg.norm(low - high) / np.linalg.norm(high) < 0.05
