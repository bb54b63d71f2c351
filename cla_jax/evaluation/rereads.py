"""Reading cached K/V twice: at once, or with other layers' between, which the L2 may tell apart.

A chain of `decode_attention` over the layers of one stack, each of which is read twice, alone or
with the products of a layer after every read. Which layer is read when is an argument: the two
orders run the same program over the same bytes and differ in nothing else.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cla_kernels import choose_implementation, decode_attention

__all__ = ["Chain", "CompiledChain", "Heads", "apart", "compile_chain", "per_call", "together"]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Of a layer: `N` query heads, `K` KV heads, head dim `H`; everything is bfloat16."""

    query: int = 16
    kv: int = 1
    dim: int = 128

    @property
    def name(self) -> str:
        """As in `16/1x128`."""
        return f"{self.query}/{self.kv}x{self.dim}"

    def length(self, kv_bytes: int, rows: int) -> int:
        """Tokens of each row, a multiple of 8, whose K/V in one layer are about so many bytes."""
        return max(8, round(kv_bytes / (rows * self.row_bytes * 8)) * 8)

    @property
    def row_bytes(self) -> int:
        """K/V of one token."""
        return 4 * self.kv * self.dim


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is run.

    Attributes:
        heads: of each layer.
        rows: of the batch.
        length: tokens of each row, all valid.
        weight_bytes: of the two products after each read; 0: none.
        layers: in the stack; each is read twice.
        halves: each layer is two in the stack, with half of the rows: the first half is read
            twice, then the second, the layer's products running after each of the four reads.
        weights: arrays for the products, used in turn.
        rounds: times that everything is repeated in one call; the compiler knows them.
    """

    heads: Heads
    rows: int
    length: int
    weight_bytes: int
    layers: int
    halves: bool = False
    weights: int = 0
    rounds: int = 1

    @classmethod
    def of(
        cls,
        heads: Heads,
        rows: int,
        length: int,
        weight_bytes: int,
        *,
        halves: bool = False,
        rotation: float = 180e6,
        most_layers: int = 96,
        seconds: float = 4e-3,
        rate: float = 4e12,
        fewest: float = 5e-6,
    ) -> "Chain":
        """A chain that is long enough to measure, of enough layers and weights.

        Args:
            heads: of each layer.
            rows: of the batch.
            length: tokens of each row.
            weight_bytes: of the products after each read.
            halves: of the batch, in turn.
            rotation: bytes that are read between two reads of one layer `apart`, and before weights
                are read again: three times an L2 of 60 MB, which may keep some lines for longer
                than others.
            most_layers: whatever `rotation` asks for; each is two calls in the program.
            seconds: of one call of the program, about.
            rate: bytes a second, to guess by.
            fewest: seconds of a kernel, to guess by.
        """
        kv = rows * length * heads.row_bytes
        layers = min(max(2, math.ceil(rotation / (kv + weight_bytes))), most_layers)
        weights = 0
        if weight_bytes:
            weights = min(max(4, math.ceil(rotation / weight_bytes / 2) * 2), most_layers)
        reads = 2 * layers * (2 if halves else 1)
        read = max(kv / (2 if halves else 1) / rate, fewest)
        products = 2 * max(weight_bytes / 2 / rate, fewest) if weight_bytes else 0.0
        rounds = max(1, round(seconds / (reads * (read + products))))
        return cls(heads, rows, length, weight_bytes, layers, halves, weights, rounds)

    @property
    def kv_bytes(self) -> int:
        """That one read of one layer reads."""
        return self.rows * self.length * self.heads.row_bytes

    @property
    def reads(self) -> int:
        """Calls of `decode_attention` in a round."""
        return 2 * self.layers * (2 if self.halves else 1)

    @property
    def parts(self) -> tuple[int, int]:
        """Entries of the stack, and rows of each."""
        return (2 * self.layers, self.rows // 2) if self.halves else (self.layers, self.rows)

    @property
    def width(self) -> int:
        """Of what the products make of an attention output, between them: a multiple of 64."""
        return max(1, round(self.weight_bytes / (4 * 64 * self.heads.query * self.heads.dim))) * 64

    def weights_of(self, read: int) -> int:
        """Which weights follow a read: both halves of a layer have the same."""
        number = read // 4 * 2 + read % 2 if self.halves else read
        return number % self.weights


def together(chain: Chain) -> np.ndarray:
    """Every entry of the stack twice at once, as an owner and its reader do: int32 `[reads]`."""
    return np.repeat(np.arange(chain.parts[0], dtype=np.int32), 2)


def apart(chain: Chain) -> np.ndarray:
    """The whole stack once, then once again: every read is of K/V that are long gone."""
    return np.tile(np.arange(chain.parts[0], dtype=np.int32), 2)


def _program(chain: Chain) -> Callable[..., jax.Array]:
    heads = chain.heads

    @jax.jit  # traced and lowered once for all reads
    def read(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, at: Any) -> jax.Array:
        return decode_attention(q, k, v, lengths, layer=at)

    def program(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        lengths: jax.Array,
        weights: tuple[tuple[jax.Array, jax.Array], ...],
        order: jax.Array,
    ) -> jax.Array:
        slots = [order[number] for number in range(chain.reads)]  # taken apart before the loop

        def once(_: Any, q: jax.Array) -> jax.Array:
            for number, slot in enumerate(slots):
                q = read(q, k, v, lengths, slot)
                if weights:
                    into, out = weights[chain.weights_of(number)]
                    q = ((q.reshape(q.shape[0], heads.query * heads.dim) @ into) @ out).reshape(
                        q.shape
                    )
            return q

        return jax.lax.fori_loop(0, chain.rounds, once, q)

    return program


@dataclasses.dataclass(frozen=True)
class CompiledChain:
    """A chain ready to run.

    Attributes:
        chain: what it runs.
        compiled: the program.
        implementation: of `decode_attention`.
    """

    chain: Chain
    compiled: Any
    implementation: str

    def runner(self) -> Callable[[np.ndarray, int], float]:
        """Makes random inputs; returns `(order, calls) -> seconds` of calls one behind another."""
        structs = _structs(self.chain)

        @jax.jit
        def make(key: jax.Array) -> Any:
            leaves, tree = jax.tree.flatten(structs[:3])
            keys = jax.random.split(key, len(leaves))
            made = [
                # A row of random K/V for all rows and layers, which takes little memory to make.
                jnp.broadcast_to(
                    jax.random.normal(k, (1,) * (s.ndim - 3) + s.shape[-3:], s.dtype), s.shape
                )
                for k, s in zip(keys, leaves, strict=True)
            ]
            weights = [
                tuple(
                    # Values of their own: arrays that are alike might be made one.
                    jax.random.normal(jax.random.fold_in(key, 2 * number + side), s.shape, s.dtype)
                    / s.shape[0] ** 0.5
                    for side, s in enumerate(pair)
                )
                for number, pair in enumerate(structs[4])
            ]
            return *jax.tree.unflatten(tree, made), tuple(weights)

        q, k, v, weights = make(jax.random.key(0))
        lengths = jnp.full(structs[3].shape, self.chain.length, jnp.int32)

        def run(order: np.ndarray, calls: int) -> float:
            nonlocal q
            given = jnp.asarray(order)
            jax.block_until_ready((q, k, v, weights, given))
            began = time.perf_counter()
            for _ in range(calls):
                q = self.compiled(q, k, v, lengths, weights, given)
            jax.block_until_ready(q)
            return time.perf_counter() - began

        return run


def _structs(chain: Chain) -> tuple[Any, ...]:
    heads, (entries, rows) = chain.heads, chain.parts
    kv = jax.ShapeDtypeStruct((entries, rows, chain.length, heads.kv, heads.dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((rows, 1, heads.query, heads.dim), jnp.bfloat16)
    width = heads.query * heads.dim
    pair = (
        jax.ShapeDtypeStruct((width, chain.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((chain.width, width), jnp.bfloat16),
    )
    lengths, order = (
        jax.ShapeDtypeStruct((size,), jnp.int32) for size in (rows, chain.reads)
    )  # fmt: skip
    return q, kv, kv, lengths, (pair,) * chain.weights, order


def compile_chain(chain: Chain) -> CompiledChain:
    """Compile it; nothing is allocated.

    Raises:
        ValueError: an odd number of rows to halve.
    """
    if chain.halves and chain.rows % 2:
        raise ValueError(f"{chain.rows} rows cannot be halved: expected an even number")
    structs = _structs(chain)
    compiled = jax.jit(_program(chain)).lower(*structs).compile()
    return CompiledChain(chain, compiled, choose_implementation(structs[0], structs[1])[0])


def per_call(
    runs: dict[str, Callable[[int], float]], *, more: int = 5, repeats: int = 5
) -> dict[str, tuple[float, ...]]:
    """Seconds of a call, each time from the slope between one and `more` calls.

    What is compared is measured in turn, so that it meets the same clock rates.

    Args:
        runs: by name: `calls -> seconds`.
        more: calls, at least 2.
        repeats: slopes of each.
    """
    for run in runs.values():
        run(1)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            one = statistics.median(run(1) for _ in range(2))
            found[name].append((run(more) - one) / (more - 1))
    return {name: tuple(values) for name, values in found.items()}
