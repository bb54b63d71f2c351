"""How the work of the Mosaic GPU kernel is cut: a small measured table, and what fits.

The table is by head dim and bytes of an element. `kernels/benchmarks/tune_decode.py` times other
cuts beside the table's, on this GPU or another, and says which is the best for each entry.
"""

import dataclasses

import jax.numpy as jnp

TILE_KEYS = 64  # and as many columns: what wgmma multiplies at a time
MOST_ROWS = 64  # of queries to a KV head: T times query heads
MOST_COLUMNS = 256
REDUCTION_BYTES = 2048  # of shared memory, for each worker's reductions
_SHARED_BYTES = 232_448  # that a program may have
_ALIGNED = 1024  # bytes: every array in it begins at a multiple
_FEWEST_STAGES = 3
_FEWEST_BUSY = 0.45  # of the units: with fewer, smaller tiles are faster


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work of the Mosaic GPU kernel is cut.

    Attributes:
        block: keys of a tile: a multiple of 64.
        stages: tiles of K or V in flight.
        workers: warpgroups that multiply: one, or two that take tiles in turn, for which `stages`
            is a multiple of four.
        units: programs, one on a multiprocessor, at most (more KV heads: one of each); each reads
            a stretch of a KV head's order.
        whole: whether no row is cut, however unequal they are: then nothing is left to combine, and
            the second kernel is not launched. Only for short caches: the longest row is one unit's.
        on_device: false for the interpreter, which has no initial accumulators and no overlap of
            launches.

    Raises:
        ValueError: a number that the kernel cannot work with.
    """

    block: int = 64
    stages: int = 5
    workers: int = 1
    units: int = 132
    whole: bool = False
    on_device: bool = True

    def __post_init__(self) -> None:
        if self.block < TILE_KEYS or self.block % TILE_KEYS:
            nearest = max(round(self.block / TILE_KEYS), 1) * TILE_KEYS
            raise ValueError(
                f"block {self.block}: expected a positive multiple of {TILE_KEYS}; the nearest is "
                f"{nearest}"
            )
        if self.workers not in (1, 2):
            raise ValueError(f"workers {self.workers}: expected 1 or 2")
        if self.stages < _FEWEST_STAGES:
            raise ValueError(f"stages {self.stages}: expected at least {_FEWEST_STAGES}")
        if self.workers == 2 and self.stages % 4:
            raise ValueError(
                f"stages {self.stages}: with two workers expected a multiple of 4; the nearest is "
                f"{(self.stages + 1) // 4 * 4}"
            )
        if self.units < 1:
            raise ValueError(f"units {self.units}: expected at least 1")

    def parts(self, kv_heads: int) -> int:
        """Units of a KV head."""
        return max(self.units // kv_heads, 1)


# By the most columns of a head, with more stages than fit. Caches of 16 bits, then of 8.
_TUNED = (
    {
        64: Tuning(block=256, stages=5),
        128: Tuning(block=128, stages=6),
        256: Tuning(block=128, stages=4),
    },
    {
        64: Tuning(block=128, stages=12, workers=2),
        128: Tuning(block=128, stages=8, workers=2),
        256: Tuning(block=64, stages=8, workers=2),
    },
)


def table_entry(head_dim: int, kv_dtype: jnp.dtype) -> tuple[int, Tuning]:
    """The table's entry for such a cache: the most columns that it is for, and the cut."""
    table = _TUNED[jnp.dtype(kv_dtype).itemsize == 1]
    return next((most, cut) for most, cut in table.items() if head_dim <= most)


def tile_rows(queries: int) -> int:
    """Of a tile of queries: wgmma's columns come in eights."""
    return -(-queries // 8) * 8


def tile_columns(head_dim: int) -> int:
    """Of a tile in shared memory: whole tiles of 64."""
    return -(-head_dim // TILE_KEYS) * TILE_KEYS


def through_registers(head_dim: int, kv_dtype: jnp.dtype) -> bool:
    """Whether tiles of K/V are not multiplied from where they were loaded.

    8 bits are widened; and wide heads that no 16 divides cannot be swizzled as they are loaded.
    """
    return jnp.dtype(kv_dtype).itemsize == 1 or (head_dim > TILE_KEYS and head_dim % 16 != 0)


def tuned(
    rows: int,
    head_dim: int,
    kv_dtype: jnp.dtype,
    row_heads: int,
    size: int,
    tuning: Tuning | None = None,
    *,
    result_apart: bool = False,
) -> Tuning:
    """The cut for so many rows of queries (measured: docs/results.md), with as many stages as fit.

    Args:
        rows: of queries to a KV head.
        head_dim: `H`.
        kv_dtype: of the cache.
        row_heads: batch rows times KV heads.
        size: `S`, keys of each.
        tuning: to be made fit; default by head dim and dtype.
        result_apart: whether results are of another type than queries as they are multiplied.
    """
    rows, columns = tile_rows(rows), tile_columns(head_dim)
    if tuning is None:
        _, tuning = table_entry(head_dim, kv_dtype)
        block = tuning.block
        tiles = -(-size // block)
        few = _FEWEST_BUSY * tuning.units
        while block > TILE_KEYS and row_heads * tiles < few:
            block //= 2
            tiles = -(-size // block)
        units = max(min(tuning.units, row_heads * tiles), 1)
        tuning = dataclasses.replace(tuning, block=block, units=units)
    # Two have fewer registers each.
    workers = tuning.workers if rows * columns <= 32 * 128 else 1
    # Scores and sums of values of a tile lie in registers.
    block, most = tuning.block, (8192 if columns < 256 else 4096) // rows
    while block > most and block > TILE_KEYS:
        block = _half(block)
    while True:
        step = 4 if workers > 1 else 1
        for stages in range(tuning.stages // step * step, _FEWEST_STAGES - 1, -step):
            cut = dataclasses.replace(tuning, block=block, stages=stages, workers=workers)
            if _shared_bytes(rows, head_dim, kv_dtype, cut, result_apart) <= _SHARED_BYTES:
                return cut
        if block > TILE_KEYS:
            block = _half(block)
        elif workers > 1:
            workers = 1
        else:
            raise ValueError(f"{rows} rows of {columns} columns do not fit in shared memory")


def _shared_bytes(
    rows: int, head_dim: int, kv_dtype: jnp.dtype, cut: Tuning, result_apart: bool
) -> int:
    """That a program with this cut takes: `_shared.scratch`, and what reductions need."""
    columns, itemsize = tile_columns(head_dim), jnp.dtype(kv_dtype).itemsize
    block, stages, workers = cut.block, cut.stages, cut.workers
    arrays = [
        2 * rows * columns * 2,  # queries
        stages * block * columns * itemsize,
        workers * rows * block * 2,  # weights
        REDUCTION_BYTES,
    ]
    if workers > 1:  # what they merge, and the second's reductions
        arrays += [columns * rows * 4, rows * 4, rows * 4, REDUCTION_BYTES]
    if through_registers(head_dim, kv_dtype):
        arrays.append(workers * block * columns * 2)
    if itemsize == 1:
        arrays.append(stages * block * 4)  # scales
    if result_apart:
        arrays.append(rows * columns * 2)
    barriers = 4 + 2 * stages + 2 * (workers > 1)
    return sum(-(-array // _ALIGNED) * _ALIGNED for array in arrays) + 8 * barriers


def _half(block: int) -> int:
    """Of its tiles of wgmma."""
    return block // TILE_KEYS // 2 * TILE_KEYS
