"""The train step: a pure function of (state, batch), and the loss under it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models import Decoder

type Params = dict[str, Any]
type Batch = dict[str, Any]
type Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, as plain arrays.

    Attributes:
        step: updates done, int32.
        params: nested dictionary of float32 parameters.
        opt_state: of the optimizer.
    """

    step: Any  # an array; JAX and Orbax also rebuild the state with shapes or None as leaves
    params: Params
    opt_state: optax.OptState


class Model:
    """A decoder taken apart: its parameters are passed in, everything else is here.

    `jax.jit` dispatches plain dictionaries several times faster than module objects, and a
    checkpoint of them can be read without this library.
    """

    def __init__(self, config: ModelConfig, execution: ExecutionConfig) -> None:
        self.config, self.execution = config, execution
        template = nnx.eval_shape(lambda: Decoder(config, execution, rngs=nnx.Rngs(0)))
        self._graphdef, self._abstract = nnx.split(template)

    def init(self, seed: int) -> Params:
        """Fresh parameters."""

        @jax.jit
        def make(key: jax.Array) -> Params:
            decoder = Decoder(self.config, self.execution, rngs=nnx.Rngs(key))
            return cast(Params, nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))

        return make(jax.random.key(seed))

    def __call__(self, params: Params) -> Decoder:
        """The decoder with these parameters; cheap under `jax.jit`."""
        state = jax.tree.map(lambda x: x, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return cast(Decoder, nnx.merge(self._graphdef, state))


def token_losses(
    model: Decoder,
    tokens: Int[Array, "B window"],
    documents: Int[Array, "B window"] | None = None,
) -> Float[Array, "B T"]:
    """Cross-entropy, in nats, of every next token.

    `execution.loss_chunk` bounds how many tokens' logits exist at a time: they are made, reduced
    and, in the backward pass, made again, chunk by chunk.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden = model.hidden(inputs, None if documents is None else documents[:, :-1])

    def losses(hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        logits = model.unembed(hidden)
        with jax.numpy_dtype_promotion("standard"):
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    chunk, count = model.execution.loss_chunk, targets.size
    if not chunk or chunk >= count:
        return losses(hidden, targets)
    check_loss_chunk(chunk, count)
    chunked = jax.lax.map(
        lambda xy: jax.checkpoint(losses)(*xy),
        (hidden.reshape(-1, 1, chunk, hidden.shape[-1]), targets.reshape(-1, 1, chunk)),
    )
    return chunked.reshape(targets.shape)


def check_loss_chunk(chunk: int, tokens: int) -> None:
    """Whether a batch's tokens are a whole number of chunks (or fewer than one).

    Raises:
        ValueError: names the nearest chunk that divides.
    """
    if chunk and chunk < tokens and tokens % chunk:
        divisors = [n for n in range(1, tokens + 1) if tokens % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - chunk))
        raise ValueError(
            f"loss_chunk={chunk} does not divide the batch's {tokens} tokens; the nearest that "
            f"does is {nearest}"
        )


def make_train_step(model: Model, optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted update `(state, batch) -> (state, metrics)`; the state passed in is donated.

    Metrics: `loss`, the mean over the batch's tokens, and `gradient_norm`, before clipping.
    """

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        losses = token_losses(model(params), batch["tokens"], batch.get("documents"))
        return losses.mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.named_scope("forward_backward"):
            loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = cast(Params, optax.apply_updates(state.params, updates))
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(model: Model) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted sum of a batch's masked losses, in nats, and the number of tokens they count."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(model(params), batch["tokens"], batch.get("documents"))
        return (losses * batch["mask"]).sum(), batch["mask"].sum()

    return eval_step


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Step 0."""
    params = model.init(seed)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
