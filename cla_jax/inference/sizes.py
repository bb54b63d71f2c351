"""Sizes and bandwidths as people write them, `141GB` or `4.47TB/s`, and back."""

import difflib
import re
from decimal import Decimal

__all__ = ["format_size", "parse_bandwidth", "parse_size"]

_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip
_LARGEST_SIZE = 10**18


def parse_size(text: str) -> int:
    """Bytes of `141GB` (10^9 each), `80GiB` (2^30) or a whole number.

    Raises:
        ValueError: anything else; names what is expected and, for a unit, the nearest.
    """
    return _parse(text, text, "141GB (10^9 bytes each), 80GiB (2^30) or a whole number of bytes")


def parse_bandwidth(text: str) -> int:
    """Bytes per second of `4.47TB/s`; the `/s` may be left out.

    Raises:
        ValueError: as `parse_size`.
    """
    return _parse(text, text.strip().removesuffix("/s"), "4.47TB/s (10^12 bytes each) or 900GiB/s")


def format_size(count: int) -> str:
    """`5,120 B`, `2.68 GB`: in powers of ten, to three digits or more."""
    for unit in ("TB", "GB", "MB"):
        if count >= _UNITS[unit]:
            value = count / _UNITS[unit]
            return f"{value:,.{2 if value < 10 else 1}f} {unit}"
    return f"{count:,} B"


def _parse(text: str, size: str, expected: str) -> int:
    match = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None:
        raise ValueError(f"{text!r} is no size: expected {expected}")
    number, unit = match[1].replace(",", "").replace("_", ""), match[2] or "B"
    if unit not in _UNITS:
        lower = {known.lower(): known for known in _UNITS if known != "kB"}
        near = difflib.get_close_matches(unit.lower(), lower, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{text!r}: unknown unit {unit!r}, expected {expected}; the nearest is {lower[near]!r}"
        )
    count = Decimal(number) * _UNITS[unit]
    if not 1 <= count < _LARGEST_SIZE:
        raise ValueError(f"{text!r} is out of range: expected 1 byte to 10^18, such as {expected}")
    return int(count)
