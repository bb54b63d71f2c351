"""Greedy continuation against a loop of whole forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.inference import greedy
from cla_jax.sharing import KVSharing
from cla_jax.training import Model

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing.cla(2, 2), d_model=16, ffn_dim=32, query_heads=2, kv_heads=1,
    head_dim=8, vocab_size=60, sequence_length=32, separate_kv_norm=True,
)  # fmt: skip
NO_END = 1_000
PROMPT = [3, 59, 0, 17, 17]


@pytest.fixture(scope="module")
def decoder():
    """Large random parameters: the likeliest token then depends on all that went before."""
    model = Model(CONFIG, ExecutionConfig(compute_dtype="float32"))
    random = np.random.default_rng(0)
    return model(
        jax.tree.map(
            lambda x: x + jnp.asarray(0.5 * random.normal(size=x.shape), jnp.float32), model.init(0)
        )
    )


@pytest.fixture(scope="module")
def naive(decoder):
    tokens = list(PROMPT)
    forward = jax.jit(lambda d, t: d(t))
    for _ in range(8):
        logits = np.asarray(forward(decoder, jnp.asarray([tokens], jnp.int32)))
        tokens.append(int(np.argmax(logits[0, -1])))
    return tokens[len(PROMPT) :]


def test_equals_a_loop_of_whole_forward_passes(decoder, naive):
    assert len(set(naive)) > 3
    assert greedy(decoder, PROMPT, 8, NO_END) == naive
    assert greedy(decoder, np.array(PROMPT, np.uint16), 5, NO_END) == naive[:5]
    assert greedy(decoder, PROMPT, 0, NO_END) == []


def test_stops_at_the_end_of_text(decoder, naive):
    end = naive[4]
    assert greedy(decoder, PROMPT, 8, end) == naive[: naive.index(end)]
    assert greedy(decoder, PROMPT, 8, naive[0]) == []


def test_an_end_of_text_in_the_prompt_stops_nothing(decoder, naive):
    end = next(t for t in PROMPT if t not in naive)
    assert greedy(decoder, PROMPT, 8, end) == naive


def test_fills_the_sequence_length_exactly(decoder):
    assert len(greedy(decoder, PROMPT, 32 - len(PROMPT), NO_END)) == 32 - len(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ([], 4, "prompt is empty"),
        ([1, 60], 4, r"from 1 to 60; toy takes 0 to 59"),
        ([-1], 4, r"from -1 to -1; toy takes 0 to 59"),
        ([1] * 30, 3, r"30 prompt tokens and 3 new ones exceed toy's .* 32; at most 2"),
        ([1] * 40, 3, r"at most 0"),
        ([1, 2], -1, r"new_tokens=-1"),
    ],
)
def test_refuses(decoder, prompt, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        greedy(decoder, prompt, new_tokens, NO_END)
