"""Eight-bit numbers with a scale: how far they are off, and what becomes of odd vectors."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cla_kernels import EIGHT_BIT
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cla_jax.inference.quantization import StoredKV, dequantize, quantize
from cla_jax.models import KV

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
TINY = float(np.finfo(np.float32).tiny)

vectors = hnp.arrays(
    np.float32,
    (2, 3, 5),
    # Beside ordinary numbers: zeros, denormal ones, and up to near float32's largest.
    elements=st.floats(-(2.0**127), 2.0**127, width=32)
    | st.floats(-4, 4, width=32)
    | st.sampled_from([0.0, 1e-45, -1e-40, 2.0**-126, 3e38, -6e4]),
)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@given(vectors)
def test_a_round_trip_is_off_by_no_more_than_the_rounding(dtype, x):
    values, scale = quantize(jnp.asarray(x), dtype)
    assert values.dtype == dtype
    assert (scale.dtype, scale.shape) == (jnp.float32, x.shape[:-1])
    assert np.abs(np.asarray(values, np.float32)).max() <= LARGEST[dtype]
    found = np.asarray(dequantize(values, scale), np.float64)
    step = np.asarray(scale, np.float64)[..., None]
    allowed = step / 2
    if dtype == "float8_e4m3fn":
        # The flushed product of a scale as small as can be and a denormal e4m3: below `TINY`.
        allowed = np.maximum(2.0**-4 * np.abs(x, dtype=np.float64), 2.0**-10 * step) + TINY
    assert (np.abs(found - x) <= allowed * (1 + 1e-5)).all()
    assert (found[x == 0] == 0).all()


@given(vectors)
def test_against_numpy(x):
    """Where nothing is denormal: the definition, by NumPy and its own e4m3."""
    x = np.where(np.abs(x) < 1e-30, np.float32(0), x)
    for dtype, largest in LARGEST.items():
        values, scale = quantize(jnp.asarray(x), dtype)
        expected = np.maximum(np.abs(x).max(-1) / np.float32(largest), np.float32(2.0**-125))
        np.testing.assert_allclose(scale, expected, rtol=2e-7)
        exact = x / np.asarray(scale)[..., None]
        if dtype == "int8":
            rounded = np.rint(exact)
        else:
            rounded = np.clip(exact, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(
            np.asarray(values, np.float32), np.asarray(rounded, np.float32)
        )


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_the_largest_is_exact_and_no_vector_touches_another(dtype):
    x = jnp.asarray([[1.0, -6e4, 3.0], [0.0, 0.0, 0.0], [3e38, 1.0, -3e38], [1e-3, 2e-3, 0.0]])
    found = np.asarray(dequantize(*quantize(x, dtype)))
    largest = np.abs(x).argmax(-1)
    np.testing.assert_allclose(found[range(4), largest], x[jnp.arange(4), largest], rtol=1e-6)
    for i, row in enumerate(x):
        alone = dequantize(*quantize(row, dtype))
        np.testing.assert_allclose(alone, found[i], rtol=1e-6)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_comes_back_as_no_number(dtype, odd):
    x = jnp.asarray([[1.0, odd, 0.0], [1.0, 2.0, 0.0]])
    values, scale = quantize(x, dtype)
    assert np.isfinite(np.asarray(values, np.float32)).all()
    np.testing.assert_array_equal(np.isnan(scale), [True, False])
    found = np.asarray(dequantize(values, scale))
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], x[1], rtol=0.07)


@pytest.mark.parametrize("wide", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_16_bit_vectors_are_quantised_in_float32(dtype, wide):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)) * 1e4, wide)
    for found, expected in zip(
        quantize(x, dtype), quantize(x.astype("float32"), dtype), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert dequantize(*quantize(x, dtype), wide).dtype == wide


@pytest.mark.parametrize("dtype", ["bfloat16", *EIGHT_BIT])
def test_stored_kv_are_read_as_they_were_but_for_the_rounding(dtype):
    k, v = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 5, 3, 8)), jnp.float32)
    stored = StoredKV.of(KV(k, v), dtype)
    read = stored.layer(0, "float32")
    for given_, found in zip((k, v), read, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, given_, rtol=0.07, atol=0.02)
        if dtype in EIGHT_BIT:
            expected = dequantize(*quantize(given_, dtype))
            np.testing.assert_array_equal(found, expected)
    if dtype in EIGHT_BIT:
        assert stored.k_scale is not None
        assert stored.k_scale.shape == (1, 2, 3, 5)
    else:
        assert stored.k_scale is stored.v_scale is None
