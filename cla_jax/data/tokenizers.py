"""Tokenizers: text to token ids and back."""

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from cla_jax.data.corpora import Corpus, describe
from cla_jax.data.files import byte_progress, write_bytes

__all__ = ["ByteTokenizer", "JsonTokenizer", "Tokenizer", "tokenizer_at", "train_tokenizer"]

END_OF_TEXT = ("<|endoftext|>", "</s>")


@runtime_checkable
class Tokenizer(Protocol):
    """What a token stream and a sampler need of a tokenizer."""

    @property
    def name(self) -> str:
        """For people and for directory names."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids; two tokenizers that share it are the same."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[T]`, without an end token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        ...

    def decode(self, tokens: ArrayLike) -> str:
        """Text; what is no valid text becomes U+FFFD."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and id 256 to end a document."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes, 256 ends a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes as int32 `[T]`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: ArrayLike) -> str:
        """Text of the bytes; end tokens are left out, anything else becomes U+FFFD.

        A model's vocabulary may be padded beyond 257, so a sampler can meet ids that are no byte.
        """
        ids = np.asarray(tokens, np.int64).ravel()
        ids = ids[ids != self.end_of_text]
        # 0xFF occurs in no UTF-8 text, so decoding replaces it.
        return (
            np.where((ids >= 0) & (ids < 256), ids, 0xFF)
            .astype(np.uint8)
            .tobytes()
            .decode("utf-8", errors="replace")
        )


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, from its JSON.

    Text is text: a special token that is spelled out in a document is encoded like other words, so
    that the end token ends documents and nothing else. No start token is put before a text, and
    truncation and padding that the JSON asks for are switched off.

    Args:
        data: the JSON, as UTF-8 bytes.
        name: for people and for directory names.
        end_of_text: the token that ends a document, or its id; by default `<|endoftext|>` or
            `</s>`.
        place: where it came from, for messages.

    Raises:
        ValueError: the JSON is no tokenizer, or has no such end token (with the nearest).
    """

    def __init__(
        self, data: bytes, name: str, end_of_text: str | int | None = None, *, place: str = ""
    ) -> None:
        import tokenizers

        place = place or name
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{place} is not a `tokenizers` JSON file: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.data, self.name = data, name
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_token = _end_token(vocabulary, end_of_text, place)
        self.end_of_text = vocabulary[self.end_token]
        decides = data + f"\nend {self.end_of_text}".encode()
        self.fingerprint = hashlib.sha256(decides).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 `[T]`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, on as many threads as there are processors."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, tokens: ArrayLike) -> str:
        """Text; special tokens are left out, ids that are no token become U+FFFD.

        A model's vocabulary may be padded beyond the tokenizer's.
        """
        ids = np.asarray(tokens, np.int64).ravel()
        texts, known = list[str](), list[int]()
        for token in ids[ids != self.end_of_text].tolist():
            if 0 <= token < self.vocab_size and self._tokenizer.id_to_token(token) is not None:
                known.append(token)
            else:
                texts += [self._tokenizer.decode(known, skip_special_tokens=True), "\ufffd"]
                known = []
        texts.append(self._tokenizer.decode(known, skip_special_tokens=True))
        return "".join(texts)


def _end_token(vocabulary: dict[str, int], wanted: str | int | None, place: str) -> str:
    if isinstance(wanted, int):
        named = next((token for token, number in vocabulary.items() if number == wanted), None)
        if named is None:
            raise ValueError(f"tokenizer {place} has no token of the id {wanted}")
        return named
    for token in END_OF_TEXT if wanted is None else (wanted,):
        if token in vocabulary:
            return token
    if wanted is None:
        raise ValueError(
            f"tokenizer {place} has none of the end-of-text tokens {', '.join(END_OF_TEXT)}; name "
            "the one that ends its documents: with --end-of-text where tokens are prepared, as "
            "eos_token_id in the config.json of a Hugging Face checkpoint"
        )
    near = difflib.get_close_matches(wanted, list(vocabulary), n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(f"tokenizer {place} has no token {wanted!r}{hint}")


def tokenizer_at(place: str | os.PathLike[str], end_of_text: str | int | None = None) -> Tokenizer:
    """A tokenizer by name.

    Args:
        place: `bytes`; a `tokenizers` JSON file; or `hf:OWNER/NAME[@REVISION]`, whose
            `tokenizer.json` is fetched from the Hugging Face hub and kept in its cache.
        end_of_text: as in `JsonTokenizer`.

    Raises:
        ValueError: no such file, nothing to be had from the hub, or what `JsonTokenizer` raises.
    """
    if place == "bytes":
        if end_of_text is not None:
            raise ValueError(
                f"--end-of-text {end_of_text!r} does not go with bytes: documents end with id 256"
            )
        return ByteTokenizer()
    if isinstance(place, str) and place.startswith("hf:"):
        name = place.removeprefix("hf:")
        return JsonTokenizer(_from_hub(name), name.partition("@")[0], end_of_text, place=place)
    path = Path(place).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.json")]
        near = difflib.get_close_matches(path.name, [*siblings, "bytes"], n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(
            f"no tokenizer file {path}{hint}. Known: bytes, a `tokenizers` JSON file, "
            "hf:OWNER/NAME on the Hugging Face hub"
        )
    return JsonTokenizer(path.read_bytes(), path.stem, end_of_text, place=str(path))


def _from_hub(name: str) -> bytes:
    """The `tokenizer.json` of a model on the hub."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        path = huggingface_hub.hf_hub_download(
            repository, "tokenizer.json", revision=revision or None
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"could not get tokenizer.json of {repository!r} from the Hugging Face hub, and it is "
            f"not in the local cache ({type(error).__name__}: {cause}). Offline, give the path of "
            "a `tokenizers` JSON file instead"
        ) from None
    return Path(path).read_bytes()


def train_tokenizer(corpus: Corpus, vocab_size: int, out: str | os.PathLike[str]) -> JsonTokenizer:
    """Trains a byte-level BPE on a corpus's documents and writes its JSON.

    The vocabulary holds the 256 bytes, `<|endoftext|>` and merges: any text can be encoded. A
    corpus with too few different words gives a smaller one than was asked for.

    Args:
        corpus: the text.
        vocab_size: at least 257.
        out: the JSON file, which must not exist yet.

    Raises:
        ValueError: a vocabulary below 257, a file that exists, an empty corpus.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    out = Path(out)
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least 257: the 256 bytes and the end token"
        )
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file")
    tokenizer: Any = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = 0
    total = sum(source.num_bytes for source in corpus.sources)
    with byte_progress("reading for the tokenizer", total) as report:

        def texts() -> Iterator[str]:
            nonlocal seen
            before = 0
            for source in corpus.sources:
                for record in source.records():
                    report(before + record.read)
                    seen += bool(record.document.text.strip())
                    yield record.document.text
                before += source.num_bytes

        tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        raise ValueError(f"{describe(corpus)} holds no text to train a tokenizer on")
    data = tokenizer.to_str(pretty=True).encode()
    trained = JsonTokenizer(data, out.stem, place=str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, data)
    return trained
