"""Feed-forward layers: SwiGLU (Shazeer 2020) and GELU."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models.sharding import constrain, named


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
        return self.down(constrain(hidden, "batch", "length", "mlp"))
