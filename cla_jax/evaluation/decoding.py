"""What a decoding step costs: time, bytes read, memory; and what the device can read."""

import dataclasses
import statistics
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from cla_kernels import choose_implementation
from flax import nnx

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.inference import KVCache, Sampling
from cla_jax.inference.cache import laid_out_stack
from cla_jax.inference.generation import decode_block
from cla_jax.inference.planning import MemorySettings, step_reads
from cla_jax.inference.sampling import row_keys
from cla_jax.models import KV, Decoder, UnstackedDecoder

__all__ = [
    "DecodeCosts",
    "DecodeLoop",
    "bytes_in_use",
    "decode_costs",
    "memory_limit",
    "random_decoder",
    "read_bandwidth",
]


@dataclasses.dataclass(frozen=True)
class DecodeCosts:
    """A batch decoding at a context, greedily.

    Attributes:
        model: its name.
        batch: rows.
        context: keys that the last timed step sees.
        cache_dtype: of the cache.
        step_seconds: median over calls of a step's time within a loop on the device.
        read_bytes: that a step must read: the weights once, K/V once for every layer.
        cache_bytes: of the cache.
        held_bytes: that the process holds on the device with weights and cache, when nothing
            runs (`bytes_in_use`).
        peak_bytes: the most that it has held so far; None where the device does not say.
        temporary_bytes: of the compiled loop, beside its arguments.
        compile_seconds: of the loop.
        attention: the implementation of `decode_attention`.
    """

    model: str
    batch: int
    context: int
    cache_dtype: str
    step_seconds: float
    read_bytes: int
    cache_bytes: int
    held_bytes: int
    peak_bytes: int | None
    temporary_bytes: int
    compile_seconds: float
    attention: str

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.batch / self.step_seconds

    @property
    def read_rate(self) -> float:
        """Bytes that had to be read, per second."""
        return self.read_bytes / self.step_seconds


def random_decoder(
    config: ModelConfig,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
) -> UnstackedDecoder:
    """Random weights, ready to decode; their float32 form is not kept."""

    @jax.jit
    def make(key: jax.Array) -> UnstackedDecoder:
        return UnstackedDecoder(Decoder(config, execution, rngs=nnx.Rngs(key)))

    return make(jax.random.key(0))


class DecodeLoop:
    """`decode_block`, `generate`'s own loop, compiled, with a full cache of random K/V.

    Compiled before the cache takes the memory: XLA tries out matrix products as it compiles. On a
    mesh (make it, fill it and run it with the layout in force) the cache is made where it lies.

    Args:
        decoder: the model.
        batch: rows.
        context: tokens that a row has room for.
        cache_dtype: of the cache.
        steps: that one call may run.

    Attributes:
        decoder: as given.
        compiled: the program.
        compile_seconds: it took.
        cache: None until `fill`.
    """

    def __init__(
        self,
        decoder: UnstackedDecoder,
        batch: int,
        context: int,
        *,
        cache_dtype: str = "bfloat16",
        steps: int = 16,
    ) -> None:
        config = decoder.config
        self.decoder, self._batch = decoder, batch

        @jax.jit
        def full() -> KVCache:
            empty = KVCache.create(config, batch, context, cache_dtype)
            row = jax.random.normal(jax.random.key(1), (1, *empty.k[0].shape[2:]), jnp.float32)
            new = empty.stored(KV(row, row))

            def filled(stacks: tuple[jax.Array, ...], part: Any) -> Any:
                return tuple(laid_out_stack(jnp.broadcast_to(part, s.shape)) for s in stacks)

            return dataclasses.replace(
                empty,
                k=filled(empty.k, new.k),
                v=filled(empty.v, new.v),
                k_scale=filled(empty.k_scale, new.k_scale),
                v_scale=filled(empty.v_scale, new.v_scale),
            )

        self._full = full.lower().compile()
        shapes, self._places = jax.eval_shape(full), self._full.output_shardings
        cache = jax.tree.map(
            lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            shapes, self._places,
        )  # fmt: skip
        token, done = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool)
        no_stop = jnp.full((1,), -1, jnp.int32)
        self._rest = (token, done, row_keys(0, range(batch)), Sampling().arrays(), no_stop)
        began = time.perf_counter()
        self.compiled: Any = decode_block.lower(
            decoder, cache, *self._rest, jnp.int32(steps), size=steps
        ).compile()
        self.compile_seconds = time.perf_counter() - began
        self.cache: KVCache | None = None

    def fill(self) -> KVCache:
        """Make the cache; its K/V are random."""
        cache = cast(KVCache, jax.block_until_ready(self._full()))
        self.cache = cache
        return cache

    def at(self, lengths: Any) -> KVCache:
        """The cache with its rows this long: an int, or one of each row. It is to be donated."""
        cache = self.fill() if self.cache is None else self.cache
        each = np.broadcast_to(np.asarray(lengths, np.int32), (self._batch,))
        placed = jax.device_put(each, cast(Any, self._places).lengths)
        return dataclasses.replace(cache, lengths=placed)

    def run(self, start: int, count: int) -> float:
        """Seconds of one call, which decodes `count` tokens a row behind `start` that it has."""
        # The cache was donated; only its lengths are set back.
        cache, count_ = jax.block_until_ready((self.at(start), jnp.int32(count)))
        began = time.perf_counter()
        *_, self.cache = self.compiled(self.decoder, cache, *self._rest, count_)
        jax.block_until_ready(self.cache)
        return time.perf_counter() - began


def decode_costs(
    decoder: UnstackedDecoder,
    batch: int,
    context: int,
    *,
    cache_dtype: str = "bfloat16",
    steps: int = 16,
    repeats: int = 3,
    warm_up: int | None = None,
) -> DecodeCosts:
    """Time `decode_block` (`DecodeLoop`) over a full cache of random K/V.

    Args:
        decoder: the model.
        batch: rows.
        context: tokens that a row has after the last step.
        cache_dtype: of the cache.
        steps: in a timed call.
        repeats: timed calls, after one that is not.
        warm_up: steps of that one. Default: as many as are timed.

    Raises:
        ValueError: a context shorter than the steps.
    """
    config, weights = decoder.config, bytes_in_use()
    if context <= steps:
        raise ValueError(f"context {context} must be longer than the {steps} timed steps")
    loop = DecodeLoop(decoder, batch, context, cache_dtype=cache_dtype, steps=steps)
    others = bytes_in_use()  # the decoder's, and what a row is kept by
    cache = loop.fill()
    cache_bytes = cache.nbytes
    held = weights + bytes_in_use() - others
    queries = jax.ShapeDtypeStruct(
        (batch, 1, config.query_heads, config.head_dim), decoder.execution.compute_dtype
    )
    attention, _ = choose_implementation(queries, cache.k[0])
    del cache  # it is donated
    times = list[float]()
    for call in range(repeats + 1):
        count = steps if call or warm_up is None else warm_up
        times.append(loop.run(context - steps, count) / count)
    settings = MemorySettings(cache_dtype, decoder.execution.compute_dtype)
    return DecodeCosts(
        model=config.name,
        batch=batch,
        context=context,
        cache_dtype=cache_dtype,
        step_seconds=statistics.median(times[1:]),
        read_bytes=step_reads(config, batch, context, settings).total,
        cache_bytes=cache_bytes,
        held_bytes=held,
        peak_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        temporary_bytes=loop.compiled.memory_analysis().temp_size_in_bytes,
        compile_seconds=loop.compile_seconds,
        attention=attention,
    )


def read_bandwidth(size: int = 2**32, repeats: int = 8) -> float:
    """Bytes per second at which the device sums an array of `size` bytes: its read ceiling.

    The better of sums over bfloat16 and over float32.
    """
    best = 0.0
    for dtype in (jnp.bfloat16, jnp.float32):
        array = jnp.ones((size // jnp.dtype(dtype).itemsize,), dtype)
        total = jax.jit(lambda a: a.astype(jnp.float32).sum())
        jax.block_until_ready(total(array))
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready([total(array) for _ in range(repeats)])
            best = max(best, array.nbytes * repeats / (time.perf_counter() - began))
        del array
    return best


def bytes_in_use() -> int:
    """Bytes that this process holds on the first device.

    By the allocator's count; where there is none (CPUs), the sizes of all arrays that are alive.
    """
    held = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
    return sum(array.nbytes for array in jax.live_arrays()) if held is None else held


def memory_limit() -> int | None:
    """Bytes that the first device lets JAX have; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
