"""Text datasets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import DatasetNotFoundError

from cla_jax.data.records import Document, Record, Source

__all__ = ["TfdsCorpus"]


@dataclasses.dataclass(frozen=True, init=False)
class TfdsCorpus:
    """A split of a text dataset that TFDS has prepared on this machine.

    It is looked for in TFDS' own data directory (`TFDS_DATA_DIR`, by default
    `~/tensorflow_datasets`) and must be in a format with random access (ArrayRecord): others can
    only be read with TensorFlow. Nothing is downloaded.

    Args:
        dataset: `NAME[/CONFIG][:VERSION][@SPLIT]`; the split is `train` by default.
        text_key: the feature that holds the text.

    Raises:
        ValueError: an unknown dataset, split or feature (with the nearest), a dataset that is not
            prepared here or cannot be read without TensorFlow (with what to do).
    """

    dataset: str
    split: str
    text_key: str

    def __init__(self, dataset: str, text_key: str = "text") -> None:
        name, _, split = dataset.partition("@")
        object.__setattr__(self, "dataset", name)
        object.__setattr__(self, "split", split or "train")
        object.__setattr__(self, "text_key", text_key)
        _ = self.sources

    @property
    def name(self) -> str:
        """Names the directory of the prepared corpus."""
        return re.sub(r"[^\w.-]+", "-", self.dataset)

    @property
    def skipped_files(self) -> Sequence[str]:
        """None."""
        return ()

    @property
    def sources(self) -> Sequence[Source]:
        """The split, as one source."""
        return self._opened

    @functools.cached_property
    def _opened(self) -> Sequence[Source]:
        builder = _builder(self.dataset)
        features = sorted(builder.info.features or ())
        if self.text_key not in features:
            near = difflib.get_close_matches(self.text_key, features, n=1, cutoff=0.0)
            raise ValueError(
                f"dataset {self.dataset!r} has no feature {self.text_key!r}, but "
                f"{', '.join(features)}; the nearest is {near[0]!r} (--text-key chooses it)"
            )
        try:
            data = builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise ValueError(
                f"dataset {self.dataset!r} in {builder.data_dir} cannot be read without "
                f"TensorFlow (format {builder.info.file_format}); {_how_to_prepare(self.dataset)}"
            ) from None
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"dataset {self.dataset!r} has no split {self.split!r}; it has "
                f"{', '.join(builder.info.splits)} ({_first_line(error)})"
            ) from None
        return (_Split(builder, data, self.dataset, self.split, self.text_key),)


class _Split:
    """Records of a data source, in order."""

    def __init__(self, builder: Any, data: Any, dataset: str, split: str, text_key: str) -> None:
        self._builder, self._data, self._text_key = builder, data, text_key
        self.name = f"{dataset}@{split}"

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().length for path in self._files())

    def stamp(self) -> str:
        files = [(p.name, p.stat().length, p.stat().mtime) for p in self._files()]
        return f"{files}, key {self._text_key!r}"

    def records(self, start: int = 0) -> Iterator[Record]:
        size, count = self.num_bytes, len(self._data)
        for index in range(start, count):
            text = self._data[index][self._text_key]
            if isinstance(text, bytes):
                try:
                    text = text.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self.name}, record {index}: {self._text_key!r} is not UTF-8 "
                        f"({error.reason} at offset {error.start})"
                    ) from None
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.name}, record {index}: {self._text_key!r} is {type(text).__name__}, "
                    "not text"
                )
            yield Record(
                Document(f"{self.name}:{index}", text), index + 1, size * (index + 1) // count
            )

    def _files(self) -> list[Any]:
        return [path for path in sorted(self._builder.data_path.iterdir()) if path.is_file()]


def _builder(dataset: str) -> Any:
    """The dataset's builder, prepared."""
    try:
        builder = tfds.builder(dataset)
    except DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        name = re.split(r"[/:]", dataset)[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ValueError(
            f"TFDS knows no dataset {name!r}, nor is one of that name in its data directory; the "
            f"nearest name is {near[0]!r}"
        ) from None
    except (ValueError, AssertionError, ImportError) as error:
        raise ValueError(f"TFDS cannot open {dataset!r}: {_first_line(error)}") from None
    if not builder.is_prepared():
        raise ValueError(
            f"dataset {dataset!r} is not prepared on this machine (looked for {builder.data_dir}); "
            f"{_how_to_prepare(dataset)}"
        )
    return builder


def _how_to_prepare(dataset: str) -> str:
    return (
        'prepare it once with `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{dataset}').download_and_prepare(file_format='array_record')\"` "
        "(many datasets need TensorFlow for that, or another TFDS data directory), or set "
        "TFDS_DATA_DIR to where it is"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
