"""Cross-entropy of next tokens without a whole vocabulary of float32 logits at a time."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cla_jax.configs import nearest_divisor
from cla_jax.models import Decoder
from cla_jax.models.sharding import constrain, rows_laid_out_as, shards

type _Residuals = tuple[jax.Array, jax.Array, jax.Array]


def token_losses(
    model: Decoder,
    tokens: Int[Array, "B window"],
    documents: Int[Array, "B window"] | None = None,
) -> Float[Array, "B T"]:
    """Cross-entropy, in nats, of every next token; for evaluation.

    Args:
        model: with its parameters.
        tokens: `[B, T + 1]`: inputs and, shifted by one, targets.
        documents: the document of each token, to mask attention by.

    Returns:
        float32 `[B, T]`. At most `execution.loss_chunk` tokens' logits exist at a time.
    """
    hidden, targets = _hidden_and_targets(model, tokens, documents)

    def losses(hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        with jax.numpy_dtype_promotion("standard"):
            return optax.softmax_cross_entropy_with_integer_labels(model.unembed(hidden), targets)

    chunk = _chunk(model, targets.size)
    if chunk == targets.size:
        return losses(hidden, targets)
    # Rows of one token each: as such they are split.
    rows = (_in_chunks(chunk, hidden)[:, :, None], _in_chunks(chunk, targets)[:, :, None])
    with rows_laid_out_as("batch_loss"):
        chunked = jax.lax.map(lambda xy: losses(*xy), rows)
    return _out_of_chunks(chunked[:, :, 0], targets.shape)


def weighted_loss(
    model: Decoder,
    tokens: Int[Array, "B window"],
    weights: Float[Array, "B T"],
    documents: Int[Array, "B window"] | None = None,
) -> Float[Array, ""]:
    """The sum of the next tokens' cross-entropies times `weights`; for training.

    Where a gradient is asked for, the forward pass makes it chunk by chunk (`execution.loss_chunk`
    tokens), while a chunk's logits are there: none are kept and none are made twice. The logits'
    gradient is rounded to the compute dtype before the two matrix products of the backward pass,
    which accumulate in float32.

    Args:
        model: with its parameters.
        tokens: `[B, T + 1]`.
        weights: float32 `[B, T]`, of the targets; constants to differentiation.
        documents: as in `token_losses`.
    """
    hidden, targets = _hidden_and_targets(model, tokens, documents)
    chunk = _chunk(model, targets.size)
    rows = (_in_chunks(chunk, x) for x in (hidden, targets, weights))
    return _loss(next(rows), model.unembedding(), *rows)


def check_loss_chunk(chunk: int, tokens: int) -> None:
    """Whether a batch's tokens are a whole number of chunks (or fewer than one).

    Raises:
        ValueError: names the nearest chunk that divides.
    """
    if chunk and chunk < tokens and tokens % chunk:
        nearest = nearest_divisor(tokens, chunk)
        raise ValueError(
            f"loss_chunk={chunk} does not divide the batch's {tokens} tokens; the nearest that "
            f"does is {nearest}"
        )


def _hidden_and_targets(
    model: Decoder, tokens: jax.Array, documents: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(tokens[:, :-1], None if documents is None else documents[:, :-1])
    return hidden, tokens[:, 1:]


def _chunk(model: Decoder, tokens: int) -> int:
    chunk = model.execution.loss_chunk
    check_loss_chunk(chunk, tokens)
    taken, parts = min(chunk or tokens, tokens), shards("batch_loss")
    if taken % parts:
        raise ValueError(
            f"the mesh splits the loss by {parts}, which does not divide {taken} tokens"
        )
    return taken


@jax.custom_vjp
def _loss(
    hidden: Float[Array, "chunks tokens D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "chunks tokens"],
    weights: Float[Array, "chunks tokens"],
) -> Float[Array, ""]:
    def add(total: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, weights = rows
        losses, _ = _losses(hidden, kernel, targets)
        return total + (losses * weights).sum(), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]


def _loss_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, _Residuals]:
    # On a mesh: gathered over `fsdp` here, once, and not again for every chunk.
    low = constrain(kernel.astype(hidden.dtype), None, "vocab")

    def add(
        carry: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, kernel_gradient = carry
        hidden, targets, weights = rows
        losses, probabilities = _losses(hidden, low, targets)
        wanted = jnp.arange(kernel.shape[1], dtype=targets.dtype)[None, :] == targets[:, None]
        gradient = (probabilities - wanted.astype(jnp.float32)) * weights[:, None]
        gradient = gradient.astype(hidden.dtype)
        kernel_gradient += jnp.einsum(
            "TD,TV->DV", hidden, gradient, preferred_element_type=jnp.float32
        )
        hidden_gradient = jnp.einsum("TV,DV->TD", gradient, low)
        return (total + (losses * weights).sum(), kernel_gradient), hidden_gradient

    zeros = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (total, kernel_gradient), hidden_gradient = jax.lax.scan(add, zeros, (hidden, targets, weights))
    return total, (hidden_gradient, kernel_gradient, weights)


def _loss_backward(
    residuals: _Residuals, scale: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    hidden, kernel, weights = residuals
    return hidden * scale.astype(hidden.dtype), kernel * scale, None, jnp.zeros_like(weights)


_loss.defvjp(_loss_forward, _loss_backward)


def _losses(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses `[tokens]` and probabilities `[tokens, V]` of one chunk, float32."""
    logits = jnp.einsum(
        "TD,DV->TV", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return normalizer - target, jnp.exp(logits - normalizer[:, None])


def _in_chunks(chunk: int, x: jax.Array) -> jax.Array:
    """`[B, T, ...]` as `[chunks, chunk, ...]`; on a mesh every device has its share of each."""
    parts = shards("batch_loss")
    if parts == 1:
        return x.reshape(-1, chunk, *x.shape[2:])
    dealt = x.reshape(parts, -1, chunk // parts, *x.shape[2:]).swapaxes(0, 1)
    return _split(dealt.reshape(-1, chunk, *x.shape[2:]))


def _out_of_chunks(chunked: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_in_chunks`, for `[chunks, chunk]`."""
    parts = shards("batch_loss")
    if parts == 1:
        return chunked.reshape(shape)
    chunks, chunk = _split(chunked).shape
    return chunked.reshape(chunks, parts, chunk // parts).swapaxes(0, 1).reshape(shape)


def _split(chunked: jax.Array) -> jax.Array:
    return constrain(chunked, None, "batch_loss", *[None] * (chunked.ndim - 2))
