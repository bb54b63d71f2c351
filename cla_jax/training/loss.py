"""Cross-entropy of next tokens without a whole vocabulary of float32 logits at a time."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cla_jax.models import Decoder
from cla_jax.models.sharding import constrain, laid_out_as, shards

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
        float32 `[B, T]`. At most `execution.loss_chunk` tokens' logits exist on a device at a time.
    """
    hidden, targets = _hidden_and_targets(model, tokens, documents)

    def losses(hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        with jax.numpy_dtype_promotion("standard"):
            return optax.softmax_cross_entropy_with_integer_labels(model.unembed(hidden), targets)

    # To `unembed` a chunk is a row for each device.
    rows = tuple(_in_chunks(model, x) for x in (hidden, targets))
    with laid_out_as(batch="batch_loss"):
        chunks = jax.lax.map(lambda xy: losses(*xy), rows)
    return _from_chunks(model, chunks, *targets.shape)


def weighted_loss(
    model: Decoder,
    tokens: Int[Array, "B window"],
    weights: Float[Array, "B T"],
    documents: Int[Array, "B window"] | None = None,
) -> Float[Array, ""]:
    """The sum of the next tokens' cross-entropies times `weights`; for training.

    Where a gradient is asked for, the forward pass makes it chunk by chunk (`execution.loss_chunk`
    tokens of each device), while a chunk's logits are there: none are kept and none are made twice.
    The logits' gradient is rounded to the compute dtype before the two matrix products of the
    backward pass, which accumulate in float32.

    Args:
        model: with its parameters.
        tokens: `[B, T + 1]`.
        weights: float32 `[B, T]`, of the targets; constants to differentiation.
        documents: as in `token_losses`.
    """
    hidden, targets = _hidden_and_targets(model, tokens, documents)
    rows = (_in_chunks(model, x) for x in (hidden, targets, weights))
    return _loss(next(rows), model.unembedding(), *rows)


def _hidden_and_targets(
    model: Decoder, tokens: jax.Array, documents: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    hidden = model.hidden(tokens[:, :-1], None if documents is None else documents[:, :-1])
    return hidden, tokens[:, 1:]


@jax.custom_vjp
def _loss(
    hidden: Float[Array, "chunks devices tokens D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "chunks devices tokens"],
    weights: Float[Array, "chunks devices tokens"],
) -> Float[Array, ""]:
    def add(total: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, weights = rows
        losses, _ = _losses(hidden, kernel, targets)
        return total + (losses * weights).sum(axis=1), None

    zeros = _of_devices(jnp.zeros(hidden.shape[1], jnp.float32))
    return jax.lax.scan(add, zeros, (hidden, targets, weights))[0].sum()


def _loss_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, _Residuals]:
    # On a mesh: rounded where it lies and gathered over `fsdp` here, not again for every chunk.
    low = constrain(kernel.astype(hidden.dtype), "embed", "vocab")
    low = constrain(low, None, "vocab")

    def add(
        carry: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, kernel_gradient = carry
        hidden, targets, weights = rows
        losses, probabilities = _losses(hidden, low, targets)
        vocabulary = jnp.arange(kernel.shape[1], dtype=targets.dtype)[None, None, :]
        wanted = (vocabulary == targets[..., None]).astype(jnp.float32)
        gradient = (probabilities - wanted) * weights[..., None]
        gradient = gradient.astype(hidden.dtype)
        kernel_gradient += jnp.einsum(
            "PTD,PTV->PDV", hidden, gradient, preferred_element_type=jnp.float32
        )
        hidden_gradient = jnp.einsum("PTV,DV->PTD", gradient, low)
        total += (losses * weights).sum(axis=1)
        return (total, _of_devices(kernel_gradient, None, "vocab")), hidden_gradient

    # Each device sums over its own tokens; the sums meet once, behind the last chunk.
    devices = hidden.shape[1]
    zeros = (
        _of_devices(jnp.zeros(devices, jnp.float32)),
        _of_devices(jnp.zeros((devices, *kernel.shape), jnp.float32), None, "vocab"),
    )
    (total, kernel_gradient), hidden_gradient = jax.lax.scan(add, zeros, (hidden, targets, weights))
    kernel_gradient = constrain(kernel_gradient.sum(axis=0), "embed", "vocab")
    return total.sum(), (hidden_gradient, kernel_gradient, weights)


def _loss_backward(
    residuals: _Residuals, scale: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    hidden, kernel, weights = residuals
    return hidden * scale.astype(hidden.dtype), kernel * scale, None, jnp.zeros_like(weights)


_loss.defvjp(_loss_forward, _loss_backward)


def _losses(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses `[devices, tokens]` and probabilities `[devices, tokens, V]` of a chunk, float32."""
    logits = jnp.einsum(
        "PTD,DV->PTV", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normalizer - target, jnp.exp(logits - normalizer[..., None])


def _in_chunks(model: Decoder, x: jax.Array) -> jax.Array:
    """`[B, T, ...]` as `[chunks, devices, tokens, ...]`: a device's tokens are of its own rows.

    Where they are no whole chunks, zeros fill up the last tokens of a part of the batch.
    """
    parts, devices, chunks, chunk = _chunking(model, x.shape[0] * x.shape[1])
    cut = x.reshape(parts, -1, *x.shape[2:])
    if more := devices * chunks * chunk // parts - cut.shape[1]:
        # Where the stages are to share the tokens, each cuts its own out of all of a part's.
        cut = constrain(cut, "batch", *[None] * (cut.ndim - 1))
        cut = jnp.pad(cut, [(0, 0), (0, more)] + [(0, 0)] * (cut.ndim - 2))
        cut = constrain(cut, "batch", *[None] * (cut.ndim - 1))
    dealt = cut.reshape(devices, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)
    return constrain(dealt, None, "batch_loss", *[None] * (dealt.ndim - 2))


def _from_chunks(model: Decoder, chunks: jax.Array, rows: int, length: int) -> jax.Array:
    """The inverse of `_in_chunks`, for `[B, T]`."""
    parts, *_ = _chunking(model, rows * length)
    own = chunks.swapaxes(0, 1).reshape(parts, -1)[:, : rows * length // parts]
    return own.reshape(rows, length)


def _chunking(model: Decoder, tokens: int) -> tuple[int, int, int, int]:
    """Parts of the batch, devices that share their tokens, a device's chunks, tokens of one."""
    devices = shards("batch_loss")
    parts = math.gcd(shards("batch"), devices)
    if tokens % parts:
        raise ValueError(f"the mesh splits {tokens} tokens by {parts}, which does not divide them")
    own = -(-(tokens // parts) // (devices // parts))
    chunk = model.execution.loss_chunk_of(own)
    return parts, devices, -(-own // chunk), chunk


def _of_devices(x: jax.Array, *axes: str | None) -> jax.Array:
    """Split by devices along the first axis, and along the others as named."""
    return constrain(x, "batch_loss", *axes)
