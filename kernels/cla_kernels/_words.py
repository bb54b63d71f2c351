"""How the units of a running kernel hand one another what they found of a row, and join it.

A word is 16 bytes of the GPU's memory, written and read at once, so that whoever reads it knows by
the word itself whether it is there: no flag, no fence, and a single way through the L2. It holds
two results of one query, the log of their softmax's sum, and a mark of 48 bits: of a float32 that
no arithmetic makes, and the lowest eight bits of either result, which is rounded to sixteen. Nobody
clears words beforehand, which would be a kernel of its own: memory does not hold marks by chance,
and a word's only reader clears it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from cla_kernels._softmax import Found, normalised

BYTES = 16
_MARK = 0x7FC5_A3E1  # a NaN
_MARKS = (0x5A, 0xC3)  # the lowest bits of two results
_LOWEST = 0xFF
_NOTHING = -1e30  # log of the sum of a softmax over nothing
_TILE = plgpu.Layout.WGMMA
_SCALAR = plgpu.Layout.WG_SPLAT(())
_WARPS, _LANES = 4, 32  # of a warpgroup, of a warp
_MANY = 8  # parts of a row, from where on lanes share them


@dataclasses.dataclass(frozen=True)
class Handed:
    """How a tile of results, `[C, R]`, lies in words: as a warpgroup holds it in registers.

    Attributes:
        columns: `C`, a multiple of 64.
        rows: `R`, a multiple of 8.
    """

    columns: int
    rows: int

    @property
    def of_thread(self) -> int:
        """Words: of the same query, columns 8 apart."""
        return self.columns // 64 * (self.rows // 8) * 2

    @property
    def words(self) -> int:
        """Of a tile."""
        return _WARPS * _LANES * self.of_thread


def hand_over(words: Any, tile: jax.Array, found: Found, handed: Handed) -> None:
    """Writes what this warpgroup found.

    Args:
        words: reference to the GPU's memory, `[tiles * handed.words, 4]`, int32.
        tile: which.
        found: of a stretch.
        handed: how it lies there.
    """
    log = jnp.where(found.weight > 0, found.largest + jnp.log2(found.weight), _NOTHING)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _TILE, _TILE.reduce(0), _SCALAR))
    def write(_: Any, words: Any, values: Any, logs: Any, tile: Any) -> None:
        values = values.registers.reshape(handed.columns // 64, handed.rows // 8, 2)
        logs = logs.registers.reshape(handed.rows // 8)
        warp, lane = _warp_and_lane()
        word = _add(_mul(_scalar(tile), handed.words), _mul(warp, handed.of_thread * _LANES), lane)
        for i in range(handed.columns // 64):
            for n in range(handed.rows // 8):
                for of_pair in range(2):
                    pair = [_element(values[i, n, j], of_pair) for j in range(2)]
                    _store(_address(words, word), *_marked(pair, _element(logs[n], of_pair)))
                    word = _add(word, _constant(_LANES))

    write(words, normalised(found), log, tile)  # pyright: ignore[reportCallIssue]  # `_` is given


def join(
    words: Any, done: Any, handed: Handed, *, first: jax.Array, step: int, behind: jax.Array,
    parts: jax.Array, number: jax.Array, joiners: jax.Array, row: jax.Array,
) -> None:  # fmt: skip
    """Waits for what all parts of a row have found, and joins this unit's share of it.

    Args:
        words: as in `hand_over`.
        done: reference to results, `[rows of all, rows, C]`, 16 bits.
        handed: how a part's tile lies in words.
        first: tile of the first part.
        step: tiles from one part to the next.
        behind: by how many more the first part's lies behind.
        parts: of the row.
        number: of this unit among those that join it.
        joiners: how many these are.
        row: of the results.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[_SCALAR] * 6))
    def read(_: Any, words: Any, done: Any, *scalars: Any) -> None:
        first, behind, parts, number, joiners, row = map(_scalar, scalars)
        share = _Share(words, done, handed, first, step, behind, parts, number, joiners, row)
        many = _compare("sgt", parts, _constant(_MANY))
        with mgpu.when(many):
            share.join(groups=8, pieces_at_once=1, parts_at_once=16)
        with mgpu.when(_not(many)):
            share.join(groups=1, pieces_at_once=4, parts_at_once=4)

    read(words, done, first, behind, parts, number, joiners, row)  # pyright: ignore[reportCallIssue]


@dataclasses.dataclass(frozen=True)
class _Share:
    """What one unit joins of a row; the arguments of `join` as MLIR's values."""

    words: Any
    done: Any
    handed: Handed
    first: Any
    step: int
    behind: Any
    parts: Any
    number: Any
    joiners: Any
    row: Any

    def join(self, groups: int, pieces_at_once: int, parts_at_once: int) -> None:
        """A warp takes pieces of the tile, groups of its lanes parts: that many at once, each."""
        width = _LANES // groups  # words of a piece
        pieces = self.handed.words // width
        warp, lane = _warp_and_lane()
        group, place = _div(lane, width), _rem(lane, width)
        own, warps = _add(_mul(self.number, _WARPS), warp), _mul(self.joiners, _WARPS)
        every = _mul(warps, pieces_at_once)
        turns = _ceil(_sub(_constant(pieces), own), every)
        batches = _ceil(self.parts, _constant(groups * parts_at_once))

        @_for(turns, [])
        def _(turn: Any, _: list[Any]) -> list[Any]:
            begin = _add(own, _mul2(turn, every))
            mine = [_add(begin, _mul(warps, k)) for k in range(pieces_at_once)]
            here = [_compare("slt", piece, _constant(pieces)) for piece in mine]
            at = [_add(_mul(piece, width), place) for piece in mine]

            def batch(number: Any, carry: list[Any]) -> list[Any]:
                addresses, wanted = [], []
                for u in range(parts_at_once):
                    turn_of_part = _add(_mul(number, parts_at_once), _constant(u))
                    part = _add(_mul(turn_of_part, groups), group)
                    is_first = _compare("eq", part, _constant(0))
                    behind = arith.select(is_first, self.behind, _constant(0))
                    tile = _mul(_add(self.first, _mul(part, self.step), behind), self.handed.words)
                    exists = _compare("slt", part, self.parts)
                    for word, valid in zip(at, here, strict=True):
                        addresses.append(_address(self.words, _add(tile, word)))
                        wanted.append(arith.andi(exists, valid))
                loaded = _await(addresses, wanted)
                for address, want in zip(addresses, wanted, strict=True):
                    with mgpu.when(want):
                        _store(address, *[mgpu.c(0, _integer(64))] * 2)
                carry = list(carry)
                for k in range(pieces_at_once):
                    found = [_unmarked(*word) for word in loaded[k::pieces_at_once]]
                    carry[4 * k : 4 * k + 4] = _joined(carry[4 * k : 4 * k + 4], found)
                return carry

            nothing = [_real(value) for value in (_NOTHING, 0.0, 0.0, 0.0)] * pieces_at_once
            carry = _for(batches, nothing)(batch)
            for k in range(pieces_at_once):
                one = _over_groups(carry[4 * k : 4 * k + 4], width)
                valid = arith.andi(here[k], _compare("eq", group, _constant(0)))
                self._finish(at[k], one, valid)
            return []

    def _finish(self, word: Any, found: list[Any], valid: Any) -> None:
        """Writes the two results of a word."""
        _, rows, columns = ir.MemRefType(self.done.type).shape
        lane, of_tile = _rem(word, _LANES), _div(word, _LANES)
        warp, of_thread = _div(of_tile, self.handed.of_thread), _rem(of_tile, self.handed.of_thread)
        pair, eights = _rem(of_thread, 2), _div(of_thread, 2)
        n, i = _rem(eights, self.handed.rows // 8), _div(eights, self.handed.rows // 8)
        column = _add(_mul(i, 64), _mul(warp, 16), _div(lane, 4))
        row = _add(_mul(n, 8), _mul(_rem(lane, 4), 2), pair)
        valid = arith.andi(valid, _compare("slt", row, _constant(rows)))
        _, total, *sums = found
        element = ir.MemRefType(self.done.type).element_type
        with mgpu.when(valid):
            begin = _add(_mul(_add(_mul(self.row, rows), row), columns), column)
            base = mgpu.utils.memref_ptr(self.done)
            for j, value in enumerate(sums):
                pointer = mgpu.utils.getelementptr(base, [_add(begin, _constant(8 * j))], element)
                llvm.store(arith.truncf(element, arith.divf(value, total)), pointer)


def _await(addresses: list[Any], wanted: list[Any]) -> list[tuple[Any, Any]]:
    """The words, once all that are wanted are marked; of others what is found of nothing."""
    types = [_integer(64)] * (2 * len(addresses))
    loop = scf.WhileOp(types, [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        loaded = [_load(a, w) for a, w in zip(addresses, wanted, strict=True)]
        unmarked = _not(_all([_is_marked(*word) for word in loaded]))
        scf.condition(unmarked, [half for word in loaded for half in word])
    with ir.InsertionPoint(loop.after.blocks.append(*types)):
        scf.yield_([])
    halves = list(loop.results)
    return list(zip(halves[::2], halves[1::2], strict=True))


def _joined(carry: list[Any], found: list[tuple[Any, Any, Any]]) -> list[Any]:
    """Largest log, sum of weights and sums of two results, with some more of them."""
    top, total, *sums = carry
    new = top
    for log, _, _ in found:
        new = arith.maximumf(new, log)
    factor = _exp2(arith.subf(top, new))
    total, sums = arith.mulf(total, factor), [arith.mulf(one, factor) for one in sums]
    for log, *values in found:
        weight = _exp2(arith.subf(log, new))
        total = arith.addf(total, weight)
        sums = [
            arith.addf(one, arith.mulf(weight, value))
            for one, value in zip(sums, values, strict=True)
        ]
    return [new, total, *sums]


def _over_groups(carry: list[Any], width: int) -> list[Any]:
    """Joins what groups of lanes, each `width` wide, have found."""
    top, *sums = carry
    distances = [width << n for n in range(_LANES) if width << n < _LANES]
    new = top
    for distance in distances:
        new = arith.maximumf(new, mgpu.utils.shfl_bfly(new, distance))
    factor = _exp2(arith.subf(top, new))
    sums = [arith.mulf(one, factor) for one in sums]
    for distance in distances:
        sums = [arith.addf(one, mgpu.utils.shfl_bfly(one, distance)) for one in sums]
    return [new, *sums]


def _marked(values: list[Any], log: Any) -> tuple[Any, Any]:
    """A word, in halves."""
    low, high = (
        arith.ori(arith.andi(_bits(value), _constant(~_LOWEST)), _constant(mark))
        for value, mark in zip(values, _MARKS, strict=True)
    )
    return _packed(low, high), _packed(_bits(log), _constant(_MARK))


def _is_marked(low: Any, high: Any) -> Any:
    lowest = mgpu.c(_LOWEST | _LOWEST << 32, _integer(64))
    marks = mgpu.c(_MARKS[0] | _MARKS[1] << 32, _integer(64))
    mark = arith.shrui(high, mgpu.c(32, _integer(64)))
    return arith.andi(
        _compare("eq", arith.andi(low, lowest), marks),
        _compare("eq", mark, mgpu.c(_MARK, _integer(64))),
    )


def _unmarked(low: Any, high: Any) -> tuple[Any, Any, Any]:
    """Log and two results of a word."""
    parts = [_unpacked(low, 0), _unpacked(low, 1)]
    values = [_float(arith.andi(part, _constant(~_LOWEST))) for part in parts]
    return _float(_unpacked(high, 0)), values[0], values[1]


def _store(address: Any, low: Any, high: Any) -> None:
    mgpu.utils.inline_ptx(
        "{ .reg .b128 word; mov.b128 word, {$1, $2}; st.relaxed.gpu.global.b128 [$0], word; }",
        address, low, high, has_side_effects=True,
    )  # fmt: skip


def _load(address: Any, wanted: Any) -> tuple[Any, Any]:
    """A word; where it is not wanted, a marked one that holds nothing."""
    low, high = _marked([_real(0.0), _real(0.0)], _real(_NOTHING))
    wanted = arith.extui(_integer(32), wanted)
    found = mgpu.utils.inline_ptx(
        "{ .reg .b128 word; .reg .pred wanted; setp.ne.s32 wanted, $5, 0; "
        "mov.b64 $0, $3; mov.b64 $1, $4; "
        "@wanted ld.relaxed.gpu.global.b128 word, [$2]; @wanted mov.b128 {$0, $1}, word; }",
        address, low, high, wanted,
        result_types=[_integer(64)] * 2, has_side_effects=True,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found[0], found[1]


def _address(words: Any, word: Any) -> Any:
    base = mgpu.utils.memref_ptr(words)
    return mgpu.utils.getelementptr(base, [_mul(word, BYTES // 4)], _integer(32))


def _warp_and_lane() -> tuple[Any, Any]:
    """Of this thread in its warpgroup."""
    thread = _rem(mgpu.utils.thread_idx(), _WARPS * _LANES)
    return _div(thread, _LANES), _rem(thread, _LANES)


def _for(bound: Any, carry: list[Any]) -> Any:
    return lambda body: mgpu.utils.fori(bound, carry)(body).results


def _all(values: list[Any]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = arith.andi(result, value)
    return result


def _exp2(x: Any) -> Any:
    return mgpu.utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=ir.F32Type.get())


def _element(pair: Any, which: int) -> Any:
    at = ir.DenseI64ArrayAttr.get([which])
    return vector.extract(pair, dynamic_position=[], static_position=at)


def _packed(low: Any, high: Any) -> Any:
    shifted = arith.shli(arith.extui(_integer(64), high), mgpu.c(32, _integer(64)))
    return arith.ori(arith.extui(_integer(64), low), shifted)


def _unpacked(value: Any, which: int) -> Any:
    return arith.trunci(_integer(32), arith.shrui(value, mgpu.c(32 * which, _integer(64))))


def _bits(x: Any) -> Any:
    return arith.bitcast(_integer(32), x)


def _float(x: Any) -> Any:
    return arith.bitcast(ir.F32Type.get(), x)


def _integer(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _scalar(splat: Any) -> Any:
    (value,) = splat.registers.flat
    return value


def _constant(value: int) -> Any:
    return mgpu.c(value, _integer(32))


def _real(value: float) -> Any:
    return mgpu.c(value, ir.F32Type.get())


def _compare(how: str, a: Any, b: Any) -> Any:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)


def _not(x: Any) -> Any:
    return arith.xori(x, mgpu.c(1, _integer(1)))


def _add(first: Any, *others: Any) -> Any:
    for other in others:
        first = arith.addi(first, other)
    return first


def _sub(a: Any, b: Any) -> Any:
    return arith.subi(a, b)


def _mul(a: Any, by: int) -> Any:
    return arith.muli(a, _constant(by))


def _mul2(a: Any, b: Any) -> Any:
    return arith.muli(a, b)


def _div(a: Any, by: int) -> Any:
    return arith.divui(a, _constant(by))


def _rem(a: Any, by: int) -> Any:
    return arith.remui(a, _constant(by))


def _ceil(a: Any, by: Any) -> Any:
    """Quotient of what may be negative, rounded up."""
    return arith.ceildivsi(a, by)
