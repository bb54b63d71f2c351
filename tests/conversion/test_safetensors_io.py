"""Damaged files: every one is refused by its name before a tensor is read, or reads as it was."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cla_jax.conversion.safetensors_io import (
    TensorToWrite,
    check_checksums,
    find_tensors,
    read_tensors,
    write_checksums,
    write_tensors,
)

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "c.bias": np.arange(3, dtype=np.float32),
}


def assemble(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def put(directory: Path, data: bytes, name: str = "model.safetensors") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


def test_reads_what_the_library_wrote(tmp_path: Path, whole: bytes):
    found = dict(read_tensors(find_tensors(put(tmp_path / "x", whole))))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def test_every_truncation_is_refused(tmp_path: Path, whole: bytes):
    for length in range(len(whole)):
        directory = put(tmp_path / "x", whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors.*(truncated|safetensors file)"):
            find_tensors(directory)
    with pytest.raises(ValueError, match="has bytes that no tensor holds"):
        find_tensors(put(tmp_path / "x", whole + b"\0"))


def test_a_flipped_bit_in_the_header_is_refused_or_shows(tmp_path: Path, whole: bytes):
    """Or shows in a name, shape or dtype, which a checkpoint's config then does not match."""
    expected = find_tensors(put(tmp_path / "x", whole))
    described = {(n, t.dtype, t.shape) for n, t in expected.items()}
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    unnoticed = 0
    for bit in range(8 * end):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found = find_tensors(put(tmp_path / "x", bytes(data)))
        except ValueError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017
            continue
        unnoticed += {(n, t.dtype, t.shape) for n, t in found.items()} == described
    assert unnoticed == 0


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a": 1', 0, "header is damaged"),
        (b"[1, 2]", 0, "holds no JSON object"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         b'"a": {"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, "key 'a' comes twice"),
        ({"a": [1]}, 0, "tensor a is not described"),
        ({"a": {**entry(), "more": 1}}, 8, "tensor a is not described"),
        ({"a": entry("F31")}, 8, "unknown dtype 'F31'; the nearest is 'F3"),
        ({"a": {**entry(), "dtype": []}}, 8, r"unknown dtype \[\]"),
        ({"a": entry(shape=[-2])}, 8, r"shape \[-2\]"),
        ({"a": entry(shape=[True, 2])}, 8, "tensor a has shape"),
        ({"a": entry(offsets=[0, 8, 9])}, 8, r"offsets \[0, 8, 9\]"),
        ({"a": entry(offsets=[0, 12])}, 12, "takes 8 bytes, but its offsets 0 to 12 span 12"),
        ({"a": entry(offsets=[8, 0])}, 8, "span -8"),
        ({"a": entry(offsets=[0, 8])}, 4, "truncated"),
        ({"a": entry(offsets=[4, 12])}, 12, "tensor a begins at offset 4, where 0 was expected"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "tensor b begins at offset 4, where 8"),
        ({"a": entry(offsets=[10**15, 10**15 + 8])}, 8, "begins at offset 10000000"),
    ],
)  # fmt: skip
def test_headers_that_do_not_fit(header: object, data: int, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        find_tensors(put(tmp_path / "x", assemble(header, bytes(data))))


def shards(directory: Path) -> dict[str, str]:
    """Two shards and their index; what the index maps."""
    tensors = [TensorToWrite(n, t.nbytes, lambda t=t: t) for n, t in TENSORS.items()]
    write_tensors(directory, tensors, max_shard_bytes=33)
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def test_shards(tmp_path: Path):
    weight_map = shards(tmp_path)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert weight_map == {"a.weight": first, "b.weight": first, "c.bias": second}
    found = dict(read_tensors(find_tensors(tmp_path)))
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def test_indexes_that_do_not_fit(tmp_path: Path):
    weight_map = shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    def refused(values: object, message: str) -> None:
        index.write_text(values if isinstance(values, str) else json.dumps(values))
        with pytest.raises(ValueError, match=message):
            find_tensors(tmp_path)

    shard = weight_map["c.bias"]
    refused("{", "index.json is damaged")
    refused({"metadata": {}}, "has no weight_map")
    pairs = ", ".join(f'"{k}": "{v}"' for k, v in [*weight_map.items(), ("c.bias", shard)])
    refused(f'{{"weight_map": {{{pairs}}}}}', "key 'c.bias' comes twice")
    refused({"weight_map": {**weight_map, "c.bias": "../x.safetensors"}}, "a plain file name")
    refused({"weight_map": {**weight_map, "c.bias": 3}}, "a plain file name")
    refused({"weight_map": {**weight_map, "c.bias": [1]}}, r"names the file \[1\]")
    refused({"weight_map": {**weight_map, "d": shard}}, f"puts tensor d into {shard}")
    without = {k: v for k, v in weight_map.items() if k != "b.weight"}
    refused({"weight_map": without}, r"holds tensor b\.weight, which .* does not put there")
    (tmp_path / shard).rename(tmp_path / "elsewhere.safetensors")
    refused({"weight_map": weight_map}, f"shard .*{re.escape(shard)} is missing")
    save_file({"a.weight": TENSORS["a.weight"], "c.bias": TENSORS["c.bias"]}, tmp_path / shard)
    refused({"weight_map": weight_map}, r"tensor a\.weight is in both")


def test_checksums_name_the_file(tmp_path: Path):
    check_checksums(tmp_path)  # nothing to compare with
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    write_checksums(tmp_path)
    check_checksums(tmp_path)
    (tmp_path / "two").write_bytes(b"3")
    with pytest.raises(ValueError, match="two is not the file that was written"):
        check_checksums(tmp_path)
    (tmp_path / "two").unlink()
    with pytest.raises(ValueError, match="two is missing"):
        check_checksums(tmp_path)
    (tmp_path / "checksums.json").write_text('{"algorithm": "md5"}')
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        check_checksums(tmp_path)
