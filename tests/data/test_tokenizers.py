import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cla_jax.data import ByteTokenizer, Tokenizer


@given(st.text())
def test_round_trip(text):
    tokenizer: Tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode(tokens) == text


@given(st.lists(st.integers(-5, 600)))
def test_decode_takes_any_ids(tokens):
    text = ByteTokenizer().decode(tokens)
    by_hand = b"".join(bytes([t]) if 0 <= t < 256 else b"\xff" for t in tokens if t != 256)
    assert text == by_hand.decode(errors="replace")


def test_end_of_text_is_the_last_id():
    tokenizer = ByteTokenizer()
    assert tokenizer.end_of_text == 256 == tokenizer.vocab_size - 1
    assert tokenizer.decode([104, 105, 256, 300]) == "hi\ufffd"
