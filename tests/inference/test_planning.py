"""The planner against built shapes, brute force, and the figures that the papers print."""

import dataclasses
import itertools

import jax
import pytest
from cla_kernels import EIGHT_BIT
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.inference import planning
from cla_jax.inference.cache import KVCache
from cla_jax.inference.planning import MemoryPlan, MemorySettings
from cla_jax.models import Decoder
from cla_jax.registry import model, model_names
from cla_jax.sharing import KVSharing

FLOAT32 = MemorySettings(cache_dtype="float32")
GB = 10**9
TOY = ModelConfig(
    name="toy", sharing=KVSharing.cla(6, 2), d_model=16, ffn_dim=24, query_heads=4, kv_heads=2,
    head_dim=10, vocab_size=60, separate_kv_norm=True,
)  # fmt: skip
TIED = dataclasses.replace(TOY, tied_embeddings=True)

models = st.sampled_from([TOY, *map(model, model_names())])
settings = st.builds(
    MemorySettings,
    cache_dtype=st.sampled_from(["bfloat16", "float32", "int8"]),
    compute_dtype=st.sampled_from(["bfloat16", "float32"]),
    prefill_tokens=st.integers(1, 20_000),
    sampling=st.booleans(),
)
sizes = st.integers(1, 100_000)


# --- weights, cache, workspace --------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [TOY, TIED, *map(model, ("1B/H128-MQA", "3B/H64-MQA-CLA2", "pythia-160m/MLKV-6"))],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_of_an_unstacked_decoder(config, dtype):
    execution = ExecutionConfig(compute_dtype=dtype)
    weights = jax.eval_shape(lambda: Decoder(config, execution, rngs=nnx.Rngs(0)).unstacked())
    leaves = jax.tree.leaves(nnx.state(weights, nnx.Param))
    counted = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert planning.weight_bytes(config, MemorySettings(compute_dtype=dtype)) == counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", *EIGHT_BIT])
@pytest.mark.parametrize("name", model_names())
def test_cache_bytes_are_those_of_a_built_cache(name, dtype):
    """Abstract shapes: nothing is allocated."""
    config, batch, context = model(name), 7, 1000

    def stacks():
        cache = KVCache.create(config, batch, context, dtype)
        return cache.k, cache.v, cache.k_scale, cache.v_scale

    leaves = jax.tree.leaves(jax.eval_shape(stacks))
    counted = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    planned = planning.cache_bytes(config, batch, context, MemorySettings(cache_dtype=dtype))
    assert planned == counted
    if dtype not in EIGHT_BIT:
        of_16_bits = config.kv_bytes_per_token * batch * context
        assert planned == of_16_bits * (2 if dtype == "float32" else 1)


@given(models, settings, sizes, sizes)
def test_workspace_and_total_grow(config, settings, batch, context):
    for needed in (planning.workspace_bytes, planning.total_bytes):
        here = needed(config, batch, context, settings)
        assert here <= needed(config, batch + 1, context, settings)
        assert here <= needed(config, batch, context + 1, settings)


@given(models, settings, st.integers(1, 64), st.integers(1, 6), st.integers(-2, 1))
def test_it_grows_where_a_prefill_call_holds_one_row_less(config, settings, parts, batch, off):
    """The sizes at which prefill calls change are rare among all, and were once not monotone."""
    context = max(settings.prefill_tokens // parts + off, 1)
    for needed in (planning.workspace_bytes, planning.total_bytes):
        here = needed(config, batch, context, settings)
        assert here <= needed(config, batch, context + 1, settings)
        assert here <= needed(config, batch + 1, context, settings)


def test_workspace_covers_what_it_must():
    """Logits of every row, and one layer's K and V."""
    config, batch, context = model("1B/H128-MHA"), 16, 4096
    one_layer = 2 * batch * context * 16 * 128 * 2
    need = planning.workspace_bytes(config, batch, context)
    assert (
        one_layer + 4 * batch * config.vocab_size
        < need
        < planning.cache_bytes(config, batch, context)
    )
    # XLA's scores of a prefill call, where no fused kernel takes the head dim.
    wide = model("1B/H512-MQA-CLA2")
    assert planning.workspace_bytes(wide, batch, context) > 8192 * 4 * context * 6


# --- what fits ------------------------------------------------------------------------------------


@given(models, settings, sizes, st.integers(1, 10**12))
def test_the_largest_batch_fits_and_one_more_does_not(config, settings, context, memory):
    batch = planning.largest_batch(config, context, memory, settings)
    if batch:
        assert planning.total_bytes(config, batch, context, settings) <= memory
        assert planning.longest_context(config, batch, memory, settings) >= context
    assert planning.total_bytes(config, batch + 1, context, settings) > memory
    assert planning.longest_context(config, batch + 1, memory, settings) < context


@given(models, settings, sizes, st.integers(1, 10**12))
def test_the_longest_context_fits_and_one_more_does_not(config, settings, batch, memory):
    context = planning.longest_context(config, batch, memory, settings)
    if context:
        assert planning.total_bytes(config, batch, context, settings) <= memory
        assert planning.largest_batch(config, context, memory, settings) >= batch
    assert planning.total_bytes(config, batch, context + 1, settings) > memory


@given(settings, st.integers(1, 300), st.integers(0, 50_000_000))
def test_the_largest_batch_equals_counting_up(settings, context, spare):
    memory = planning.weight_bytes(TOY, settings) + 64 * 2**20 + spare
    fits = (planning.total_bytes(TOY, b, context, settings) <= memory for b in itertools.count(1))
    counted = sum(itertools.takewhile(bool, fits))
    assert planning.largest_batch(TOY, context, memory, settings) == counted


def test_eight_bits_buy_batch():
    wide, narrow = (
        MemoryPlan(model("1B/H128-MQA-CLA2"), 1, 8192, 141 * GB, MemorySettings(dtype))
        for dtype in ("bfloat16", "int8")
    )
    assert narrow.kv_bytes_per_token == 20 * (128 + 4)
    # Less than the cache alone would give: XLA's decoding converts a layer's K/V at a time.
    assert 1.5 < narrow.largest_batch / wide.largest_batch < 2 * 128 / (128 + 4)
    assert narrow.reads(64).kv == 40 * (128 + 4) * 64 * 8192


def test_sharing_buys_batch():
    none, cla2 = (
        MemoryPlan(model(f"1B/H128-MQA{p}"), 1, 8192, 141 * GB).largest_batch for p in ("", "-CLA2")
    )
    assert 1.7 < cla2 / none < 2  # the workspace is not shared


@given(models, settings, st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**12))
def test_the_check_refuses_exactly_what_does_not_fit(config, settings, batch, length, memory):
    arguments = {
        "cache_dtype": settings.cache_dtype,
        "prefill_tokens": settings.prefill_tokens,
        "compute_dtype": settings.compute_dtype,
    }
    planning.check_fits(config, batch, length, memory_bytes=None, **arguments)
    settings = dataclasses.replace(settings, sampling=True)
    if planning.total_bytes(config, batch, length, settings) <= memory:
        planning.check_fits(config, batch, length, memory_bytes=memory, **arguments)
    else:
        with pytest.raises(ValueError, match=config.name):
            planning.check_fits(config, batch, length, memory_bytes=memory, **arguments)


def test_more_rows_than_a_cuda_grid_has_hold_their_scores():
    config = model("pythia-160m/MLKV-1")
    fused, more = (planning.workspace_bytes(config, 65_535 + n, 2048) for n in (0, 1))
    scores = 65_536 * 2 * config.query_heads * 2048 * 4
    assert more - fused > scores


def test_the_check_names_the_knobs():
    config, memory = model("1B/H128-MQA-CLA2"), 20 * GB
    with pytest.raises(ValueError, match="1B/H128-MQA-CLA2: batch 512 at context 8,192") as refused:
        planning.check_fits(config, 512, 8192, cache_dtype="float32", memory_bytes=memory)
    message = str(refused.value)
    batch = planning.largest_batch(config, 8192, memory, FLOAT32)
    context = planning.longest_context(config, 512, memory, FLOAT32)
    for part in (f"fits at this context is {batch:,},", f"at this batch {context:,}.", "42.9 GB",
                 "20.0 GB are available", "smaller batch", "shorter context", "bfloat16",
                 "shares K/V", "10 KV layers for 20"):  # fmt: skip
        assert part in message, part
    planning.check_fits(config, batch, 8192, cache_dtype="float32", memory_bytes=memory)
    with pytest.raises(
        ValueError, match=r"0 sequences fit into 2.00 GB: the weights alone .* 2.11"
    ):
        planning.check_fits(config, 1, 1, memory_bytes=2 * GB)
    with pytest.raises(ValueError, match=r"smaller batch, .*, cache dtype int8 .about half"):
        planning.check_fits(config, 4096, 8192, memory_bytes=memory)
    with pytest.raises(ValueError, match="length=0"):
        planning.check_fits(config, 1, 0, memory_bytes=None)


# --- the floor of a decode step -------------------------------------------------------------------


def test_readers_read_their_owners_kv_again():
    """1B CLA2, batch 64, context 8192: 20 layers of 64 x 8192 keys and values, not 10."""
    config = model("1B/H128-MQA-CLA2")
    reads = planning.step_reads(config, 64, 8192)
    assert reads.kv == 2 * planning.cache_bytes(config, 64, 8192) == 5_368_709_120
    looked_up = (config.vocab_size - 64) * config.d_model * 2
    padding = 20 * 3 * 2048 * (5504 - 5472) * 2  # of the feed-forward layers: need not be read
    assert reads.weights == planning.weight_bytes(config) - looked_up - padding
    assert reads.seconds(4_470 * GB) == pytest.approx(1.626e-3, rel=1e-3)
    # A tied embedding is the output projection: read whole, and looked up.
    assert planning.step_reads(TIED, 3, 5).weights == planning.weight_bytes(TIED) + 3 * 16 * 2


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("cache_dtype", "bf16", "nearest is 'bfloat16'"), ("compute_dtype", "int8", "one of bfloat16"),
     ("prefill_tokens", 0, "at least 1")],
)  # fmt: skip
def test_settings_refuse(field, value, message):
    with pytest.raises(ValueError, match=message):
        MemorySettings(**{field: value})


@pytest.mark.parametrize(("batch", "context", "memory"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_plans_refuse(batch, context, memory):
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        MemoryPlan(TOY, batch, context, memory)
