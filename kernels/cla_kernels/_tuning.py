"""How the work of the Mosaic GPU kernel is cut: a small measured table, and what fits.

The table is by head dim and bytes of an element. To measure another cut, or another GPU: pass a
`Tuning` to `cla_kernels._mosaic_gpu.decode_attention` and time it against the table's, as
`kernels/benchmarks/decode_attention.py` does with `--only`; then change the table.
"""

import dataclasses

import jax.numpy as jnp

TILE_KEYS = 64  # and as many columns: what wgmma multiplies at a time
MOST_ROWS = 64  # of queries to a KV head: T times query heads
MOST_COLUMNS = 256
REDUCTION_BYTES = 2048  # of shared memory, for each worker's reductions
_SHARED_BYTES = 232_448 - REDUCTION_BYTES - 1024  # of a program; barriers take some
_FEWEST_BUSY = 0.15  # of the units
_MOST_JOINED = 16  # parts of a row: joining more takes longer than reading smaller tiles saves


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
        on_device: false for the interpreter, which has no initial accumulators and no overlap of
            launches.
    """

    block: int = 64
    stages: int = 5
    workers: int = 1
    units: int = 132
    on_device: bool = True

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


def tile_rows(queries: int) -> int:
    """Of a tile of queries: wgmma's columns come in eights."""
    return -(-queries // 8) * 8


def tile_columns(head_dim: int) -> int:
    """Of a tile in shared memory: whole tiles of 64."""
    return -(-head_dim // TILE_KEYS) * TILE_KEYS


def tuned(
    rows: int,
    head_dim: int,
    kv_dtype: jnp.dtype,
    row_heads: int,
    size: int,
    tuning: Tuning | None = None,
) -> Tuning:
    """The cut for so many rows of queries (measured: docs/results.md), with as many stages as fit.

    Args:
        rows: of queries to a KV head.
        head_dim: `H`.
        kv_dtype: of the cache.
        row_heads: batch rows times KV heads.
        size: `S`, keys of each.
        tuning: whose stages to fit; default by head dim and dtype.
    """
    rows, columns = tile_rows(rows), tile_columns(head_dim)
    itemsize = jnp.dtype(kv_dtype).itemsize
    eight_bit = itemsize == 1
    if tuning is None:
        tuning = next(t for most, t in _TUNED[eight_bit].items() if head_dim <= most)
        block = tuning.block
        tiles = -(-size // block)
        few = _FEWEST_BUSY * tuning.units
        while block > TILE_KEYS and row_heads * tiles < few and 2 * tiles <= _MOST_JOINED:
            block //= 2
            tiles = -(-size // block)
        tuning = dataclasses.replace(
            tuning, block=block, units=min(tuning.units, row_heads * tiles)
        )
    most = tuning.stages
    # Two have fewer registers each.
    workers = tuning.workers if rows * columns <= 32 * 128 else 1
    # Scores and sums of values of a tile lie in registers.
    block = max(min(tuning.block, (8192 if columns < 256 else 4096) // rows), TILE_KEYS)
    while True:
        fixed = (3 if eight_bit else 2) * rows * columns * 2  # queries, and results of another type
        fixed += workers * (rows * block * 2 + block * columns * 2 * eight_bit)
        if workers > 1:  # for what they merge, and the second's reductions
            fixed += rows * (columns + 2) * 4 + 2 * REDUCTION_BYTES
        tile = block * columns * itemsize + block * 4 * eight_bit
        stages = min(most, (_SHARED_BYTES - fixed) // tile)
        if workers > 1:
            stages = stages // 4 * 4
        if stages >= 3 or block == TILE_KEYS:
            return dataclasses.replace(tuning, block=block, stages=stages, workers=workers)
        block //= 2
