"""What a cache holds of keys and values: rounded to its dtype, or quantised to eight bits.

An 8-bit cache has a float32 scale for each token and KV head, so that a token can be added without
touching those before it. Readers have none of their own: a scale is stored once, with its owner's
keys or values.
"""

from typing import NamedTuple

import jax.numpy as jnp
from cla_kernels import EIGHT_BIT
from jaxtyping import Array, Float, Int, Shaped

from cla_jax.models import KV

_LARGEST = {"int8": 127, "float8_e4m3fn": 448}
# Twice the smallest normal number: what a device flushes to zero is at most half a step of int8.
_SMALLEST_SCALE = 2.0**-125


def quantize(
    x: Float[Array, "*A H"], dtype: str
) -> tuple[Shaped[Array, "*A H"], Float[Array, "*A"]]:
    """Vectors as eight-bit numbers, each with a scale: `x` is about `values * scale`.

    The scale puts a vector's largest magnitude on the dtype's largest number. Errors: int8 rounds
    to nearest, half the scale at most; float8_e4m3fn `2**-4` of the number, or `2**-10` of the
    scale for one below `2**-6` of it. Zeros are exact. A vector with an entry that is not finite
    has the scale NaN and comes back as NaN: a fault stays one.

    Args:
        x: of any floating dtype; worked on in float32.
        dtype: `int8` or `float8_e4m3fn`.

    Returns:
        Values of that dtype, and float32 scales.
    """
    largest = jnp.float32(_LARGEST[dtype])
    x = x.astype(jnp.float32)
    magnitude = jnp.abs(x).max(-1)
    scale = jnp.maximum(magnitude / largest, jnp.float32(_SMALLEST_SCALE))
    finite = jnp.isfinite(magnitude)
    scale = jnp.where(finite, scale, jnp.nan)
    # Clipped: a quotient may come out a little above, and e4m3 has no infinity but NaN up there.
    values = jnp.clip(x / scale[..., None], -largest, largest)
    values = jnp.where(finite[..., None], values, 0.0)
    return (jnp.round(values) if dtype == "int8" else values).astype(dtype), scale


def dequantize(
    values: Shaped[Array, "*A H"], scale: Float[Array, "*A"], dtype: str = "float32"
) -> Float[Array, "*A H"]:
    """`values * scale`, multiplied in float32 and rounded once."""
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


class StoredKV(NamedTuple):
    """K/V as a cache holds them: a stack of layers.

    Attributes:
        k: rotated keys `[G, B, S, K, H]`, floating or of eight bits.
        v: values, alike.
        k_scale: float32 `[G, B, K, S]` if they are of eight bits, else None.
        v_scale: likewise.
    """

    k: Shaped[Array, "G B S K H"]
    v: Shaped[Array, "G B S K H"]
    k_scale: Float[Array, "G B K S"] | None = None
    v_scale: Float[Array, "G B K S"] | None = None

    @classmethod
    def of(cls, kv: KV, dtype: str) -> "StoredKV":
        """One layer's K/V `[B, S, K, H]` as a cache of that dtype holds them."""
        if dtype not in EIGHT_BIT:
            return cls(kv.k.astype(dtype)[None], kv.v.astype(dtype)[None])
        (k, k_scale), (v, v_scale) = (quantize(part, dtype) for part in kv)
        return cls(k[None], v[None], k_scale.swapaxes(1, 2)[None], v_scale.swapaxes(1, 2)[None])

    def layer(self, index: int | Int[Array, ""], dtype: str) -> KV:
        """One layer's K/V `[B, S, K, H]` as they are read, in a floating dtype: a copy."""

        def read(values: Array, scale: Array | None) -> Array:
            if scale is None:
                return values[index].astype(dtype)
            return dequantize(values[index], scale[index].swapaxes(1, 2), dtype)

        return KV(read(self.k, self.k_scale), read(self.v, self.v_scale))
