"""What the query heads of each layer look at: the attention weights of a forward pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cla_jax.models import KV, Decoder, attend
from cla_jax.models.rotary import rotary

__all__ = ["attention_weights"]


def attention_weights(
    decoder: Decoder, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B N T S"], ...]:
    """The softmax weights of every layer over its owner's keys, in one forward pass.

    To look at models, not to run them: all weights of all layers are held at once. The layers are
    run with the attention that the model always uses; the weights are worked out beside it.

    Args:
        decoder: with its parameters.
        tokens: ids `[B, T]`, whole sequences.

    Returns:
        Of each layer float32 `[B, N, T, S]`, `S` = `T`: how much of key `s` query head `n` at
        position `t` takes. Rows sum to 1; keys behind the query have weight 0.
    """
    config = decoder.config
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    angles = rotary(positions, config.rotary, config.rope_theta, config.rope_scaling)
    x, owned, found = decoder.embed(tokens), dict[int, KV](), list[jax.Array]()
    for index, owner in enumerate(config.sharing.owners):
        layer = decoder.layer(index)
        h = layer.attention_norm(x)
        if index == owner:
            owned[index] = layer.keys_values(x, h, angles)

        def read(q: Float[Array, "B T N H"], kv: KV = owned[owner]) -> Float[Array, "B T N H"]:
            found.append(_weights(q, kv.k))
            return attend(q, kv)

        x = layer.read(x, h, read, angles)
    return tuple(found)


def _weights(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B N T S"]:
    """Query head `n` reads KV head `n // (N // K)`."""
    B, T, N, H = q.shape
    grouped = q.reshape(B, T, k.shape[2], -1, H)
    scores = jnp.einsum(
        "BTKRH,BSKH->BKRTS", grouped, k, preferred_element_type=jnp.float32
    ).reshape(B, N, T, k.shape[1])
    causal = jnp.tril(jnp.ones((T, k.shape[1]), bool))[None, None]
    return jax.nn.softmax(jnp.where(causal, scores * jnp.float32(H**-0.5), -jnp.inf), axis=-1)
