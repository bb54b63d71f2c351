"""Fast prefill: from the query of the last owner on, only each row's last position is run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cla_jax.configs import ExecutionConfig
from cla_jax.inference.cache import KVCache
from cla_jax.inference.forward import extend, prefill
from cla_jax.models import Decoder, UnstackedDecoder
from cla_jax.sharing import KVSharing
from tests.jaxprs import equations
from tests.models.test_decoder import config_of

LENGTH = 12


def positions_run(way, sharing: KVSharing, *, all_logits=False) -> dict[str, list[int]]:
    """On how many positions of a row each layer's projections and the head are run."""
    config = config_of(sharing, 2)
    decoder = nnx.eval_shape(
        lambda: UnstackedDecoder(
            Decoder(config, ExecutionConfig(compute_dtype="float32"), rngs=nnx.Rngs(0))
        )
    )
    cache = jax.eval_shape(lambda: KVCache.create(config, 3, LENGTH, "float32"))
    jaxpr = jax.make_jaxpr(functools.partial(way, all_logits=all_logits))(
        decoder, jax.ShapeDtypeStruct((3, LENGTH), jnp.int32), cache
    )
    weights = {
        "query": decoder.layer(0).attention.query.kernel.shape,
        "keys and values": (config.d_model, 2, config.kv_heads, config.head_dim),
        "out": decoder.layer(0).attention.out.kernel.shape,
        "down": decoder.layer(0).ffn.down.kernel.shape,
        "head": (config.d_model, config.vocab_size),
    }
    products: list[list[Any]] = [
        [operand.aval for operand in equation.invars]
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    seen = [tuple(aval.shape for aval in operands) for operands in products]
    return {
        name: [
            next(shape for shape in pair if shape != weight)[1] for pair in seen if weight in pair
        ]
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    ("way", "sharing", "whole_layers"),
    [
        (prefill, KVSharing.cla(20, 2), 18),
        (prefill, KVSharing.shared_upper_half(20), 10),
        (prefill, KVSharing.keep_ends(4), 3),
        (extend, KVSharing((0, 1, 0, 3, 1)), 3),
    ],
    ids=["CLA2", "SharedUpperHalf", "KeepEnds", "a chunk"],
)
def test_from_the_last_owners_query_on_one_position_a_row_is_run(way, sharing, whole_layers):
    layers = sharing.num_layers
    ones = [1] * (layers - whole_layers)
    found = positions_run(way, sharing)
    for name in ("query", "out", "down"):
        assert found[name] == [LENGTH] * whole_layers + ones, name
    assert found["keys and values"] == [LENGTH] * sharing.kv_layers
    assert found["head"] == [1]

    found = positions_run(way, sharing, all_logits=True)
    for name in ("query", "out", "down"):
        assert found[name] == [LENGTH] * layers, name
    assert found["head"] == [LENGTH]
