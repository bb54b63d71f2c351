"""A prepared directory: what binds it to one tokenizer, and how it is opened.

Nothing here needs TFDS or the corpus: a training run reads tokens alone.
"""

import json
import os
from pathlib import Path
from typing import Any

from cla_jax.data.files import write_bytes, write_json
from cla_jax.data.token_stream import Streams, TokenStream
from cla_jax.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer

__all__ = ["open_prepared", "open_tokenizer"]

_FILE, _TOKENIZER_FILE = "prepared.json", "tokenizer.json"
_FORMAT = 1


def open_prepared(directory: str | os.PathLike[str]) -> Streams:
    """The token streams of a directory that `cla-jax prepare-data` made.

    Raises:
        ValueError: not such a directory, an unfinished one, a damaged stream.
    """
    record = _read(Path(directory))
    if "summary" not in record:
        raise ValueError(
            f"the preparation of {directory} is not finished; run `cla-jax prepare-data` with the "
            "same arguments again, and it goes on where it was"
        )
    streams = Streams.open(directory)
    for stream in (streams.train, streams.validation):
        if stream.tokenizer_fingerprint != record["tokenizer"]["fingerprint"]:
            raise ValueError(
                f"the tokens in {stream.directory} are of tokenizer {stream.tokenizer!r} "
                f"({stream.tokenizer_fingerprint}), not of {record['tokenizer']['name']!r} "
                f"({record['tokenizer']['fingerprint']}) as {directory} says"
            )
    return streams


def open_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a prepared directory, for samples and prompts.

    Raises:
        ValueError: not such a directory, a tokenizer that is missing or no longer the same.
    """
    return read_tokenizer(Path(directory), _read(Path(directory))["tokenizer"])


def tokenizer_of(streams: Streams) -> Tokenizer | None:
    """The tokenizer that streams were made with: bytes, or kept beside them; None if it is not.

    Raises:
        ValueError: as `open_tokenizer`, where the streams lie in a prepared directory.
    """
    fingerprint = streams.train.tokenizer_fingerprint
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    directory = streams.train.directory.parent
    if not (directory / _FILE).exists():
        return None
    tokenizer = open_tokenizer(directory)
    return tokenizer if tokenizer.fingerprint == fingerprint else None


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `read_tokenizer` knows a tokenizer by, as JSON values."""
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "end_token": getattr(tokenizer, "end_token", None),
    }


def keep_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Leaves a tokenizer in a directory, for `read_tokenizer`; bytes need no file."""
    if isinstance(tokenizer, JsonTokenizer) and not (directory / _TOKENIZER_FILE).exists():
        write_bytes(directory / _TOKENIZER_FILE, tokenizer.data)


def read_tokenizer(directory: Path, record: dict[str, Any]) -> Tokenizer:
    """The tokenizer that was left in a directory.

    Raises:
        ValueError: it is missing, or no longer the one that `record` tells of.
    """
    if record["fingerprint"] == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    path = directory / _TOKENIZER_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}, of tokenizer {record['name']!r}, is missing") from None
    tokenizer = JsonTokenizer(data, record["name"], record["end_token"], place=str(path))
    if tokenizer.fingerprint != record["fingerprint"]:
        raise ValueError(
            f"{path} has changed: its fingerprint is {tokenizer.fingerprint}, the tokens were made "
            f"with {record['fingerprint']}"
        )
    return tokenizer


def check_prepared(directory: Path, tokenizer: Tokenizer) -> None:
    """Checks that a directory can be prepared with this tokenizer; changes nothing.

    Raises:
        ValueError: the directory holds something else, or was begun with another tokenizer.
    """
    if (directory / _FILE).exists():
        before = _read(directory)["tokenizer"]
        if before["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{directory} was prepared with tokenizer {before['name']!r} (fingerprint "
                f"{before['fingerprint'][:16]}, {before['vocab_size']} ids), this one is "
                f"{tokenizer.name!r} (fingerprint {tokenizer.fingerprint[:16]}, "
                f"{tokenizer.vocab_size} ids); prepare into another directory. What is there stays "
                "as it is"
            )
    elif directory.exists() and (not directory.is_dir() or _foreign(directory)):
        raise ValueError(
            f"{directory} exists and is not a prepared directory; nothing in it was touched: "
            "choose another"
        )


def _foreign(directory: Path) -> list[str]:
    """What no preparation that was killed before it wrote its record can have left."""
    return [p.name for p in directory.iterdir() if p.name[0] != "." and p.name != "documents"]


def bind_prepared(directory: Path, tokenizer: Tokenizer) -> None:
    """Binds a directory to a tokenizer, before any token is written."""
    if not (directory / _FILE).exists():
        record = tokenizer_record(tokenizer)
        write_json(directory / _FILE, {"format": _FORMAT, "tokenizer": record})
    keep_tokenizer(directory, tokenizer)


def complete_prepared(directory: Path, info: Any, streams: Streams) -> None:
    """Writes the summary that says the directory is complete."""
    record = _read(directory)
    record["summary"] = {
        "corpus": info.name,
        "corpus_fingerprint": info.fingerprint,
        "copies_left_out": info.copies_left_out,
        "skipped_files": info.skipped_files,
        **{stream.split: _figures(stream) for stream in (streams.train, streams.validation)},
    }
    write_json(directory / _FILE, record)


def _figures(stream: TokenStream) -> dict[str, Any]:
    return {
        "documents": stream.num_documents,
        "bytes": stream.text_bytes,
        "tokens": stream.num_tokens,
        "bytes_per_token": stream.bytes_per_token,
        "fingerprint": stream.fingerprint,
    }


def _read(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / _FILE).read_text("utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}, not {_FORMAT}")
        return record
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{directory} is not a prepared directory (no {_FILE} in it); make one with "
            f"`cla-jax prepare-data CORPUS --out {directory}`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / _FILE} is damaged: {error}") from None
