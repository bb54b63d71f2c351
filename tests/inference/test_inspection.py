"""Attention weights: against the outputs that they must explain, and what a query may not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.inference import attention_weights
from cla_jax.models import Decoder, attend
from cla_jax.models.rotary import rotary
from cla_jax.sharing import KVSharing

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing((0, 0, 0, 3)), d_model=16, ffn_dim=24, query_heads=4, kv_heads=2,
    head_dim=8, vocab_size=40, sequence_length=16, separate_kv_norm=True,
)  # fmt: skip
EXACT = ExecutionConfig(compute_dtype="float32")


@pytest.mark.parametrize("sharing", [CONFIG.sharing, KVSharing.none(4)])
def test_weights_times_the_owners_values_are_what_attention_gives(sharing):
    config = dataclasses.replace(CONFIG, sharing=sharing, separate_kv_norm=sharing.kv_layers < 4)
    decoder = Decoder(config, EXACT, rngs=nnx.Rngs(0))
    # Weights large enough that attention is far from uniform.
    decoder = jax.tree.map(lambda a: 10 * a, decoder)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    weights = attention_weights(decoder, tokens)

    assert [w.shape for w in weights] == [(2, 4, 9, 9)] * 4
    np.testing.assert_allclose([np.asarray(w).sum(-1) for w in weights], 1, rtol=1e-5)
    assert not any(np.triu(np.asarray(w), 1).any() for w in weights)

    # The model's own layers, by hand: query head n reads KV head n // 2.
    angles = rotary(jnp.arange(9, dtype=jnp.int32)[None], config.rotary, config.rope_theta, None)
    x, owned = decoder.embed(tokens), {}
    for index, owner in enumerate(sharing.owners):
        layer = decoder.layer(index)
        h = layer.attention_norm(x)
        if index == owner:
            owned[index] = layer.keys_values(x, h, angles)
        kv, w, seen = owned[owner], np.asarray(weights[index]), []
        x = layer.read(x, h, lambda q, kv=kv, seen=seen: seen.append(attend(q, kv)) or seen[0],
                       angles)  # fmt: skip
        v = np.asarray(kv.v)[:, :, [0, 0, 1, 1]]
        np.testing.assert_allclose(
            np.einsum("bnts,bsnh->btnh", w, v), seen[0], rtol=1e-4, atol=1e-5
        )
    np.testing.assert_allclose(
        decoder.unembed(decoder.final_norm(x)), decoder(tokens), rtol=1e-4, atol=1e-4
    )
