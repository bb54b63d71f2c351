"""Safetensors files: checked before anything is read, streamed in and out tensor by tensor.

What can be wrong with a file is found from its header, before any array exists: truncation, keys
that come twice, sizes and offsets that do not fit. A flipped bit in the *data* shows in a checksum
alone: directories that this library writes hold one for every file (`checksums.json`).
"""

import difflib
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CHECKSUMS",
    "StoredTensor",
    "check_checksums",
    "find_tensors",
    "holds_weights",
    "read_json_object",
    "read_tensors",
    "write_checksums",
    "write_tensors",
]

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """Where a tensor lies and what its header says of it.

    Attributes:
        file: that holds it.
        dtype: the format's name: `F32`, `BF16`, ...
        shape: as stored.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorToWrite(NamedTuple):
    """A tensor that is made only when its file is written.

    Attributes:
        name: in the file.
        nbytes: of its data.
        make: returns it.
    """

    name: str
    nbytes: int
    make: Callable[[], np.ndarray]


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory, by name; all headers are checked, no data is read.

    Raises:
        ValueError: no safetensors (pickles are refused by name), a damaged header or index, a
            missing shard, or an index that does not say what the shards hold.
    """
    if (single := directory / SINGLE_FILE).is_file():
        return {name: StoredTensor(single, *entry) for name, entry in _read_header(single).items()}
    if (directory / INDEX).is_file():
        return _find_in_shards(directory)
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{directory} holds {', '.join(pickles)} and no safetensors: pickled files can run any "
            f"program when they are read, so they are refused. Save it as {SINGLE_FILE}"
        )
    raise ValueError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX}")


def holds_weights(directory: Path) -> bool:
    """Whether a directory holds weights, safe to read or not, or an index of them."""
    return any(
        path.name == INDEX or path.suffix in (".safetensors", *_PICKLES)
        for path in directory.iterdir()
    )


def read_tensors(tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors one after another, file by file, each in the dtype that it is stored in.

    Raises:
        ValueError: a file that the library cannot read.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        files.setdefault(stored.file, []).append(name)
    for path, names in files.items():
        try:
            with safe_open(path, framework="numpy") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def write_tensors(
    directory: Path, tensors: Sequence[TensorToWrite], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write one `model.safetensors`, or shards with an index when there is more than fits in one.

    At most one shard's tensors exist at a time.

    Args:
        directory: exists; nothing in it is replaced.
        tensors: in the order in which they are written.
        max_shard_bytes: of the data in a file; a larger tensor gets a file of its own.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
        OSError: a file could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        arrays = {tensor.name: np.asarray(tensor.make(), order="C") for tensor in shard}
        try:
            # The metadata is what transformers asks of a file that it loads.
            save_file(arrays, directory / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"could not write {directory / name}: {error}") from None
        del arrays
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        weight_map = {
            t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_checksums(directory: Path) -> None:
    """Write the SHA-256 of every file in a directory to its `checksums.json`."""
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != CHECKSUMS)
    values = {"algorithm": "sha256", "files": {p.name: _sha256(p) for p in files}}
    (directory / CHECKSUMS).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def check_checksums(directory: Path) -> None:
    """Compare every file with `checksums.json`, where there is one.

    Raises:
        ValueError: a file is missing or is not what was written; names it.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return
    values = read_json_object(path)
    files = values.get("files")
    if values.get("algorithm") != "sha256" or not isinstance(files, dict):
        raise ValueError(f"{path} is damaged: expected SHA-256 sums by file name")
    for name, expected in files.items():
        file = directory / _plain_name(name, path)
        if not file.is_file():
            raise ValueError(f"{file} is missing: {path.name} lists it")
        if _sha256(file) != expected:
            raise ValueError(
                f"{file} is not the file that was written: its SHA-256 is not that of {path.name}. "
                f"It is damaged; if it was changed on purpose, remove {path.name}"
            )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, whose keys come once each.

    Raises:
        ValueError: the file is missing, or holds something else; names the file.
    """
    try:
        return _json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _find_in_shards(directory: Path) -> dict[str, StoredTensor]:
    path = directory / INDEX
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is damaged: it has no weight_map")
    found: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(_plain_name(value, path) for value in weight_map.values()):
        file = directory / shard
        if not file.is_file():
            near = difflib.get_close_matches(shard, [p.name for p in directory.iterdir()], n=1)
            hint = f"; the nearest file is {near[0]}" if near else ""
            raise ValueError(f"shard {file} is missing: {path.name} lists it{hint}")
        for name, entry in _read_header(file).items():
            if name in found:
                raise ValueError(
                    f"tensor {name} is in both {found[name].file.name} and {shard} of {directory}"
                )
            if weight_map.get(name) != shard:
                raise ValueError(
                    f"{file} holds tensor {name}, which {path.name} does not put there"
                )
            found[name] = StoredTensor(file, *entry)
    for name, shard in weight_map.items():
        if name not in found:
            raise ValueError(f"{path} puts tensor {name} into {shard}, which does not hold it")
    return found


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor in a file, by name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER or 8 + length > size:
            raise ValueError(
                f"{path} is truncated or no safetensors file: {size} bytes, of which the header "
                f"would be {length}"
            )
        header = _json_object(file.read(length), f"{path}: the header")
    header.pop("__metadata__", None)
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _check_entry(path, name, entry)
        needed = math.prod(shape) * _BITS[dtype] // 8
        if end - begin != needed:
            raise ValueError(
                f"{path}: tensor {name} is {dtype}{list(shape)}, which takes {needed} bytes, but "
                f"its offsets {begin} to {end} span {end - begin}"
            )
        entries[name] = (dtype, shape)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(
                f"{path}: tensor {name} begins at offset {begin}, where {at} was expected: tensors "
                "lie end to end"
            )
        at = end
    if at != size - 8 - length:
        why = "is truncated" if at > size - 8 - length else "has bytes that no tensor holds"
        raise ValueError(
            f"{path} {why}: its header describes {at} bytes of tensors, there are "
            f"{size - 8 - length}"
        )
    return entries


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    def integers(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{path}: tensor {name} is not described by dtype, shape and data_offsets: {entry}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        near = difflib.get_close_matches(str(dtype), _BITS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{path}: tensor {name} has the unknown dtype {dtype!r}; the nearest is {near!r}"
        )
    if not integers(shape) or not integers(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: tensor {name} has shape {shape} and offsets {offsets}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"the key {key!r} comes twice")
            values[key] = value
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged: it holds no JSON object")
    return values


def _plain_name(name: Any, where: Path) -> str:
    """A file's name that stays in its directory."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{where} names the file {name!r}: expected a plain file name")
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
