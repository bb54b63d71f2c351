"""Sizes as people write them."""

import pytest

from cla_jax.inference import sizes

GB = 10**9


@pytest.mark.parametrize(
    ("text", "count"),
    [("141GB", 141 * GB), ("80GiB", 80 * 2**30), ("1 kB", 1000), ("1.5KiB", 1536),
     ("150_754_820_096", 150_754_820_096), ("1,000", 1000), (" 12 B ", 12), ("0.1TB", 10**11)],
)  # fmt: skip
def test_sizes(text, count):
    assert sizes.parse_size(text) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no size: expected 141GB"), ("GB", "no size"), ("-1GB", "no size"), ("1e9", "no size"),
     ("nan", "no size"), ("0", "out of range"), ("0.4", "out of range"), ("2000000TB", "10\\^18"),
     ("141Gb", "nearest is 'GB'"), ("141gib", "nearest is 'GiB'"), ("141G", "nearest is 'GB'"),
     ("4TB/s", "no size")],
)  # fmt: skip
def test_sizes_refuse(text, message):
    with pytest.raises(ValueError, match=message):
        sizes.parse_size(text)


def test_bandwidths():
    assert sizes.parse_bandwidth("4.47TB/s") == sizes.parse_bandwidth("4.47TB") == 4470 * GB
    with pytest.raises(ValueError, match=r"'4.47Tb/s': unknown unit 'Tb'.*4.47TB/s"):
        sizes.parse_bandwidth("4.47Tb/s")


def test_formatted_sizes():
    counts = (999_999, 5 * 10**6, 2_684_354_560, 141 * GB, 12 * 10**12)
    shown = ["999,999 B", "5.00 MB", "2.68 GB", "141.0 GB", "12.0 TB"]
    assert [sizes.format_size(count) for count in counts] == shown
