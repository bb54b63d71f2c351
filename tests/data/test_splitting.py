import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.data import Document, Record, splitting
from cla_jax.data.corpora import documents_of
from cla_jax.data.splitting import ByHash, Exact, WithoutGiven, digest_of, split_of


class Documents:
    """A corpus, and its only source, from a list."""

    name = "list"
    skipped_files = ()
    num_bytes = 0

    def __init__(self, *texts: str) -> None:
        self.texts, self.sources = texts, (self,)

    def stamp(self) -> str:
        return str(hash(self.texts))

    def records(self, start: int = 0):
        for i in range(start, len(self.texts)):
            yield Record(Document(str(i), self.texts[i]), i + 1, 0)


def split_texts(corpus, rule=None) -> tuple[list[str], list[str]]:
    """Train and validation texts."""
    out = {"train": [], "validation": []}
    rule = rule or split_of(corpus)
    for document in documents_of(corpus):
        for split, piece in rule.pieces(document, digest_of(document)):
            out[split].append(piece.text)
    return out["train"], out["validation"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdeé"), st.integers(1, 3000)), min_size=1))
def test_split_is_disjoint_complete_and_bounded(parts):
    texts = [letter * 300 + "x " * n for letter, n in parts] + ["z\n" * 500]
    train, validation = split_texts(Documents(*texts))
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sum(map(len, train)) + sum(map(len, validation)) == sum(map(len, texts))
    share = sum(len(t.encode()) for t in validation) / sum(len(t.encode()) for t in texts)
    assert 0.049 <= share <= 0.105


@pytest.mark.parametrize("limit", ["EXACT_BYTES", "EXACT_DOCUMENTS"])
def test_copies_land_in_the_same_split(monkeypatch, limit):
    texts = [f"document {i % 400} " * 50 for i in range(800)]
    for rule in (Exact, ByHash):
        corpus = Documents(*texts)
        assert isinstance(split_of(corpus), rule)
        train, validation = split_texts(corpus)
        assert len(validation) % 2 == 0
        assert not set(train) & set(validation)
        assert 20 <= len(validation) <= 80
        monkeypatch.setattr(splitting, limit, 300)


def test_one_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    (head,), (tail,) = split_texts(Documents(text))
    assert head + tail == text
    assert tail.startswith("line ")
    assert head.endswith("\n")


def test_one_document_without_lines_is_cut_at_a_space_or_anywhere():
    (head,), (tail,) = split_texts(Documents("word " * 1000))
    assert head.endswith(" ")
    assert tail.startswith("word")
    (head,), (tail,) = split_texts(Documents("é" * 1000))
    assert (len(head), len(tail)) == (950, 50)


def test_one_huge_document_among_small_ones_does_not_become_the_validation_split():
    train, validation = split_texts(Documents("a few words", "word " * 10_000, "and others"))
    assert len(train) == 3
    assert 2400 <= len("".join(validation)) <= 5100


def test_share_of_a_large_corpus(monkeypatch):
    monkeypatch.setattr(splitting, "EXACT_BYTES", 1000)
    corpus = Documents(*["some text " * 50] * 10)
    corpus.num_bytes = 2**30
    assert split_of(corpus) == ByHash(0.05)
    corpus.num_bytes = 2**40
    assert split_of(corpus) == ByHash(2.0**-14)
    train, validation = split_texts(Documents(*map(str, range(4000))), ByHash(0.25))
    assert 900 < len(validation) < 1100
    assert sorted(map(int, train + validation)) == list(range(4000))


def test_training_text_beside_given_validation_text():
    held_out = frozenset(digest_of(Document("", text)) for text in "ab")
    train, validation = split_texts(Documents(*"abcad"), WithoutGiven(held_out))
    assert (train, validation) == (["c", "d"], [])
