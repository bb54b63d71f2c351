"""The decoder-only transformer: embedding, a stack that shares K/V, norm, output projection."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models.attention import KV, LayerContext
from cla_jax.models.feedforward import padded_width
from cla_jax.models.layers import DecoderLayer
from cla_jax.models.normalization import Norm
from cla_jax.models.pipeline import pipeline_layers
from cla_jax.models.rotary import positions_in_documents, rotary
from cla_jax.models.sharding import constrain, laid_out, logical_axes, named, shards
from cla_jax.models.stack import stack_layers, unstack_layer


class Decoder(nnx.Module):
    """A Llama-like or GPT-NeoX decoder whose layers share K/V by `config.sharing`.

    Parameters are float32 and the same however the model is executed: scanned, unrolled,
    rematerialised or in bfloat16.

    Args:
        config: the architecture.
        execution: how it is run.
        rngs: random streams for the initial parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.execution = config, execution
        init = nnx.initializers.normal(config.init_std)
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.d_model,
            # Looked up in float32 and rounded after: a frequent token's gradient is the sum of
            # thousands of rows, which bfloat16 sums coarsely and GPUs add slowly.
            dtype=jnp.float32,
            embedding_init=init,
            embedding_metadata=named("vocab", "embed"),
            rngs=rngs,
        )
        self.layers = stack_layers(
            lambda owns_kv, r: DecoderLayer(config, execution, owns_kv, rngs=r),
            config.sharing,
            rngs=rngs,
        )
        self.final_norm = Norm(config, execution, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tied_embeddings:
            self.head = nnx.data(
                nnx.Param(
                    init(rngs.params(), (config.d_model, config.vocab_size)),
                    **named("embed", "vocab"),
                )
            )

    def __call__(
        self, tokens: Int[Array, "B T"], documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each position, float32.

        Args:
            tokens: ids below `config.vocab_size`.
            documents: document of each token, an id that does not come back later in its row. When
                given, attention stays within a document and positions restart at its start.
        """
        return self.unembed(self.hidden(tokens, documents))

    def hidden(
        self, tokens: Int[Array, "B T"], documents: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Activations after the final norm, in the compute dtype; arguments as in a call."""
        if documents is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        else:
            positions = positions_in_documents(documents)
        config = self.config
        angles = rotary(positions, config.rotary, config.rope_theta, config.rope_scaling)
        context = LayerContext(angles, documents)
        return self.final_norm(self._run_layers(self.embed(tokens), context))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embeddings of tokens, in the compute dtype; NaN for an id beyond the vocabulary."""
        # Looked up as they are and rounded after (the constructor says why).
        # Gathered over `fsdp` as every other parameter is, and not the activations for its sake.
        table = constrain(self.embedding.embedding[...], "vocab", "model")
        x = jnp.take(table, tokens, axis=0)
        return constrain(x.astype(self.execution.compute_dtype), "batch", "length", "model")

    def _run_layers(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        return pipeline_layers(
            lambda layer, x, kv, context: layer(x, kv, context),
            self.config.sharing,
            self.layers,
            x,
            context,
            self.execution,
            prepare=lambda layers: _rounded(layers, jnp.dtype(self.execution.compute_dtype)),
        )

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, float32, of activations after the final norm."""
        logits = jnp.einsum(
            "BTD,DV->BTV",
            hidden,
            self.unembedding().astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits, "batch", "length", "vocab")

    def unembedding(self) -> Float[Array, "D V"]:
        """The output projection as it is held; the embedding's transpose where they are tied."""
        return self.embedding.embedding[...].T if self.head is None else self.head[...]

    def layer(self, index: int) -> DecoderLayer:
        """One layer by its index, with parameters of its own shape rather than stacked."""
        return cast(DecoderLayer, unstack_layer(self.layers, self.config.sharing, index))

    def unstacked(self) -> "UnstackedDecoder":
        """The same decoder for inference: see `UnstackedDecoder`."""
        return jax.jit(UnstackedDecoder)(self)


class UnstackedDecoder(Decoder):
    """A decoder with a module for each layer, and weights in the compute dtype.

    A step that decodes reads every weight once for a handful of tokens. Stacked weights would be
    sliced, and float32 weights rounded, again at every step: here both are done once. It computes
    what the decoder it is made of computes: the weights are rounded to what their products would
    round them to, and the norms stay float32.

    The FFN's width is padded with zeros to whole tiles. XLA splits the sum over `F` of a product of
    few rows, and would pad the weights for that at every step (0.45 GB of those of `1B`).

    On a mesh query heads lie where a cache's KV heads do: where a cache is split by rows, every
    device has a copy of the attention's weights, for all heads of its own rows.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.config, self.execution = decoder.config, decoder.execution
        dtype = jnp.dtype(self.execution.compute_dtype)
        self.embedding = laid_out(_rounded(decoder.embedding, dtype))
        self.layers = nnx.List(
            _padded(laid_out(_rounded(_beside_cache(decoder.layer(i)), dtype)), self.config.ffn_dim)
            for i in range(self.config.num_layers)
        )
        self.final_norm = decoder.final_norm
        self.head = nnx.data(laid_out(_rounded(decoder.head, dtype)))

    def _run_layers(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        kv: dict[int, KV] = {}
        for index, owner in enumerate(self.config.sharing.owners):
            x, kv[index] = self.layer(index)(x, kv.get(owner), context)
        return x

    def layer(self, index: int) -> DecoderLayer:
        """One layer by its index."""
        return cast(DecoderLayer, self.layers[index])

    def unstacked(self) -> "UnstackedDecoder":
        """Itself."""
        return self


def _beside_cache(layer: DecoderLayer) -> DecoderLayer:
    """A layer whose query heads are named as a cache's are."""

    def rename(variable: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        names = ("cache_heads" if axis == "heads" else axis for axis in logical_axes(variable))
        return variable.replace(variable.get_value(), out_sharding=tuple(names))

    layer = jax.tree.map(lambda leaf: leaf, layer)  # the modules anew, the arrays as they are
    layer.attention = jax.tree.map(
        rename, layer.attention, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    return layer


def _padded(layer: DecoderLayer, width: int) -> DecoderLayer:
    wider = padded_width(width)
    if wider > width and wider % shards("mlp") == 0:
        layer.ffn = laid_out(layer.ffn.padded(wider))
    return layer


def _rounded[M](module: M, dtype: jnp.dtype) -> M:
    """Modules with their arrays in a dtype, but for those of their norms."""
    return jax.tree.map(
        lambda m: m if isinstance(m, Norm) else m.astype(dtype),
        module,
        is_leaf=lambda m: isinstance(m, Norm),
    )
