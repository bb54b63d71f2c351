"""The decoder layer: the same for owners and readers, Llama and GPT-NeoX."""

import functools

from flax import nnx
from jaxtyping import Array, Float

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models.attention import (
    KV,
    Attend,
    KVProjection,
    LayerContext,
    QueryAttention,
    attend,
)
from cla_jax.models.feedforward import FeedForward
from cla_jax.models.normalization import Norm
from cla_jax.models.rotary import Rotary
from cla_jax.models.sharding import constrain


class DecoderLayer(nnx.Module):
    """`(x, kv) -> (x, kv)`: an owner makes the K/V it returns, a reader passes on what it is given.

    A reader holds no K/V parameters. Where the norms are separate (CLA section 3.1), an owner has
    a norm of its own before its K/V projection.
    """

    def __init__(
        self, config: ModelConfig, execution: ExecutionConfig, owns_kv: bool, *, rngs: nnx.Rngs
    ) -> None:
        self.parallel_residual = config.parallel_residual
        self.attention_norm = Norm(config, execution, rngs=rngs)
        self.attention = QueryAttention(config.attention, execution, rngs=rngs)
        self.kv_projection = nnx.data(
            KVProjection(config.attention, execution, rngs=rngs) if owns_kv else None
        )
        own_norm = owns_kv and config.separate_kv_norm
        self.kv_norm = nnx.data(Norm(config, execution, rngs=rngs) if own_norm else None)
        self.ffn_norm = Norm(config, execution, rngs=rngs)
        self.ffn = FeedForward(config, execution, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], kv: KV | None, context: LayerContext
    ) -> tuple[Float[Array, "B T D"], KV]:
        """Run the layer over whole sequences; `kv` is None for an owner.

        Raises:
            ValueError: an owner was given K/V, or a reader none.
        """
        if (self.kv_projection is None) == (kv is None):
            role, given = ("reads", "given none") if kv is None else ("owns", "given another's")
            raise ValueError(
                f"a layer that {role} K/V was {given}: its parameters were made for another "
                "sharing map"
            )
        h = self.attention_norm(x)
        if kv is None:
            kv = self.keys_values(x, h, context.rotary)
        read = functools.partial(attend, kv=kv, documents=context.documents)
        return self.read(x, h, read, context.rotary), kv

    def keys_values(self, x: Float[Array, "B T D"], h: Float[Array, "B T D"], angles: Rotary) -> KV:
        """An owner's K/V: projected, the keys rotated.

        Args:
            x: the layer's input.
            h: `attention_norm` of it, made once for queries and K/V; an owner with a norm of its
                own does not use it.
            angles: of the positions.
        """
        assert self.kv_projection is not None, "a reader projects no K/V"
        return self.kv_projection(h if self.kv_norm is None else self.kv_norm(x), angles)

    def read(
        self,
        x: Float[Array, "B T D"],
        h: Float[Array, "B T D"],
        attend: Attend,
        angles: Rotary,
    ) -> Float[Array, "B T D"]:
        """The rest of the layer, which owners and readers have alike.

        Args:
            x: the layer's input.
            h: `attention_norm` of it.
            attend: from rotated queries `[B, T, N, H]` to what they find in the layer's K/V.
            angles: of the queries' positions.
        """
        x = self.feed_forward(x, self.attention(h, attend, angles))
        return constrain(x, "batch", "length", "model")

    def feed_forward(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """What is behind attention, laid out as it comes: `read` without its first half.

        Args:
            x: the layer's input.
            attended: `attention`'s output, whatever K/V it read: a forward pass's or a cache's.
        """
        if self.parallel_residual:
            return x + attended + self.ffn(self.ffn_norm(x))
        x = x + attended
        return x + self.ffn(self.ffn_norm(x))
