"""Feed-forward layers: a width in whole tiles is the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from cla_jax.configs import ExecutionConfig
from cla_jax.models import Decoder
from cla_jax.models.feedforward import FeedForward, padded_width
from cla_jax.sharing import KVSharing
from tests.models.test_decoder import config_of

FLOAT32 = ExecutionConfig(compute_dtype="float32")


@given(st.integers(1, 20_000))
def test_a_padded_width_is_whole_tiles_or_the_width(width: int):
    padded = padded_width(width)
    assert padded == width or (padded % 128 == 0 and width < padded <= width * 33 / 32)


def test_widths_of_the_papers():
    assert [padded_width(width) for width in (5472, 1368, 8192, 3072, 344)] == [
        5504, 1408, 8192, 3072, 344,
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "neox"])
def test_padding_changes_nothing_and_leaves_the_layer_as_it_was(architecture: str):
    config = config_of(KVSharing.none(2), 2, architecture)
    layer = FeedForward(config, FLOAT32, rngs=nnx.Rngs(0))
    for bias in filter(None, (layer.up.bias, layer.down.bias)):
        bias[...] = jax.random.normal(jax.random.key(1), bias.shape)
    x = jax.random.normal(jax.random.key(2), (2, 3, config.d_model))
    before = layer(x)
    wider = layer.padded(32)
    assert wider.up.kernel.shape[-1] == wider.down.kernel.shape[0] == 32
    np.testing.assert_allclose(wider(x), before, rtol=1e-6, atol=1e-7)
    assert layer.up.kernel.shape[-1] == layer.down.kernel.shape[0] == 20


def test_an_unstacked_decoder_is_padded_and_computes_the_same():
    config = config_of(KVSharing.cla(4, 2), 1, ffn_dim=250)
    decoder = Decoder(config, FLOAT32, rngs=nnx.Rngs(0))
    unstacked = decoder.unstacked()
    assert unstacked.layer(3).ffn.down.kernel.shape == (256, config.d_model)
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    np.testing.assert_allclose(unstacked(tokens), decoder(tokens), rtol=1e-5, atol=1e-6)
