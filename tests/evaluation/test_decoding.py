"""What decoding holds in memory, counted while it is measured."""

import jax
import pytest

from cla_jax import model
from cla_jax.configs import ExecutionConfig
from cla_jax.evaluation.decoding import bytes_in_use, decode_costs, random_decoder


def test_held_memory_is_weights_and_cache():
    config = model("pythia-tiny/MLKV-2")
    before = bytes_in_use()
    decoder = random_decoder(config, ExecutionConfig("float32"))
    weights = bytes_in_use() - before
    assert weights == 4 * config.parameters
    found = {
        batch: decode_costs(decoder, batch, 16, steps=4, repeats=1, warm_up=1).held_bytes
        for batch in (2, 5)
    }
    # Beside K/V a row has its length, four bytes.
    assert found[5] - found[2] == 3 * (16 * config.kv_bytes_per_token + 4)
    assert found[2] - before - weights == 2 * (16 * config.kv_bytes_per_token + 4)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_an_8_bit_cache_is_timed_and_counted_with_its_scales(dtype):
    config = model("tiny/MQA-CLA2")
    decoder = random_decoder(config, ExecutionConfig("float32"))
    found = decode_costs(decoder, 2, 16, cache_dtype=dtype, steps=4, repeats=1, warm_up=1)
    assert found.cache_bytes == 2 * 16 * 3 * 2 * (32 + 4)
    assert found.attention == "xla" or jax.default_backend() != "cpu"


def test_refuses_a_context_without_room():
    decoder = random_decoder(model("tiny/MQA"), ExecutionConfig("float32"))
    with pytest.raises(ValueError, match="context 16 must be longer than the 16 timed steps"):
        decode_costs(decoder, 1, 16)
