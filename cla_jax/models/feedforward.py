"""Feed-forward layers: SwiGLU (Shazeer 2020) and GELU."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models.sharding import constrain, named

_TILE, _MOST_PADDING = 128, 32  # of the width, and one in so many of it


def padded_width(width: int) -> int:
    """A width in whole tiles, where they add little to it; else the width."""
    padded = -(-width // _TILE) * _TILE
    return padded if (padded - width) * _MOST_PADDING <= width else width


class FeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, or `down(gelu(up(x)))`; the width is `F`.

    Gate and up are one kernel `[D, 2, F]`, so one matrix product makes both.
    """

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.d_model, config.ffn_dim
        dtype = jnp.dtype(execution.compute_dtype)
        init = nnx.initializers.normal(config.init_std)
        self.swiglu = config.swiglu
        fan = 2 if config.swiglu else 1
        self.up = nnx.Einsum(
            "BTD,DCF->BTCF",
            (D, fan, F),
            (fan, F) if config.use_bias else None,
            dtype=dtype,
            kernel_init=init,
            kernel_metadata=named("embed", "pair", "mlp"),
            bias_metadata=named("pair", "mlp"),
            rngs=rngs,
        )
        self.down = nnx.Einsum(
            "BTF,FD->BTD",
            (F, D),
            (D,) if config.use_bias else None,
            dtype=dtype,
            kernel_init=init,
            kernel_metadata=named("mlp", "embed"),
            bias_metadata=named("embed"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The feed-forward output of a (normalised) input."""
        up = self.up(x)
        if self.swiglu:
            hidden = nnx.silu(up[:, :, 0]) * up[:, :, 1]
        else:
            hidden = nnx.gelu(up[:, :, 0], approximate=False)
        # As its rows lie, wherever they go from here: XLA would gather `hidden` over `data` first.
        down = self.down(constrain(hidden, "batch", "length", "mlp"))
        return constrain(down, "batch", "length", "model")

    def padded(self, width: int) -> "FeedForward":
        """The same function with zeros behind `F`, up to a width: they add nothing to any sum."""
        more = (0, width - self.down.kernel.shape[0])
        layer = jax.tree.map(lambda leaf: leaf, self)  # the modules anew, the arrays as they are
        _pad(layer.up, (0, 0), (0, 0), more)
        _pad(layer.down, more, (0, 0))
        if layer.up.bias is not None:
            layer.up.bias = _padded(layer.up.bias, (0, 0), more)
        return layer


def _pad(product: nnx.Einsum, *widths: tuple[int, int]) -> None:
    product.kernel = _padded(product.kernel, *widths)
    product.kernel_shape = product.kernel.shape


def _padded(variable: nnx.Param[jax.Array], *widths: tuple[int, int]) -> nnx.Param[jax.Array]:
    return cast(nnx.Param[jax.Array], variable.replace(jnp.pad(variable.get_value(), widths)))
