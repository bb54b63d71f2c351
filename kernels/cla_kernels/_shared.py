"""The first kernel's problem, and what its warpgroups share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from cla_kernels._tuning import TILE_KEYS, Tuning, through_registers, tile_columns, tile_rows


class Cached(NamedTuple):
    """Stacked K/V: `[G, B, S, K, H]`, and of 8-bit ones their scales, float32 `[G, B, K, S]`."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every program of the first kernel knows when it is compiled.

    Attributes:
        queries: `T` of a row.
        heads: query heads of a KV head.
        head_dim: `H`.
        size: `S` of the cache.
        scale: of the scores.
        dtype: in which tiles are multiplied.
        kv_dtype: of the cache.
        result_dtype: of results.
        tuning: how the work is cut.
    """

    queries: int
    heads: int
    head_dim: int
    size: int
    scale: float
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    result_dtype: jnp.dtype
    tuning: Tuning

    @property
    def rows(self) -> int:
        """Of a tile of queries."""
        return tile_rows(self.queries * self.heads)

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return tile_columns(self.head_dim)

    @property
    def through_registers(self) -> bool:
        """Whether K reaches the product from registers, and V by another place."""
        return through_registers(self.head_dim, self.kv_dtype)

    @property
    def piece(self) -> int:
        """Keys of a tile that are multiplied at once: a whole tile would exceed the registers."""
        return TILE_KEYS if self.through_registers else self.tuning.block

    @property
    def scale2(self) -> float:
        """Of scores times log2 e: exp2 is the GPU's own."""
        return self.scale * math.log2(math.e)


class Merging(NamedTuple):
    """Where the second worker leaves its share of a stretch, for the first to take."""

    sums: Any  # [C, R]
    largest: Any  # [R]
    weight: Any  # [R]
    given: Any  # barriers
    free: Any


class Shared(NamedTuple):
    """Shared memory and barriers of a program: of `scratch` the types, in the kernel references.

    K and V lie in a ring of tiles, K of a block and then its V, which the loading warpgroup fills;
    queries in two places, for the stretch that is worked on and the next.
    """

    q_full: Any
    q_empty: Any
    full: Any
    empty: Any
    q: Any  # [2, R, C]
    kv: Any  # [stages, block, C]
    weights: Any  # [workers, R, block]
    merging: Merging | None  # of two workers
    copied_v: Any = None  # [workers, block, C], of tiles that go through registers
    copied_k: Any = None  # likewise, for the interpreter, which multiplies from memory alone
    scales: Any = None  # [stages, block], of 8-bit tiles
    result: Any = None  # [R, C], where it is of another type than queries


def scratch(problem: Problem) -> Shared:
    """What a program shares, as types."""
    tuning, rows, width = problem.tuning, problem.rows, problem.width
    H, block, stages, workers = problem.head_dim, tuning.block, tuning.stages, tuning.workers
    eight_bit = problem.kv_dtype.itemsize == 1
    # Operands of one product must be swizzled alike.
    swizzle = plgpu.find_swizzle(H * problem.dtype.itemsize * 8) if H > 64 and H % 16 == 0 else 128

    def tiles(*shape: int, dtype: Any = problem.dtype, swizzle: int = swizzle) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=_transforms(dtype, swizzle))

    ring = stages, block, width
    if eight_bit:
        swizzle8 = plgpu.find_swizzle(H * 8) if H > 128 else min(width, 128)
        kv = tiles(*ring, dtype=problem.kv_dtype, swizzle=swizzle8)
    else:
        kv = tiles(*ring, swizzle=16) if problem.through_registers else tiles(*ring)
    merging, optional = None, {}
    if workers > 1:
        merging = Merging(
            plgpu.SMEM((width, rows), jnp.float32),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(),
        )
    if problem.through_registers:
        optional["copied_v"] = tiles(workers, block, width)
        if not tuning.on_device:
            optional["copied_k"] = tiles(workers, block, width)
    if eight_bit:
        optional["scales"] = plgpu.SMEM((stages, block), jnp.float32)
    if problem.result_dtype != problem.dtype:
        optional["result"] = tiles(rows, width, dtype=problem.result_dtype)
    return Shared(
        q_full=plgpu.Barrier(num_barriers=2),
        q_empty=plgpu.Barrier(num_barriers=2, num_arrivals=workers),
        full=plgpu.Barrier(num_barriers=stages, num_arrivals=2 if eight_bit else 1),
        empty=plgpu.Barrier(num_barriers=stages),
        q=tiles(2, rows, width),
        kv=kv,
        weights=tiles(workers, rows, block),
        merging=merging,
        **optional,
    )


def _transforms(dtype: Any, swizzle: int) -> Sequence[Any]:
    # Their base class declares methods that they get elsewhere. 16 bytes are not swizzled.
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    if swizzle == 16:
        return (tiling,)
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
