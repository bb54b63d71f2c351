"""Prefill, decoding and generation on meshes of eight devices are those of one device."""

import dataclasses
import functools
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from cla_jax.configs import ExecutionConfig, MeshConfig
from cla_jax.evaluation.ahead_of_time import compile_decode
from cla_jax.evaluation.collectives import collectives
from cla_jax.inference import GenerateConfig, KVCache, Sampling, extend, generate, prefill
from cla_jax.parallel import Layout, in_force
from cla_jax.training import Model
from tests.models.reference import QUICK_COMPILE
from tests.parallel.models import PATTERNS, config_of, layout_of, model_of, params_of

ROWS, ROOM = 8, 23  # no other size is 23: a collective of that length would carry a cache
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (ROWS, 12)).astype(np.int32)
WIDTHS = np.array([12, 3, 9, 12, 1, 7, 10, 12], np.int32)
PROMPTS = [RNG.integers(0, 64, length) for length in (3, 40, 17, 9, 25, 30)]

CREATE = jax.jit(KVCache.create, static_argnums=(0, 1, 2), static_argnames=("dtype", "stacked"))
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[-\w]*\("
)

# By rows over two axes, and by heads; the others are slow.
QUICK = {("CLA2", "data=2,tensor=4"), ("GQA4", "tensor=4")}
MESHES = ("tensor=8", "tensor=4", "data=2,tensor=4", "fsdp=4,tensor=2", "data=8")
ALL = [
    pytest.param(p, m, "float32", marks=() if (p, m) in QUICK else pytest.mark.slow)
    for p in PATTERNS
    for m in MESHES
    if p in ("GQA4", "CLA4") or m == "tensor=8" or (p, m) in QUICK
] + [
    pytest.param(p, "data=2,tensor=4", "int8", marks=pytest.mark.slow) for p in ("CLA2", "GQA4")
]  # fmt: skip


def decoder_of(pattern, mesh):
    model, layout = model_of(pattern), layout_of(pattern, mesh)
    params = params_of(model.config)
    if layout is not None:
        params = jax.device_put(params, layout.of(model.axes))
    with in_force(layout):
        return model(params).unstacked(), layout


def device_bytes(cache, device):
    return sum(
        shard.data.nbytes
        for stack in (*cache.k, *cache.v, *cache.k_scale, *cache.v_scale)
        for shard in stack.addressable_shards
        if shard.device == device
    )


def ways(pattern, mesh, dtype):
    """Logits of a ragged prefill, a chunk behind it and a step; the cache; the step's program."""
    decoder, layout = decoder_of(pattern, mesh)
    options = {"compiler_options": QUICK_COMPILE, "donate_argnums": 2}
    begin, go_on = jax.jit(prefill, **options), jax.jit(extend, **options)
    with in_force(layout):
        cache = CREATE(config_of(pattern), ROWS, ROOM, dtype=dtype)
        begun, cache = begin(decoder, TOKENS, cache, WIDTHS)
        chunk, cache = go_on(decoder, TOKENS[:, :10], cache, np.minimum(WIDTHS, 10))
        program = go_on.lower(decoder, TOKENS[:, :1], cache).compile()
        step, cache = program(decoder, TOKENS[:, :1], cache)
    return [np.asarray(a) for a in (begun, chunk, step)], cache, program


@functools.cache
def alone(pattern, dtype):
    return ways(pattern, "none", dtype)[0]


@pytest.mark.parametrize(("pattern", "mesh", "dtype"), ALL)
def test_prefill_and_decoding_are_those_of_one_device(pattern, mesh, dtype):
    logits, cache, program = ways(pattern, mesh, dtype)
    # Of eight bits, an entry may fall to the other side of a rounding.
    tolerance = 2e-5 if dtype == "float32" else 3e-3
    for found, expected in zip(logits, alone(pattern, dtype), strict=True):
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    # Bytes fall by the number of devices, on every one of them.
    devices = cache.k[0].devices()
    parts = int(np.prod([int(n) for n in re.findall(r"\d+", mesh)]))
    assert len(devices) == parts
    assert {device_bytes(cache, device) for device in devices} == {cache.nbytes / parts}
    # What is cached stays where it is.
    found = COLLECTIVE.findall(program.as_text() or "")
    assert not [shapes for shapes, _ in found if str(ROOM) in re.findall(r"\d+", shapes)]
    assert found or mesh == "data=8"


def in_a_step(layers, *, by_rows):
    """Collectives by kind: two a layer; of the embedding and of the output projection."""
    if by_rows:  # and of the tokens' ids; logits go where their rows are
        return {"all-gather": layers + 2, "all-reduce": layers + 1, "all-to-all": 1}
    return {"all-gather": 1, "all-reduce": 2 * layers + 1}


@pytest.mark.parametrize(
    ("pattern", "mesh", "by_rows"),
    [("MQA", "tensor=2", True), ("MQA", "tensor=4", True), ("GQA4", "tensor=4", False),
     ("NeoX", "data=2,tensor=2", True),
     pytest.param("CLA4", "data=2,tensor=4", True, marks=pytest.mark.slow),
     pytest.param("CLA4", "tensor=2", False, marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_a_step_sends_and_what_a_device_holds(pattern, mesh, by_rows):
    """Where a cache is split by rows, so is attention: new K/V, angles and queries stay."""
    config = config_of("MQA" if pattern == "NeoX" else pattern)
    if pattern == "NeoX":
        config = dataclasses.replace(
            config, rms_norm=False, swiglu=False, parallel_residual=True, use_bias=True
        )
    sizes = MeshConfig.parse(mesh)
    layout = Layout.on(sizes, config, jax.devices()[: sizes.devices])
    program = compile_decode(config, layout, batch=ROWS, length=ROOM)
    found = collectives(program.as_text() or "", dict(layout.mesh.shape))
    sent = in_a_step(config.num_layers, by_rows=by_rows)
    assert Counter(one.kind for one in found) == sent
    # A decoder and a cache that are made there lie as those that the program is planned with.
    model = Model(config, ExecutionConfig())
    with in_force(layout):
        decoder = model(jax.device_put(model.init(0), layout.of(model.axes))).unstacked()
        cache = CREATE(config, ROWS, ROOM)
    device, rows = jax.devices()[0], ROWS // layout.shards("cache_batch")
    shards = [s for array in jax.tree.leaves((decoder, cache.k, cache.v))
              for s in array.addressable_shards if s.device == device]  # fmt: skip
    held = sum(s.data.nbytes for s in shards) + 2 * rows * 4  # and ids and lengths
    planned: Any = program.memory_analysis()
    assert planned.argument_size_in_bytes == held
    heads = 8 // (1 if by_rows else int(mesh[-1]))
    queries = decoder.layer(0).attention.query.kernel[...].addressable_shards
    assert {shard.data.shape for shard in queries} == {(32, heads, 4)}


@pytest.mark.parametrize(
    ("pattern", "mesh"),
    [("CLA2", "tensor=4"), pytest.param("GQA4", "data=2,tensor=2", marks=pytest.mark.slow),
     pytest.param("CLA4", "tensor=8", marks=pytest.mark.slow)],
)  # fmt: skip
def test_generation_is_that_of_one_device(pattern, mesh):
    """Six prompts on four parts, in chunks; each row draws from its own stream."""
    config = GenerateConfig(
        max_new_tokens=9, sampling=Sampling(1.0, top_k=8, seed=3), prefill_tokens=64, block=4,
        stop_tokens=(5,),
    )  # fmt: skip
    texts = []
    for where in ("none", mesh):
        decoder, layout = decoder_of(pattern, where)
        with in_force(layout):
            texts.append(generate(decoder, PROMPTS, config))
    assert texts[0] == texts[1]
    assert len(texts[1]) == len(PROMPTS)


def test_rows_that_a_mesh_does_not_divide():
    decoder, layout = decoder_of("MQA", "tensor=4")
    with in_force(layout):
        with pytest.raises(ValueError, match=r"6 rows on a mesh that splits them by 4.* is 8"):
            KVCache.create(config_of("MQA"), 6, ROOM)
        cache = CREATE(config_of("MQA"), 8, ROOM)
        with pytest.raises(ValueError, match="4 rows of tokens for a cache of 8, which a mesh"):
            prefill(decoder, jax.numpy.asarray(TOKENS[:4]), cache)


def test_the_same_function_under_other_rules_is_traced_again():
    config = config_of("MQA")
    with in_force(layout_of("MQA", "tensor=4")):
        by_rows = CREATE(config, 8, ROOM)
    with in_force(layout_of("GQA4", "tensor=4")):
        by_heads = CREATE(config_of("GQA4"), 8, ROOM)
        with pytest.raises(ValueError, match="1 KV heads on a mesh that splits them by 4"):
            CREATE(config, 8, ROOM)
    assert by_rows.k[0].addressable_shards[0].data.shape[1:4] == (2, ROOM, 1)
    assert by_heads.k[0].addressable_shards[0].data.shape[1:4] == (8, ROOM, 1)
