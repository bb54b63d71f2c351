"""One test body for every implementation, against a float64 softmax in NumPy, a query at a time."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cla_kernels import EIGHT_BIT, IMPLEMENTATIONS, choose_implementation, decode_attention
from hypothesis import given, settings
from hypothesis import strategies as st

IMPLEMENTATION_PARAMS = [
    pytest.param(name, marks=pytest.mark.gpu) if name in ("cudnn", "mosaic_gpu") else name
    for name in IMPLEMENTATIONS
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a call: rows, queries a row, query and KV heads, head dim, cache length, KV layers."""

    B: int
    T: int
    N: int
    K: int
    H: int
    S: int
    G: int


# What every implementation is held to, on every backend.
SHAPES = [
    Shape(B=5, T=1, N=4, K=2, H=64, S=24, G=3),  # GQA
    Shape(B=3, T=3, N=3, K=1, H=46, S=17, G=2),  # a head dim that no tile divides
    Shape(B=3, T=1, N=4, K=4, H=8, S=16, G=2),  # MHA
    Shape(B=3, T=1, N=5, K=1, H=128, S=40, G=2),  # MQA
    Shape(B=1, T=1, N=1, K=1, H=16, S=1, G=1),
    Shape(B=3, T=1, N=3, K=1, H=90, S=13, G=2),
    Shape(B=3, T=8, N=3, K=3, H=6, S=11, G=1),
    Shape(B=5, T=7, N=2, K=1, H=8, S=4, G=2),  # more queries than room
    Shape(B=5, T=5, N=6, K=2, H=64, S=200, G=2),  # several tiles, causal across their edge
    Shape(B=2, T=2, N=8, K=1, H=256, S=72, G=1),
    Shape(B=3, T=2, N=6, K=2, H=72, S=200, G=2),  # a head dim that no 16 divides
    Shape(B=2, T=1, N=16, K=1, H=248, S=136, G=1),  # another
    Shape(B=3, T=8, N=48, K=2, H=80, S=136, G=1),  # more queries to a KV head than a tile has
]
# (queries, cache), and the error of the largest entry that is left to them. Measured on CPU:
# float32 5e-7; bfloat16 2.8e-3 and float16 3.5e-4, of rounding softmax weights and output.
DTYPES = {
    ("float32", "float32"): 3e-6,
    ("float32", "bfloat16"): 3e-6,
    ("bfloat16", "bfloat16"): 8e-3,
    ("float16", "float16"): 1e-3,
    # Against the dequantised K/V, to which attention adds no error of its own: the same limits.
    ("float32", "int8"): 3e-6,
    ("float32", "float8_e4m3fn"): 3e-6,
    ("bfloat16", "int8"): 8e-3,
    ("bfloat16", "float8_e4m3fn"): 8e-3,
    ("float16", "int8"): 1e-3,
}


def softmax_attention(q, k, v, lengths, layer, scale=None, *, k_scale=None, v_scale=None):
    """Float64; loops over rows, queries and heads. A query that sees nothing gives zeros."""
    q, k, v = (np.asarray(jnp.asarray(a, jnp.float32), np.float64) for a in (q, k, v))
    if k_scale is not None and v_scale is not None:
        k, v = (np.einsum("gbskh,gbks->gbskh", a, s) for a, s in ((k, k_scale), (v, v_scale)))
    (B, T, N, H), S, K = q.shape, k.shape[2], k.shape[3]
    scale = 1 / np.sqrt(H) if scale is None else scale
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = min(int(lengths[b]) - T + t + 1, S)
        if seen < 1:
            continue
        keys, values = k[layer, b, :seen, n // (N // K)], v[layer, b, :seen, n // (N // K)]
        weights = np.exp(scale * keys @ q[b, t, n])
        out[b, t, n] = weights @ values / weights.sum()
    return out


def ragged(shape: Shape) -> np.ndarray:
    """Full rows, empty ones, rows shorter than their queries, rows that end in padding."""
    lengths = [shape.S + shape.T - 1, 0, shape.S // 2 + 1, shape.S, 1]
    return np.array(lengths[: shape.B], np.int32)


def inputs(shape: Shape, q_dtype="float32", cache_dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    cache = (shape.G, shape.B, shape.S, shape.K, shape.H)
    q = random.normal(size=(shape.B, shape.T, shape.N, shape.H))
    k, v = random.normal(size=(2, *cache))
    if cache_dtype in EIGHT_BIT:
        k, v = (np.clip(np.round(a * 60), -127, 127) for a in (k, v))
    return jnp.asarray(q, q_dtype), jnp.asarray(k, cache_dtype), jnp.asarray(v, cache_dtype)


def scales(shape: Shape, cache_dtype, of_values=1.0, seed=1) -> dict[str, jax.Array]:
    """Of an 8-bit cache, each token's and head's its own; none of another."""
    if cache_dtype not in EIGHT_BIT:
        return {}
    random = np.random.default_rng(seed).lognormal(size=(2, shape.G, shape.B, shape.K, shape.S))
    k_scale, v_scale = jnp.asarray(random / 120, jnp.float32)
    return {"k_scale": k_scale, "v_scale": of_values * v_scale}


def error(found, expected) -> float:
    found = np.asarray(jnp.asarray(found, jnp.float32), np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3))


@functools.cache
def jitted(implementation):
    @functools.partial(jax.jit, static_argnames=("layer", "scale"))
    def run(q, k, v, lengths, layer=0, scale=None, **scales):
        # A GPU would otherwise multiply float32 in TF32.
        with jax.default_matmul_precision("highest"):
            return decode_attention(
                q, k, v, lengths, layer=layer, scale=scale, implementation=implementation, **scales
            )

    return run


# Each shape in float32, the first two in all types; on a GPU, which compiles faster, all in all.
CASES = [
    pytest.param(shape, *dtypes, id=f"{shape}-{'-'.join(dtypes)}")
    for shape in SHAPES
    for dtypes in DTYPES
    if shape in SHAPES[:2] or dtypes == ("float32", "float32") or jax.default_backend() == "gpu"
]


def takes(implementation: str, shape: Shape, q_dtype: str, cache_dtype: str) -> bool:
    sixteen_bit = q_dtype == cache_dtype != "float32"
    if implementation == "cudnn":
        return shape.T == 1 and shape.H % 8 == 0 and sixteen_bit
    if implementation == "mosaic_gpu":
        eight_bit = cache_dtype in EIGHT_BIT and q_dtype != "float32"
        step = 16 if eight_bit else 8
        tiles = 32 <= shape.H <= 256 and shape.H % step == 0 and shape.S % 8 == 0
        return tiles and (sixteen_bit or eight_bit)
    return True


def limit(implementation: str, q_dtype: str, cache_dtype: str) -> float:
    """Of the error of the largest entry."""
    if implementation == "mosaic_gpu" and cache_dtype in EIGHT_BIT:
        q_dtype = "bfloat16"  # in which it multiplies
    return DTYPES[q_dtype, cache_dtype]


@pytest.mark.parity
@pytest.mark.parametrize(("shape", "q_dtype", "cache_dtype"), CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATION_PARAMS)
def test_is_softmax_attention(implementation, shape, q_dtype, cache_dtype):
    q, k, v = inputs(shape, q_dtype, cache_dtype)
    of_cache = scales(shape, cache_dtype)
    lengths, layer = ragged(shape), shape.G - 1
    if not takes(implementation, shape, q_dtype, cache_dtype):
        message = r"cannot run on (cuDNN|Mosaic GPU) here: .*(head dim|type|mask|multiple|of float)"
        with pytest.raises(ValueError, match=message):
            jitted(implementation)(q, k, v, lengths, layer=layer, **of_cache)
        return
    found = jitted(implementation)(q, k, v, lengths, layer=layer, **of_cache)
    assert found.dtype == q.dtype
    expected = softmax_attention(q, k, v, lengths, layer, **of_cache)
    assert error(found, expected) < limit(implementation, q_dtype, cache_dtype)
    # Not small: none at all.
    blind = lengths[:, None] - shape.T + np.arange(shape.T)[None] < 0
    assert not np.asarray(jnp.asarray(found, jnp.float32))[blind].any()


@st.composite
def calls(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = Shape(
        B=draw(st.integers(1, 3)), T=draw(st.integers(1, 8)), N=kv_heads * group, K=kv_heads,
        H=draw(st.sampled_from([1, 2, 6, 46])), S=draw(st.integers(1, 12)),
        G=draw(st.integers(1, 3)),
    )  # fmt: skip
    lengths = draw(st.lists(st.integers(0, shape.S + 8), min_size=shape.B, max_size=shape.B))
    return shape, np.array(lengths, np.int32), draw(st.integers(0, shape.G - 1))


@pytest.mark.parity
@settings(max_examples=8)
@given(calls(), st.sampled_from([None, 0.3]), st.sampled_from(["float32", *EIGHT_BIT]))
def test_any_shape_and_lengths(call, scale, dtype):
    shape, lengths, layer = call
    q, k, v = inputs(shape, "float32", dtype, seed=shape.S)
    of_cache = scales(shape, dtype)
    expected = softmax_attention(q, k, v, lengths, layer, scale, **of_cache)
    for implementation in ("reference", "xla"):
        found = jitted(implementation)(q, k, v, lengths, layer=layer, scale=scale, **of_cache)
        assert error(found, expected) < DTYPES["float32", dtype]


@pytest.mark.parity
@pytest.mark.parametrize(("q_dtype", "of_values"), [("float16", 1e-3), ("float32", 1e-30)])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_small_values_are_not_lost(implementation, q_dtype, of_values):
    """A softmax weight times the scale of a small value leaves float16's range."""
    shape = SHAPES[8]
    q, k, v = inputs(shape, q_dtype, "int8")
    of_cache, lengths = scales(shape, "int8", of_values), ragged(shape)
    found = jitted(implementation)(q, k, v, lengths, **of_cache).astype(jnp.float32) / of_values
    expected = softmax_attention(q, k, v, lengths, 0, **of_cache) / of_values
    assert error(found, expected) < 2 * DTYPES[q_dtype, "int8"]


TRANSFORMED = Shape(B=3, T=1, N=4, K=2, H=8, S=8, G=3)


def scanned(run, q, k, v, lengths):
    _, out = jax.lax.scan(
        lambda _, layer: (None, run(q, k, v, lengths, layer)), None, jnp.arange(3)
    )
    return out


TRANSFORMS = {
    "eager": lambda run, *args: jnp.stack([run(*args, layer) for layer in range(3)]),
    "traced layer": lambda run, *args: jnp.stack(
        [jax.jit(run)(*args, jnp.asarray(layer)) for layer in range(3)]
    ),
    "scan over layers": scanned,
    "vmap over layers": lambda run, *args: jax.vmap(lambda layer: run(*args, layer))(jnp.arange(3)),
    "vmap over rows": lambda run, q, k, v, lengths: jnp.stack(
        [
            jax.vmap(
                lambda q, k, v, n, layer=layer: run(
                    q[None], *jax.tree.map(lambda a: a[:, None], (k, v)), n[None], layer
                )[0],
                in_axes=(0, 1, 1, 0),
            )(q, k, v, lengths)
            for layer in range(3)
        ]
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATION_PARAMS)
def test_under_transformations(implementation, eight_bit, transform):
    on_gpu = implementation in ("cudnn", "mosaic_gpu")
    if eight_bit and implementation == "cudnn":
        pytest.skip("cuDNN takes no 8-bit cache")
    dtype = "bfloat16" if on_gpu else "float32"
    cache_dtype = "int8" if eight_bit else dtype
    shape = dataclasses.replace(TRANSFORMED, H=64) if on_gpu else TRANSFORMED
    q, k, v = inputs(shape, dtype, cache_dtype)
    of_cache = scales(shape, cache_dtype)
    lengths = jnp.asarray([8, 0, 3], jnp.int32)

    def run(q, k, v, lengths, layer):
        (k, k_scale), (v, v_scale) = k, v
        with jax.default_matmul_precision("highest"):
            return decode_attention(
                q, k, v, lengths, k_scale=k_scale, v_scale=v_scale, layer=layer,
                implementation=implementation,
            )  # fmt: skip

    cached = ((k, of_cache.get("k_scale")), (v, of_cache.get("v_scale")))
    found = TRANSFORMS[transform](run, q, *cached, lengths)
    expected = np.stack(
        [softmax_attention(q, k, v, lengths, layer, **of_cache) for layer in range(3)]
    )
    assert error(found, expected) < DTYPES[dtype, cache_dtype]


@pytest.mark.parametrize(
    ("q_dtype", "dtype"), [("float32", "float32"), ("float16", "float16"), ("float32", "int8")]
)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6]], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATION_PARAMS)
def test_what_lies_behind_the_lengths_or_in_other_layers_is_not_read(
    implementation, shape, q_dtype, dtype
):
    if not takes(implementation, shape, q_dtype, dtype):
        pytest.skip(f"not for {implementation}")
    q, k, v = inputs(shape, q_dtype, dtype)
    of_cache = scales(shape, dtype)
    lengths, layer = ragged(shape), 0
    behind = np.arange(shape.S)[None] >= lengths[:, None]
    unseen = np.broadcast_to(behind, (shape.G, shape.B, shape.S)).copy()
    unseen[layer + 1 :] = True
    largest = 127 if of_cache else 3e4
    dirty_k, dirty_v = (
        jnp.where(unseen[..., None, None], jnp.asarray(garbage, dtype), clean)
        for garbage, clean in ((largest, k), (-largest, v))
    )
    dirty_scales = {
        name: jnp.where(unseen[:, :, None], jnp.float32(1e30), scale)
        for name, scale in of_cache.items()
    }
    run = jitted(implementation)
    np.testing.assert_array_equal(
        run(q, k, v, lengths, layer=layer, **of_cache),
        run(q, dirty_k, dirty_v, lengths, layer=layer, **dirty_scales),
    )


def test_lengths_and_layers_of_any_integer_type():
    q, k, v = inputs(TRANSFORMED)
    lengths = np.array([8, 0, 3])
    expected = softmax_attention(q, k, v, lengths, 2)
    for implementation in ("reference", "xla"):
        for integer in (jnp.int16, jnp.uint32):
            found = decode_attention(
                q, k, v, jnp.asarray(lengths, integer), layer=jnp.asarray(2, integer),
                implementation=implementation,
            )  # fmt: skip
            assert error(found, expected) < DTYPES["float32", "float32"]


# --- choice and refusals --------------------------------------------------------------------------


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="what is chosen without a GPU")
def test_without_a_gpu_xla_is_chosen_and_cudnn_refused():
    q, k, v = inputs(SHAPES[1], "bfloat16", "bfloat16")
    chosen, reason = choose_implementation(q, k)
    shapes: Any = jax.eval_shape(lambda: (q, k))
    assert choose_implementation(*shapes) == (chosen, reason)
    assert chosen == "xla"
    assert "cpu is no NVIDIA GPU" in reason
    lengths = jnp.asarray(ragged(SHAPES[1]))
    with pytest.raises(ValueError, match="cannot run on cuDNN here: cpu is no NVIDIA GPU"):
        decode_attention(q, k, v, lengths, implementation="cudnn")
    np.testing.assert_array_equal(
        np.asarray(decode_attention(q, k, v, lengths), np.float32),
        np.asarray(decode_attention(q, k, v, lengths, implementation="xla"), np.float32),
    )


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the GPU here is a fake one")
def test_the_default_device_counts_rather_than_the_first(monkeypatch):
    """As on a machine with a GPU, whose owner wants this call on the processor."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    real = jax.devices
    monkeypatch.setattr(jax, "devices", lambda name=None: real(name) if name else [gpu])
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 1, 16, 128), (1, 8, 1024, 1, 128)))
    assert choose_implementation(q, k)[0] == "mosaic_gpu"
    for default in ("cpu", real()[1]):
        with jax.default_device(default):
            taken, reason = choose_implementation(q, k)
        assert taken == "xla"
        assert "cpu is no NVIDIA GPU" in reason


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the GPU here is a fake one")
@pytest.mark.parametrize(
    ("head_dim", "queries", "expected"),
    [
        (128, 1, "mosaic_gpu"), (96, 1, "mosaic_gpu"), (40, 1, "mosaic_gpu"),
        (160, 1, "mosaic_gpu"), (80, 1, "cudnn"), (80, 2, "mosaic_gpu"), (72, 1, "cudnn"),
        (72, 2, "xla"), (248, 1, "cudnn"),
    ],
)  # fmt: skip
def test_head_dims_that_are_loaded_in_small_pieces_are_left_to_others(
    monkeypatch, head_dim: int, queries: int, expected: str
):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda name=None: [gpu])
    q = jax.ShapeDtypeStruct((8, queries, 16, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 8, 1024, 1, head_dim), jnp.bfloat16)
    chosen, reason = choose_implementation(q, k)
    assert chosen == expected
    assert chosen == "mosaic_gpu" or f"head dim {head_dim} is loaded in pieces of" in reason


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the GPU here is a fake one")
@pytest.mark.parametrize(
    ("rows", "size", "kv_heads", "head_dim", "cache", "expected"),
    [
        (4, 512, 1, 128, "bfloat16", "xla"), (1, 4096, 1, 64, "bfloat16", "xla"),
        (4, 520, 1, 128, "bfloat16", "mosaic_gpu"), (1, 512, 2, 128, "bfloat16", "mosaic_gpu"),
        (4, 512, 1, 128, "int8", "mosaic_gpu"), (1, 64, 1, 80, "bfloat16", "cudnn"),
    ],
)  # fmt: skip
def test_the_smallest_caches_of_one_kv_head_are_left_to_xla(
    monkeypatch, rows: int, size: int, kv_heads: int, head_dim: int, cache: str, expected: str
):
    """Up to 1 MiB of a layer's K and V."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda name=None: [gpu])
    q = jax.ShapeDtypeStruct((rows, 1, 16, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, rows, size, kv_heads, head_dim), cache)
    chosen, reason = choose_implementation(q, k)
    assert chosen == expected
    assert ("at most 1 MiB" in reason) == (expected == "xla")


@pytest.mark.gpu
def test_on_a_gpu_a_fused_kernel_is_chosen_where_one_can_run():
    for shape in SHAPES:
        for dtypes in DTYPES:
            q, k, _ = inputs(shape, *dtypes)
            chosen, reason = choose_implementation(q, k)
            fused, same = ["mosaic_gpu", "cudnn"], dtypes[0] == dtypes[1]
            if shape.H > 64 and shape.H % 16 and same:
                fused.remove("mosaic_gpu")  # it can, but takes longer
            first = [name for name in fused if takes(name, shape, *dtypes)]
            if first[:1] == ["mosaic_gpu"] and shape.K == 1 and same:
                first = []  # all of these shapes are small
            assert chosen == [*first, "xla"][0], reason


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


INT8 = {name: zeros(3, 3, 8, 2, 8, dtype="int8") for name in ("k", "v")}
SCALE = zeros(3, 3, 2, 8)
REFUSED = {
    "q of three axes": ({"q": zeros(3, 4, 8)}, r"q is \(3, 4, 8\).*expected q \[B, T, N, H\]"),
    "a cache of one layer": ({"k": zeros(3, 8, 2, 8)}, r"expected .* k \[G, B, S, K, H\]"),
    "k unlike v": ({"v": zeros(3, 3, 7, 2, 8)}, r"k \(3, 3, 8.*v \(3, 3, 7.*must be alike"),
    "k of another type": ({"v": zeros(3, 3, 8, 2, 8, dtype="float16")}, "float32.*float16.*alike"),
    "rows": ({"q": zeros(2, 1, 4, 8)}, "has batch 2 and head dim 8; .* has batch 3"),
    "head dim": ({"q": zeros(3, 1, 4, 6)}, "head dim 6; the cache .* head dim 8"),
    "heads": ({"q": zeros(3, 1, 3, 8)}, "3 query heads are no multiple of 2 KV heads"),
    "no query": ({"q": zeros(3, 0, 4, 8)}, "T is 0: expected at least one query"),
    "integer q": ({"q": zeros(3, 1, 4, 8, dtype="int32")}, "q is int32: expected a floating dtype"),
    "integer cache": (
        {"k": zeros(3, 3, 8, 2, 8, dtype="int16"), "v": zeros(3, 3, 8, 2, 8, dtype="int16")},
        "k is int16: expected a floating dtype .* or one of int8, float8_e4m3fn with scales",
    ),
    "8-bit q": ({"q": zeros(3, 1, 4, 8, dtype="int8")}, "q is int8: expected a floating dtype"),
    "float8 q": ({"q": zeros(3, 1, 4, 8, dtype="float8_e4m3fn")}, "q is float8.*of 16 bits"),
    "no scales": (INT8, r"k is int8, but k_scale is missing: expected float32 \(3, 3, 2, 8\)"),
    "one scale": ({**INT8, "k_scale": SCALE}, "k is int8, but v_scale is missing"),
    "scales of a float cache": (
        {"k_scale": SCALE},
        "k_scale is given, but k is float32",
    ),
    "scales along the heads": (
        {**INT8, "k_scale": SCALE, "v_scale": zeros(3, 3, 8, 2)},
        r"v_scale is float32 \(3, 3, 8, 2\): expected float32 \[G, B, K, S\], \(3, 3, 2, 8\)",
    ),
    "16-bit scales": (
        {**INT8, "k_scale": SCALE.astype("bfloat16"), "v_scale": SCALE},
        "k_scale is bfloat16 .*: expected float32",
    ),
    "lengths of other rows": ({"lengths": zeros(2, dtype="int32")}, r"int32 \(2,\).* of 3 rows"),
    "float lengths": ({"lengths": zeros(3)}, "lengths are float32 .*expected an integer"),
    "layer beyond": ({"layer": 3}, "layer 3: the cache has 3, expected 0 to 2"),
    "layer before": ({"layer": -1}, "layer -1: the cache has 3, expected 0 to 2"),
    "implementation": ({"implementation": "cuddn"}, "'cuddn'.*the nearest is 'cudnn'"),
    "another": ({"implementation": "refrence"}, "expected one of .*nearest is 'reference'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, message = REFUSED[case]
    q, k, v = inputs(TRANSFORMED)
    arguments = {"q": q, "k": k, "v": v, "lengths": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, **changes})
