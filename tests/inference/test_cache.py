"""Whose bytes the cache holds, what a write touches, and that a step updates it in place."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cla_kernels import EIGHT_BIT
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.inference.cache import KVCache
from cla_jax.inference.forward import extend
from cla_jax.inference.quantization import StoredKV
from cla_jax.models import KV, Decoder, UnstackedDecoder
from cla_jax.registry import model, model_names
from cla_jax.sharing import KVSharing
from tests.models.test_decoder import config_of

# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_names())
def test_bytes_are_the_formulas_for_every_model(name):
    config = model(name)
    owners = set(config.sharing.owners)
    for dtype, itemsize, of_scale in (("bfloat16", 2, 0), ("float32", 4, 0), ("int8", 1, 4)):
        cache = jax.eval_shape(lambda dtype=dtype: KVCache.create(config, 3, 5, dtype))
        vectors = 2 * len(owners) * config.kv_heads
        assert cache.nbytes == 3 * 5 * vectors * (config.head_dim * itemsize + of_scale)
        assert cache.nbytes == 3 * 5 * config.sharing.kv_bytes_per_token(
            config.kv_heads, config.head_dim, itemsize, of_scale
        )
        assert len(cache.k) == len(cache.v) == len(owners)
        assert len(cache.k_scale) == len(cache.v_scale) == (len(owners) if of_scale else 0)


@pytest.mark.parametrize("dtype", ["float16", *EIGHT_BIT])
def test_a_built_cache_takes_what_its_shapes_say_and_readers_take_nothing(dtype):
    sharing = KVSharing.shared_upper_half(8)
    built = KVCache.create(config_of(sharing, 2), 3, 5, dtype)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(built)) == built.nbytes + 3 * 4
    unshared = KVCache.create(config_of(KVSharing.none(8), 2), 3, 5, dtype)
    assert built.nbytes * 8 == unshared.nbytes * sharing.kv_layers
    # Two references to one buffer could not both be donated.
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(built)}
    assert len(pointers) == (4 if dtype in EIGHT_BIT else 2) * sharing.kv_layers + 1


@pytest.mark.parametrize("stacked", [False, True])
def test_create(stacked):
    cache = KVCache.create(config_of(KVSharing.cla(6, 2), 2), 4, 9, stacked=stacked)
    shape = (3, 4, 9, 2, 6) if stacked else (1, 4, 9, 2, 6)
    assert [a.shape for a in (*cache.k, *cache.v)] == [shape] * (2 if stacked else 6)
    assert (cache.batch, cache.length, cache.dtype) == (4, 9, jnp.bfloat16)
    assert cache.lengths.dtype == jnp.int32
    assert not any(np.asarray(a, np.float32).any() for a in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), "batch 0: expected at least 1"),
        ((2, -1), "length -1: expected at least 1"),
        (
            (2, 4, "int4"),
            r"cache_dtype='int4': expected one of bfloat16, .*the nearest is 'int8'",
        ),
    ],
)
def test_refusals(sizes, message):
    with pytest.raises(ValueError, match=message):
        KVCache.create(config_of(KVSharing.none(2), 1), *sizes)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("sharing", "kv_heads", "head_dim", "message"),
    [
        (KVSharing.none(6), 2, 6, "KV layers 3 there, 6 here$"),
        (KVSharing.cla(6, 2), 4, 6, "KV heads 2 there, 4 here$"),
        (KVSharing.cla(6, 2), 2, 8, "head dim 6 there, 8 here$"),
        (KVSharing.cla(6, 3), 1, 8, "KV layers 3 .* 2 here, KV heads 2 .*, head dim 6 there"),
    ],
)
def test_the_cache_of_another_model_is_refused(sharing, kv_heads, head_dim, message, stacked):
    mine = config_of(KVSharing.cla(6, 2), 2)
    cache = KVCache.create(mine, 2, 4, stacked=stacked)
    cache.check(mine)
    with pytest.raises(ValueError, match=f"cache of another model than other: .*{message}"):
        cache.check(config_of(sharing, kv_heads, head_dim=head_dim, name="other"))


# --- writes ---------------------------------------------------------------------------------------

CONFIG = config_of(KVSharing.cla(6, 2), 2)  # three KV layers
LENGTH = 6


def full_of_numbers(batch: int, lengths, dtype="float32", stacked=False) -> KVCache:
    """A cache in which no entry is like another, nor like what is written."""
    empty = KVCache.create(CONFIG, batch, LENGTH, dtype, stacked=stacked)
    values = np.random.default_rng(3).normal(size=(2, 3, batch, LENGTH, 2, 6))
    layers = [StoredKV.of(KV(*jnp.asarray(values[:, g], jnp.float32)), dtype) for g in range(3)]

    def stacks(part):
        given = [layer[part] for layer in layers if layer[part] is not None]
        return (jnp.concatenate(given),) if stacked and given else tuple(given)

    k, v, k_scale, v_scale = map(stacks, range(4))
    return KVCache(k, v, empty.lengths + jnp.asarray(lengths), k_scale, v_scale)


def arrays(cache: KVCache) -> np.ndarray:
    """What is read of it, `[2, G, B, S, K, H]`, float32."""
    layers = [
        np.stack(layer_of.layer(i, "float32"))
        for layer_of in (cache.entry(slot)[0] for slot in range(len(cache.k)))
        for i in range(layer_of.k.shape[0])
    ]
    return np.stack(layers, axis=1)


def new_kv(rows: int, tokens: int) -> KV:
    values = 10 + np.random.default_rng(4).normal(size=(2, rows, tokens, 2, 6))
    return KV(*(jnp.asarray(part, jnp.float32) for part in values))


def expected_write(cache: KVCache, slot: int, kv: KV, first_row: int) -> np.ndarray:
    """By loops: one token of one row at a time."""
    wanted = arrays(cache)
    for part, new in enumerate(StoredKV.of(kv, cache.dtype.name).layer(0, "float32")):
        rounded = np.asarray(new)
        for row in range(rounded.shape[0]):
            for t in range(rounded.shape[1]):
                at = int(cache.lengths[first_row + row]) + t
                if at < cache.length:
                    wanted[part, slot, first_row + row, at] = rounded[row, t]
    return wanted


@st.composite
def writes(draw):
    batch = draw(st.integers(1, 4))
    first = draw(st.integers(0, batch - 1))
    return dict(
        lengths=draw(st.lists(st.integers(0, LENGTH), min_size=batch, max_size=batch)),
        slot=draw(st.integers(0, 2)),
        first_row=first,
        rows=draw(st.integers(1, batch - first)),
        tokens=draw(st.integers(1, LENGTH + 2)),
        stacked=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16", *EIGHT_BIT])),
    )


@settings(max_examples=12)
@given(writes())
def test_a_write_puts_each_token_behind_its_row_and_touches_nothing_else(case):
    cache = full_of_numbers(
        len(case["lengths"]), case["lengths"], case["dtype"], stacked=case["stacked"]
    )
    kv = new_kv(case["rows"], case["tokens"])
    written = cache.write(case["slot"], cache.stored(kv), case["first_row"])
    expected = expected_write(cache, case["slot"], kv, case["first_row"])
    np.testing.assert_array_equal(arrays(written), expected)
    np.testing.assert_array_equal(written.lengths, case["lengths"])
    assert written.dtype == cache.dtype


@pytest.mark.parametrize(("slot", "dtype"), [(0, "float32"), (2, "float32"), (2, "int8")])
def test_a_traced_slot_and_row(slot, dtype):
    cache = full_of_numbers(3, [1, 5, 0], dtype, stacked=True)
    kv = new_kv(2, 2)
    written = jax.jit(KVCache.write)(cache, jnp.int32(slot), cache.stored(kv), jnp.int32(1))
    np.testing.assert_array_equal(arrays(written), expected_write(cache, slot, kv, 1))


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("stacked", [False, True])
def test_rows_begin_at_their_beginning_whatever_they_held(stacked, dtype):
    cache = full_of_numbers(4, [1, 5, 0, 6], dtype, stacked=stacked)
    kv = new_kv(2, LENGTH - 1)
    begun = jax.jit(KVCache.begin, static_argnums=1)(cache, 2, cache.stored(kv), jnp.int32(1))
    expected = arrays(cache)
    expected[:, 2, 1:3, : LENGTH - 1] = np.stack(cache.stored(kv).layer(0, "float32"))
    np.testing.assert_array_equal(arrays(begun), expected)
    np.testing.assert_array_equal(begun.lengths, cache.lengths)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("stacked", [False, True])
def test_rows_are_a_copy_of_some_rows_of_one_layer(stacked, dtype):
    cache = full_of_numbers(4, [0, 1, 2, 3], dtype, stacked=stacked)
    taken = jax.jit(KVCache.rows, static_argnums=(1, 3))(cache, 1, jnp.int32(2), 2)
    np.testing.assert_array_equal(np.stack(taken.layer(0, "float32")), arrays(cache)[:, 1, 2:4])


def test_lengths_grow_up_to_the_room_there_is():
    cache = full_of_numbers(4, [0, 4, 3, 6])
    grown = cache.grown(jnp.asarray([5, 0], jnp.int32), 1)
    np.testing.assert_array_equal(grown.lengths, [0, 6, 3, 6])
    grown = cache.grown(jnp.asarray([2, 2, 2, 2], jnp.int32))
    np.testing.assert_array_equal(grown.lengths, [2, 6, 5, 6])
    assert grown.lengths.dtype == jnp.int32
    np.testing.assert_array_equal(arrays(grown), arrays(cache))


# --- in place -------------------------------------------------------------------------------------

ROWS, ROOM = 4, 4096  # a layer's K/V is a hundred times its activations


@functools.cache
def abstract_decoder(config: ModelConfig, dtype) -> Decoder:
    execution = ExecutionConfig(compute_dtype=dtype)
    return nnx.eval_shape(lambda: UnstackedDecoder(Decoder(config, execution, rngs=nnx.Rngs(0))))


def steps(decoder, tokens, cache):
    """Sixteen greedy steps on the device."""

    def step(_, carry):
        logits, cache = extend(decoder, *carry)
        return logits.argmax(-1).astype(jnp.int32)[:, None], cache

    return jax.lax.fori_loop(0, 16, step, (tokens, cache))


def compiled(run, config: ModelConfig, cache: KVCache, dtype) -> tuple[str, int, int]:
    """The program's HLO, and bytes of its temporaries and of arguments that it updates in place."""
    tokens = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
    traced = jax.jit(run, donate_argnums=2).trace(abstract_decoder(config, dtype), tokens, cache)
    program = traced.lower().compile()
    memory, hlo = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert hlo is not None
    return hlo, memory.temp_size_in_bytes, memory.alias_size_in_bytes


def large_instructions(hlo: str, elements: int) -> set[str]:
    """Opcodes of the instructions, inside fusions too, that give an array of so many elements."""
    found = set[str]()
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if match and math.prod(map(int, match[1].split(","))) >= elements:
            found.add(match[2])
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what the CPU's compiler did")
@pytest.mark.parametrize(("run", "dtype"), [(extend, "float32"), (steps, "bfloat16")])
@pytest.mark.parametrize(
    ("sharing", "kv_heads"),
    [(KVSharing.none(3), 4), (KVSharing.none(3), 1), (KVSharing.cla(4, 2), 1)],
    ids=["MHA", "MQA", "MQA-CLA2"],
)
def test_a_decode_step_updates_the_cache_in_place(sharing, kv_heads, dtype, run):
    config = config_of(sharing, kv_heads, head_dim=32)
    cache = jax.eval_shape(lambda: KVCache.create(config, ROWS, ROOM, dtype))
    hlo, temporaries, updated = compiled(run, config, cache, dtype)
    assert updated >= cache.nbytes
    # The limit is two layers' K/V. Measured: at most 0.26 of one layer's, the scores of a layer.
    assert temporaries < cache.nbytes / config.kv_layers
    # Nothing of a layer's size is computed (copied, sliced, turned, converted) but its update.
    large = large_instructions(hlo, ROWS * ROOM * kv_heads * 32)
    assert "scatter" in large
    assert large <= {"scatter", "fusion", "parameter", "bitcast", "get-tuple-element"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what the CPU's compiler did")
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_decode_step_updates_an_8_bit_cache_in_place(kv_heads, dtype):
    config = config_of(KVSharing.cla(4, 2), kv_heads, head_dim=32)
    cache = jax.eval_shape(lambda: KVCache.create(config, ROWS, ROOM, dtype))
    hlo, temporaries, updated = compiled(steps, config, cache, "bfloat16")
    assert updated >= cache.nbytes
    # A CPU's product takes operands of one dtype: a layer's K, then V, is converted on the way.
    # Measured, in K of one layer as float32: 1.3 (int8) and 2.6 (e4m3, through float16).
    keys = ROWS * ROOM * kv_heads
    assert temporaries < 3 * keys * 32 * 4
    # Neither K/V nor scales are copied or turned.
    assert not large_instructions(hlo, keys) & {"copy", "transpose"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what the CPU's compiler did")
def test_a_stacked_cache_is_updated_in_place_too():
    config = config_of(KVSharing.cla(6, 2), 1, head_dim=32)
    cache = jax.eval_shape(lambda: KVCache.create(config, ROWS, ROOM, "float32", stacked=True))
    _, temporaries, updated = compiled(steps, config, cache, "float32")
    assert updated >= cache.nbytes
    assert temporaries < 2 * cache.nbytes / config.kv_layers
