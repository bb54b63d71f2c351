"""Times on the device by the slope between two amounts of work; the JAX side of the benchmark.

What is timed is a compiled program, called `n` times in a row, each with the last one's output, and
waited for once: the device works on one while the host enqueues the next. A program is a loop of
fixed length, of steps of a model of 20 layers: `decode_attention` runs over each layer's cache in
turn, its output being the next query. What an implementation makes of the lengths alone it makes
once a step, as in a model. Beside that the loop has its counter, and the copies of queries (at
most 4 MB) that XLA may make for it. Two values of `n` differ by work alone: waiting, and the way to
the first launch, cancel.

The host still enqueues every launch, unless XLA has made command buffers of them: at a few
microseconds a call a host that is busy otherwise cannot keep up, and windows do not agree.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cla_kernels import _mosaic_gpu, choose_implementation, decode_attention
from cla_kernels._tuning import Tuning
from decode_shapes import BITS8, Shape, layers_of
from jax import lax

JAX_NN_XLA = "jax_nn_xla"  # jax.nn's own path without cuDNN; "cudnn" is jax.nn's with it
DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
Cache = tuple[jax.Array, ...]  # one layer's k, v [1, B, S, K, H], 8-bit: and scales [1, B, K, S]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long and how often.

    Windows are short, so that some fall between what else the host does, and many.

    Attributes:
        inner: seconds of work in a program, if the device reads `rate` bytes a second.
        window: seconds by which the two amounts of work differ, about.
        repeats: of each amount of work, at most; the shortest counts.
        agree: the three shortest of either amount may differ by so much of `window`; then it ends.
        budget: seconds after which it ends in any case.
        rotation: bytes of K/V that are read before any is read again: twice an L2 of 50 MB, and
            some.
        most_layers: of them, at most: each is a call in the program.
        step: calls of a step, at least: of fewer layers, some are called more than once.
        most_bytes: of all layers' caches together.
        rate: bytes a second, to guess by.
        fewest: seconds of a call, to guess by.
    """

    inner: float = 1.5e-3
    window: float = 4.5e-3
    repeats: int = 60
    agree: float = 5e-3
    budget: float = 1.0
    rotation: int = 120_000_000
    most_layers: int = 24
    step: int = 20
    most_bytes: int = 40_000_000_000
    rate: float = 4e12
    fewest: float = 6e-6

    def layers(self, shape: Shape) -> int:
        """Layers whose caches are read in turn."""
        return layers_of(shape, self.rotation, self.most_layers, self.most_bytes)

    def calls(self, shape: Shape) -> int:
        """Of one step: every layer equally often."""
        layers = self.layers(shape)
        return layers * -(-self.step // layers)

    def steps(self, shape: Shape) -> int:
        """Of a program."""
        call = max(shape.kv_bytes / self.rate, self.fewest)
        return max(1, round(self.inner / (call * self.calls(shape))))


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a call, and how far they can be trusted.

    Attributes:
        seconds: of a call.
        agreed: whether the three shortest times of either amount of work agree.
        windows: of the larger amount of work.
        clean: of these, within 1 % of the shortest.
    """

    seconds: float
    agreed: bool
    windows: int
    clean: int


def slope(run: Callable[[int], None], calls: int, timing: Timing) -> Measured:
    """Seconds of one of the `calls` that `run(n)` makes `n` times and waits for.

    From the shortest times of both amounts of work: what else the host does only ever adds. (The
    median of slopes was off by 5 % while another process compiled.) A device that was idle is
    still raising its clock: the first runs are not counted.
    """

    def timed(n: int) -> float:
        began = time.perf_counter()
        run(n)
        return time.perf_counter() - began

    timed(1)
    more = 1 + max(1, min(64, math.ceil(timing.window / min(timed(1), timed(1)))))
    for _ in range(4):
        for _ in range(3):
            timed(more)
        few: list[float] = []
        many: list[float] = []
        began, agreed = time.perf_counter(), False
        while not agreed and len(many) < timing.repeats:
            few.append(timed(1))
            many.append(timed(more))
            if len(many) < 3:
                continue
            allowed = timing.agree * (min(many) - min(few))
            agreed = all(sorted(times)[2] - min(times) <= allowed for times in (few, many))
            if time.perf_counter() - began > timing.budget:
                break
        least = min(many) - min(few)
        if least > 0:
            clean = sum(t <= 1.01 * min(many) for t in many)
            return Measured(least / ((more - 1) * calls), agreed, len(many), clean)
        more *= 4
    raise RuntimeError("the clock is too coarse or the machine too busy: no time can be told")


def read_bandwidth(size: int, timing: Timing) -> dict[str, float]:
    """Bytes a second at which this device reads an array of `size` bytes, by several reductions."""
    forms: dict[str, tuple[Any, Callable[[jax.Array], jax.Array]]] = {
        "float32 sum of bfloat16": (jnp.bfloat16, lambda x: x.astype(jnp.float32).sum()),
        "float32 row sums of bfloat16": (
            jnp.bfloat16,
            lambda x: x.reshape(-1, 8192).astype(jnp.float32).sum(1),
        ),
        "max of bfloat16": (jnp.bfloat16, lambda x: x.max()),
        "sum of float32": (jnp.float32, lambda x: x.sum()),
        "sum of int32": (jnp.int32, lambda x: x.sum(dtype=jnp.int32)),
    }
    found: dict[str, float] = {}
    for name, (dtype, reduce) in forms.items():
        length = size // jnp.dtype(dtype).itemsize
        x = jax.jit(lambda length=length, dtype=dtype: (jnp.arange(length) % 251).astype(dtype))()
        call = jax.jit(reduce)

        def run(n: int, call: Any = call, x: jax.Array = x) -> None:
            # Enqueued one after the other: the device does not wait for the host.
            jax.block_until_ready([call(x) for _ in range(8 * n)])

        try:
            found[name] = x.nbytes / slope(run, 8, timing).seconds
        except jax.errors.JaxRuntimeError as error:
            print(f"read bandwidth, {name}: {reason(error)}", flush=True)
        del x
    return found


def reason(error: BaseException) -> str:
    """An error as one short line: a ValueError's text is meant for readers, others get a name."""
    text = " ".join(str(error).split())[:240] or "no message"
    if isinstance(error, TypeError) and "k_scale" in text:
        return "8-bit caches are not supported"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def attend(
    implementation: str | Tuning, q: jax.Array, cache: Cache, lengths: jax.Array
) -> jax.Array:
    """One call, `[B, 1, N, H]`; of a `Tuning`: our own kernel, cut so."""
    k, v, *scales = cache
    if isinstance(implementation, Tuning):
        k_scale, v_scale = scales or (None, None)
        return _mosaic_gpu.decode_attention(
            q, k, v, k_scale, v_scale, lengths, 0, q.shape[-1] ** -0.5, implementation
        )
    if implementation == JAX_NN_XLA:
        if scales:
            raise ValueError("jax.nn takes no 8-bit cache")
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k[0], v[0], key_value_seq_lengths=lengths, implementation="xla"
            )
    given = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    call: Any = decode_attention  # the scales are given to 8-bit caches alone
    return call(q, k, v, lengths, implementation=implementation, **given)


def timed_program(
    implementation: str | Tuning, steps: int, calls: int
) -> Callable[[jax.Array, Sequence[Cache], jax.Array], jax.Array]:
    """`(q, caches, lengths) -> output of the last call`.

    Layers' caches are arrays of their own, as models hold them, so that no implementation slices
    (and copies) a stack. The barrier keeps XLA from hoisting out of the loop what it does to a
    cache (a cast, a new layout), which a decode step would do anew.
    """
    # Jitted, so that the layers trace and lower it once.
    call = jax.jit(lambda q, cache, lengths: attend(implementation, q, cache, lengths))

    def program(q: jax.Array, caches: Sequence[Cache], lengths: jax.Array) -> jax.Array:
        def step(_: Any, q: jax.Array) -> jax.Array:
            for i in range(calls):
                q, cache = lax.optimization_barrier((q, caches[i % len(caches)]))
                q = call(q, cache, lengths)
            return q

        return lax.fori_loop(0, steps, step, q)

    return program


def make_inputs(shape: Shape) -> Callable[[jax.Array], tuple[jax.Array, Cache]]:
    """`seed -> (q, one layer's cache)`, random; a row at a time, which takes little memory."""
    dtype, size = DTYPES[shape.dtype], (shape.capacity, shape.K, shape.H)

    def values(key: jax.Array) -> jax.Array:
        x = jax.random.normal(key, size, jnp.float32)
        if shape.dtype == "int8":
            return jnp.clip(jnp.round(40.0 * x), -127, 127).astype(dtype)
        return x.astype(dtype)

    def scales(key: jax.Array) -> jax.Array:
        rows = jax.random.uniform(key, (1, shape.B, shape.K, shape.capacity), jnp.float32, 0.5, 1.5)
        return rows / 40.0 if shape.dtype == "int8" else rows

    def make(seed: jax.Array) -> tuple[jax.Array, Cache]:
        q_key, *keys = jax.random.split(jax.random.key(seed), 5)
        q = jax.random.normal(q_key, (shape.B, 1, shape.N, shape.H), jnp.float32)
        k, v = (lax.map(values, jax.random.split(key, shape.B))[None] for key in keys[:2])
        if shape.dtype not in BITS8:
            return q.astype(jnp.bfloat16), (k, v)
        return q.astype(jnp.bfloat16), (k, v, scales(keys[2]), scales(keys[3]))

    return make


def exact(q: jax.Array, cache: Cache, lengths: jax.Array) -> jax.Array:
    """Float32 softmax attention, a row at a time and without matrix units, `[B, N, H]`."""
    k, v, *scales = cache
    kv_heads, size = k.shape[3], k.shape[2]

    def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
        q, length, k, v, *scales = inputs
        _, N, H = q.shape
        q = q.astype(jnp.float32).reshape(kv_heads, N // kv_heads, 1, H)
        k, v = (x.astype(jnp.float32).swapaxes(0, 1) for x in (k, v))  # [K, S, H]
        if scales:
            k, v = k * scales[0][:, :, None], v * scales[1][:, :, None]
        scores = (q * k[:, None]).sum(-1) * H**-0.5  # [K, N // K, S]
        seen = jnp.arange(size, dtype=jnp.int32)[None, None, :] < length
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return (weights[..., None] * v[:, None]).sum(2).reshape(N, H)

    return lax.map(row, (q, lengths, k[0], v[0], *(scale[0] for scale in scales)))


def structs(shape: Shape) -> tuple[jax.ShapeDtypeStruct, tuple[jax.ShapeDtypeStruct, ...]]:
    """Shapes and dtypes of the queries and of one layer's cache."""
    kv = jax.ShapeDtypeStruct((1, shape.B, shape.capacity, shape.K, shape.H), DTYPES[shape.dtype])
    scale = jax.ShapeDtypeStruct((1, shape.B, shape.K, shape.capacity), jnp.float32)
    q = jax.ShapeDtypeStruct((shape.B, 1, shape.N, shape.H), jnp.bfloat16)
    return q, (kv, kv, scale, scale) if shape.dtype in BITS8 else (kv, kv)


def default_of(shape: Shape) -> str:
    """What `decode_attention` chooses for this shape on this device."""
    q, cache = structs(shape)
    return choose_implementation(q, cache[0])[0]


def compile_inputs(shape: Shape) -> Any:
    """The compiled `make_inputs`."""
    return jax.jit(make_inputs(shape)).lower(jax.ShapeDtypeStruct((), jnp.int32)).compile()


def compile_exact(shape: Shape) -> Any:
    """The compiled `exact`."""
    q, cache = structs(shape)
    lengths = jax.ShapeDtypeStruct((shape.B,), jnp.int32)
    return jax.jit(exact).lower(q, cache, lengths).compile()


class Programs(NamedTuple):
    """Of one implementation, compiled: a call `(q, cache, lengths)`; `timed_program`, q donated."""

    call: Any
    timed: Any


def compile_timed(shape: Shape, implementation: str | Tuning, timing: Timing) -> Programs:
    """One call and the `timed_program`, compiled.

    Raises:
        ValueError: the implementation cannot take the shape, and why.
    """
    q, cache = structs(shape)
    lengths = jax.ShapeDtypeStruct((shape.B,), jnp.int32)
    call = jax.jit(functools.partial(attend, implementation)).lower(q, cache, lengths).compile()
    program = timed_program(implementation, timing.steps(shape), timing.calls(shape))
    # What it writes takes the place of what it read: were every call's output elsewhere, XLA would
    # have to bring its command buffers up to date each time.
    donated = jax.jit(program, donate_argnums=0)
    timed = donated.lower(q, (cache,) * timing.layers(shape), lengths).compile()
    return Programs(call, timed)


def measure(
    programs: Programs, q: jax.Array, caches: Sequence[Cache], lengths: jax.Array, shape: Shape,
    timing: Timing,
) -> tuple[np.ndarray, Callable[[], Measured]]:  # fmt: skip
    """The output of one call, `[B, N, H]` float32, and what times it."""
    caches = tuple(caches)

    last = jnp.copy(q)

    def run(n: int) -> None:
        nonlocal last
        for _ in range(n):  # enqueued one after the other
            last = programs.timed(last, caches, lengths)
        jax.block_until_ready(last)

    out = np.asarray(programs.call(q, caches[0], lengths)).astype(np.float32)[:, 0]
    calls = timing.steps(shape) * timing.calls(shape)
    return out, lambda: slope(run, calls, timing)


def temporaries(programs: Programs) -> int:
    """Bytes of scratch memory of the timed program; 0 where it is not known."""
    try:
        return int(programs.timed.memory_analysis().temp_size_in_bytes)
    except Exception:  # not every backend tells
        return 0
