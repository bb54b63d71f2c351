"""Which calls `decode_attention.py` times: their shapes, lengths and bytes. Imports no JAX."""

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence

BATCHES = (1, 4, 16, 64, 256)
CACHE_LENGTHS = (512, 4096, 8192, 32768, 131072)
HEADS = ((16, 1), (32, 1), (32, 8), (32, 4))  # query heads, KV heads
HEAD_DIMS = (64, 128, 256)
BITS8 = ("int8", "e4m3")
SMALLEST, LARGEST = 1_000_000, 2_200_000_000  # bytes of K/V that a call reads
SKEW = 64  # the long row has this many times the tokens of each other row
_PAGE = 128  # a cache that is not full is allocated in these


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """One call: `B` rows of `S` cached tokens, `N` query heads on `K` KV heads of dimension `H`.

    `dtype` is the cache's: `bf16`, `int8` or `e4m3`; queries are bfloat16. A skewed batch has the
    same `B * S` tokens, but one row (the middle one) has 64 times as many as each of the others. In
    a ragged one every row has `ragged` tokens less than its cache has room for, so that the last
    tile is not full, as in nearly every step of a generation.
    """

    B: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "bf16"
    skewed: bool = False
    ragged: int = 0

    def __post_init__(self) -> None:
        if self.ragged and (self.skewed or not 0 < self.ragged < self.S):
            raise ValueError(f"ragged {self.ragged}: expected 1 to S - 1, of a batch not skewed")

    @property
    def name(self) -> str:
        suffix = "-skewed" if self.skewed else f"-ragged{self.ragged}" if self.ragged else ""
        return f"B{self.B}-S{self.S}-N{self.N}-K{self.K}-H{self.H}-{self.dtype}{suffix}"

    @property
    def full(self) -> bool:
        """Whether every row is."""
        return not (self.skewed or self.ragged)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Valid tokens of each row; they add up to `B * S`, less what is ragged."""
        if not self.skewed:
            return (self.S - self.ragged,) * self.B
        short = self.B * self.S // (self.B - 1 + SKEW)
        rows = [short] * self.B
        rows[self.B // 2] = self.B * self.S - short * (self.B - 1)
        return tuple(rows)

    @property
    def capacity(self) -> int:
        """Tokens that each row's cache has room for."""
        return -(-max(self.lengths) // _PAGE) * _PAGE if self.skewed else self.S

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token, with the scales of an 8-bit cache (a float32 a KV head each)."""
        return 2 * self.K * (self.H + 4 if self.dtype in BITS8 else 2 * self.H)

    @property
    def kv_bytes(self) -> int:
        """What a call must read: valid K and V."""
        return self.B * (self.S - self.ragged) * self.bytes_per_token

    @property
    def cache_bytes(self) -> int:
        """What one layer's cache takes."""
        return self.B * self.capacity * self.bytes_per_token


def layers_of(shape: Shape, rotation: int, most_layers: int, most_bytes: int) -> int:
    """How many layers' caches are read in turn: `rotation` bytes of them, and two at least.

    Fewer than two only where two would take more than `most_bytes`.
    """
    wanted = max(2, -(-rotation // shape.kv_bytes))
    return max(1, min(wanted, most_layers, most_bytes // shape.cache_bytes))


MQA, LARGE_MQA, SMALL_MQA = (16, 1, 128), (32, 1, 128), (32, 1, 64)
GQA4, GQA8 = (32, 8, 128), (32, 4, 128)

GOALS = (
    Shape(1, 8192, *MQA),  # 4 MB
    Shape(1, 32768, *MQA),  # 17 MB
    Shape(1, 131072, *MQA),  # 67 MB
    Shape(64, 4096, *MQA),  # 134 MB
    Shape(64, 8192, *SMALL_MQA),  # 134 MB
    Shape(256, 8192, *SMALL_MQA),  # 537 MB
    Shape(64, 8192, *MQA),  # 268 MB
    Shape(4, 131072, *MQA),  # 268 MB
    Shape(16, 8192, *GQA4),  # 537 MB
    Shape(256, 8192, *MQA),  # 1.1 GB
    Shape(64, 8192, *MQA, "int8"),
    Shape(64, 8192, *MQA, "e4m3"),
    Shape(16, 8192, *GQA4, "int8"),
    Shape(64, 8192, *MQA, skewed=True),
    Shape(16, 8192, *GQA4, skewed=True),
)
SKEWED = tuple(
    Shape(B, S, *heads, skewed=True)
    for B, S, heads in (
        (64, 8192, MQA), (16, 8192, GQA4), (64, 8192, SMALL_MQA), (16, 8192, MQA),
        (16, 32768, MQA), (16, 8192, GQA8),
    )
)  # fmt: skip
RAGGED = tuple(
    Shape(B, S, *heads, ragged=57)
    for B, S, heads in ((64, 8192, MQA), (256, 512, MQA), (16, 8192, GQA4))
)
E4M3 = tuple(
    Shape(B, S, *heads, "e4m3")
    for B, S, heads in (
        (1, 131072, MQA), (64, 8192, MQA), (4, 131072, MQA), (16, 8192, GQA4), (64, 8192, SMALL_MQA)
    )
)  # fmt: skip


def _in_range(shapes: Sequence[Shape]) -> list[Shape]:
    return [shape for shape in shapes if SMALLEST <= shape.kv_bytes <= LARGEST]


def _grid(
    batches: Sequence[int], lengths: Sequence[int], heads: tuple[int, int, int], dtype: str = "bf16"
) -> list[Shape]:
    return [Shape(B, S, *heads, dtype) for B, S in itertools.product(batches, lengths)]


def full_shapes() -> list[Shape]:
    """Every batch, length, head count and head dim, in bf16 and int8; some e4m3, skewed, ragged."""
    grid = [
        Shape(B, S, *heads, H, dtype)
        for dtype, heads, H, B, S in itertools.product(
            ("bf16", "int8"), HEADS, HEAD_DIMS, BATCHES, CACHE_LENGTHS
        )
    ]
    return _unique([*GOALS, *_in_range(grid), *E4M3, *SKEWED, *RAGGED])


def standard_shapes() -> list[Shape]:
    """About a hundred of the full set.

    MQA of 16 heads with head dim 128, MQA of 32 with 64 and GQA of 4 and 8 heads with 128 at every
    length and batch 1, 16 and 64 (MQA with head dim 128: every batch); the other head dims and
    counts, and the 8-bit caches, at two or three sizes each; skewed and ragged ones; all goals.
    """
    some, few = (1, 16, 64), (4096, 32768)
    shapes = [
        *_grid(BATCHES, CACHE_LENGTHS, MQA),
        *_grid(some, CACHE_LENGTHS, SMALL_MQA),
        *_grid(some, CACHE_LENGTHS, GQA4),
        *_grid(some, (512, 8192, 131072), GQA8),
        *_grid((4, 64), few, LARGE_MQA),
        *_grid((4, 64), few, (16, 1, 64)),
        *_grid((1, 16), few, (16, 1, 256)),
        *_grid((4, 64), (8192,), (32, 1, 256)),
        *_grid((4, 64), (4096,), (32, 8, 64)),
        *_grid((16,), few, (32, 4, 64)),
        *_grid((4, 64), (4096,), (32, 8, 256)),
        *_grid((16,), (8192,), (32, 4, 256)),
        *_grid((1, 16, 64), (8192, 131072), MQA, "int8"),
        *_grid((64,), (4096, 8192, 32768), SMALL_MQA, "int8"),
        *_grid((16,), (4096, 8192, 32768), GQA4, "int8"),
        *_grid((16,), (8192,), (16, 1, 256), "int8"),
    ]
    return _unique([*GOALS, *_in_range(shapes), *E4M3, *SKEWED, *RAGGED])


def smoke_shapes() -> list[Shape]:
    """For a processor, in seconds."""
    return [
        Shape(2, 64, 4, 1, 16),
        Shape(3, 96, 4, 2, 8, skewed=True),
        Shape(2, 32, 4, 1, 16, "int8"),
    ]


def _unique(shapes: Sequence[Shape]) -> list[Shape]:
    return list(dict.fromkeys(shapes))


SETS = {"goals": lambda: list(GOALS), "standard": standard_shapes, "full": full_shapes}


def select(shapes: Sequence[Shape], only: Sequence[str]) -> list[Shape]:
    """Those whose name matches one of the shell patterns `only`; all if there is none.

    Raises:
        ValueError: a pattern that matches none of `shapes`.
    """
    for pattern in only:
        if not any(fnmatch.fnmatchcase(shape.name, pattern) for shape in shapes):
            raise ValueError(
                f"--only {pattern!r} matches none of {len(shapes)} shapes; expected a shell "
                f"pattern of names such as {shapes[0].name!r}, for example 'B64-*-H128-bf16'"
            )
    return [
        shape
        for shape in shapes
        if not only or any(fnmatch.fnmatchcase(shape.name, pattern) for pattern in only)
    ]
