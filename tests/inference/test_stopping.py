"""Text from blocks of tokens and its stop strings, against a search of the whole text."""

import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from cla_jax.data import ByteTokenizer, JsonTokenizer
from cla_jax.inference.stopping import RowText, check_stop_strings

BYTES = ByteTokenizer()


def byte_level() -> JsonTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©"), ("Ġ", "Ã©")]
    words = ["</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return JsonTokenizer(tokenizer.to_str().encode(), "byte-level")


def metaspace() -> JsonTokenizer:
    """As Llama's: a word carries its space, the first word's is dropped; other bytes are tokens."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return JsonTokenizer(tokenizer.to_str().encode(), "metaspace")


THE, CAT, S, BYTE = 2, 3, 4, 6  # ids of `metaspace`


def blocks(tokens, sizes):
    """`tokens` cut into blocks of those sizes, over and over."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(tokens):
            return
        yield tokens[start : start + size]
        start += size


def run(decode, tokens, stops, sizes, context=()) -> tuple[RowText, str]:
    """The row's end, and all that was taken on the way there."""
    row, taken = RowText(decode, stops, context), ""
    for block in blocks(tokens, sizes):
        stopped = row.add(block)
        taken += row.take()
        if stopped:
            break
    row.finish()
    return row, taken + row.take()


def expected(decode, tokens, stops) -> tuple[str, int, str | None]:
    """Character by character: the text, how many tokens lie before the stop string, and which."""
    text = decode(tokens)
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            start = end - len(stop)
            kept = max(n for n in range(len(tokens) + 1) if len(decode(tokens[:n])) <= start)
            return text[:start], kept, stop
    return text, len(tokens), None


TEXTS = st.text(st.sampled_from("ab é€😀\n"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("ab é€😀\n"), min_size=1, max_size=5), max_size=3)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(TEXTS, STOPS, SIZES)
def test_any_blocks_of_bytes_give_the_first_stop_string(text, stops, sizes):
    tokens = BYTES.encode(text).tolist()
    row, taken = run(BYTES.decode, tokens, stops, sizes)
    before, kept, stop = expected(BYTES.decode, tokens, stops)
    assert (row.text, row.tokens, row.stop) == (before, tokens[:kept], stop)
    assert taken == before


@given(st.lists(st.integers(0, 256), max_size=60), SIZES)
def test_bytes_that_are_no_text(tokens, sizes):
    row, taken = run(BYTES.decode, tokens, ["\n\n\n"], sizes)
    assert row.text == taken == BYTES.decode(row.tokens)


@given(st.text(st.sampled_from("the é😀"), max_size=40), STOPS, SIZES)
def test_tokens_of_several_characters_and_of_parts_of_one(text, stops, sizes):
    tokenizer = byte_level()
    tokens = tokenizer.encode(text).tolist()
    row, taken = run(tokenizer.decode, tokens, stops, sizes)
    before, kept, stop = expected(tokenizer.decode, tokens, stops)
    assert (row.text, row.tokens, row.stop) == (before, tokens[:kept], stop)
    assert taken == before


WORDS = [[THE], [CAT], [S], [BYTE + b for b in "é".encode()], [BYTE + b for b in "😀".encode()]]


@given(st.lists(st.sampled_from(WORDS), max_size=20), SIZES)
def test_a_decoder_that_drops_the_first_space(words, sizes):
    """Generated text keeps it: it comes after the prompt."""
    tokenizer = metaspace()
    context, tokens = [CAT, THE], list(itertools.chain.from_iterable(words))
    row, taken = run(tokenizer.decode, tokens, (), sizes, context)
    assert "cat the" + row.text == tokenizer.decode(context + tokens)
    assert taken == row.text


def test_a_decoder_that_gives_up_a_whole_character_for_half_of_another():
    """`tokenizers` replaces every byte of a run that is no text; what was printed stays."""
    tokenizer, half = metaspace(), [BYTE + 0xC3]
    assert tokenizer.decode([*WORDS[3], *half]) == "\ufffd" * 3
    row, taken = run(tokenizer.decode, [*WORDS[3], *half, S], (), [1], [CAT])
    assert taken == row.text
    assert row.text.replace("\ufffd", "") == "és"


def test_the_first_to_be_complete_wins_and_of_two_the_longer():
    tokens = BYTES.encode("xabcdef").tolist()
    for sizes in ([1], [3], [100]):
        assert run(BYTES.decode, tokens, ["abcdef", "cd"], sizes)[0].text == "xab"
        row, _ = run(BYTES.decode, tokens, ["cd", "abcd"], sizes)
        assert (row.text, row.stop) == ("x", "abcd")


def test_what_may_be_printed_already():
    row = RowText(BYTES.decode, ["\n\n", "END"])

    def after(data: bytes) -> str:
        row.add(list(data))
        return row.take()

    assert after(b"one\n") == "one"
    assert after(b"two E") == "\ntwo "
    assert after(b"N") == ""
    assert after(b"T caf\xc3") == "ENT caf"
    assert after(b"\xa9\xf0\x9f") == "é"
    assert after(b"\x98\x80 EN") == "😀 "
    assert row.text.endswith(" EN")
    row.finish()
    assert (row.take(), row.take(), row.stop) == ("EN", "", None)


def test_half_a_character_at_the_end_is_settled_by_finish():
    row = RowText(BYTES.decode)
    row.add(list(b"caf\xc3"))
    assert (row.text, row.take()) == ("caf", "caf")
    row.finish()
    assert (row.text, row.take(), row.tokens) == ("caf\ufffd", "\ufffd", list(b"caf\xc3"))


def test_a_prompt_that_ends_in_half_a_character():
    row = RowText(BYTES.decode, context=list(b"caf\xc3"))
    assert not row.add(list(b"\xa9s"))
    assert row.text == "és"
    row = RowText(BYTES.decode, context=list("caf\ufffd".encode()))  # whole, if odd
    assert not row.add(list(b"s"))
    assert row.text == "s"


def test_a_stop_string_over_many_blocks_keeps_the_tokens_before_it():
    text = "word " * 20 + "=" * 40 + "rest"
    row, taken = run(BYTES.decode, BYTES.encode(text).tolist(), ["=" * 40], [3])
    assert row.text == taken == "word " * 20
    assert row.tokens == BYTES.encode(row.text).tolist()


def test_a_long_text_is_decoded_in_bounded_pieces():
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return BYTES.decode(tokens)

    row, _ = run(decode, BYTES.encode("naïve café " * 500).tolist(), ["never"], [16])
    assert row.text == "naïve café " * 500
    assert longest <= 4 * 16


@pytest.mark.parametrize(
    ("stops", "message"),
    [("END", r"is a single string: give a tuple, \('END',\)"), (("a", ""), "empty string")],
)
def test_refuses(stops, message):
    with pytest.raises(ValueError, match=message):
        check_stop_strings(stops)
    with pytest.raises(ValueError, match=message):
        RowText(BYTES.decode, stops)
