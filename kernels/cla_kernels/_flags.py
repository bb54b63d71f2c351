"""How the units of a running kernel learn that others have written what they found.

A flag is 64 bits in the GPU's memory: one unit, told by one other. Nobody clears them beforehand,
which would be a kernel of its own: raised is a word that memory does not hold by chance (as two
float32, NaNs that no arithmetic makes), and whoever has seen a flag lowers it. So a flag is for one
pair of units and one meeting.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

WORDS = 2  # int32, of a flag
_RAISED = 0x7FC5_A3E1_FFD9_4B67
_THREADS = 128  # of a warpgroup
_SCALAR = plgpu.Layout.WG_SPLAT(())


def raise_flags(flags: Any, first: jax.Array, others: jax.Array, step: int, count: Any) -> None:
    """Tells `count` units that all that this warpgroup has written can be read.

    Args:
        flags: reference to the GPU's memory, `[flags, 2]`, int32.
        first: the flag of the first of them.
        others: where the other flags would begin, `step` apart, if the first were one of them.
        step: between the flags of two units.
        count: of units, at most 128.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR))
    def tell(_: Any, flags: Any, first: Any, others: Any, count: Any) -> None:
        thread = _thread()
        others = arith.addi(_scalar(others), arith.muli(thread, _constant(step)))
        flag = arith.select(_compare("eq", thread, _constant(0)), _scalar(first), others)
        mgpu.utils.warpgroup_barrier()  # everyone has written
        with mgpu.when(_compare("slt", thread, _scalar(count))):
            mgpu.utils.inline_ptx(
                "st.release.gpu.global.b64 [$0], $1;",
                _address(flags, flag), _raised(), has_side_effects=True,
            )  # fmt: skip

    tell(flags, first, others, count)  # pyright: ignore[reportCallIssue]  # `_` is given


def await_flags(flags: Any, first: jax.Array, count: jax.Array, most: int) -> None:
    """Waits until `count` flags in a row are raised, and lowers them.

    Behind it what those who raised them have written can be read.

    Args:
        flags: as in `raise_flags`.
        first: of the flags.
        count: of flags.
        most: that `count` may be.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
    def wait(_: Any, flags: Any, first: Any, count: Any) -> None:
        for turn in range(math.ceil(most / _THREADS)):
            number = arith.addi(_thread(), _constant(turn * _THREADS))
            with mgpu.when(_compare("slt", number, _scalar(count))):
                address = _address(flags, arith.addi(_scalar(first), number))
                _spin(lambda address=address: _is_lowered(address))
                # Behind the loop: loads that acquire would each empty the multiprocessor's L1.
                mgpu.utils.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)
                mgpu.utils.inline_ptx(
                    "st.relaxed.gpu.global.b64 [$0], $1;",
                    address, mgpu.c(0, ir.IntegerType.get_signless(64)), has_side_effects=True,
                )  # fmt: skip
        mgpu.utils.warpgroup_barrier()

    wait(flags, first, count)  # pyright: ignore[reportCallIssue]  # `_` is given


def _spin(again: Callable[[], Any]) -> None:
    loop = scf.WhileOp([], [])
    with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
        scf.condition(again(), [])
    with ir.InsertionPoint.at_block_begin(loop.after.blocks.append()):
        scf.yield_([])


def _is_lowered(address: Any) -> Any:
    found = mgpu.utils.inline_ptx(
        "ld.relaxed.gpu.global.b64 $0, [$1];",
        address, result_types=ir.IntegerType.get_signless(64), has_side_effects=True,
    )  # fmt: skip
    return _compare("ne", found, _raised())


def _raised() -> Any:
    return mgpu.c(_RAISED, ir.IntegerType.get_signless(64))


def _address(flags: Any, flag: Any) -> Any:
    return mgpu.utils.getelementptr(
        mgpu.utils.memref_ptr(flags), [flag], ir.IntegerType.get_signless(64)
    )


def _thread() -> Any:
    """Of the warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), _constant(_THREADS))


def _scalar(splat: Any) -> Any:
    (value,) = splat.registers.flat
    return value


def _constant(value: int) -> Any:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _compare(how: str, a: Any, b: Any) -> Any:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)
