"""RMSNorm and LayerNorm, by the model's configuration."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models.sharding import named


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a bias, over the model dimension; statistics in float32.

    Both papers call it layer-norm. CLA's is said of a "Llama-like" model, whose norm is RMSNorm:
    our default (docs/paper-notes.md).
    """

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(execution.compute_dtype)
        scale = named("norm")
        if config.rms_norm:
            self.norm = nnx.RMSNorm(
                config.d_model, epsilon=config.norm_epsilon, dtype=dtype, scale_metadata=scale,
                rngs=rngs,
            )  # fmt: skip
        else:
            self.norm = nnx.LayerNorm(
                config.d_model, epsilon=config.norm_epsilon, dtype=dtype, scale_metadata=scale,
                bias_metadata=named("norm"), use_fast_variance=False, rngs=rngs,
            )  # fmt: skip

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normalised input, in the compute dtype."""
        # Flax mixes its float32 statistics with bfloat16 inputs on purpose.
        with jax.numpy_dtype_promotion("standard"):
            return self.norm(x)
