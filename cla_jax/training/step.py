"""The train step: a pure function of (state, batch), and the loss under it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models import Decoder
from cla_jax.models.sharding import logical_axes
from cla_jax.parallel import Layout
from cla_jax.training.loss import token_losses, weighted_loss

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

    @functools.cached_property
    def axes(self) -> Params:
        """The logical axes of every parameter, as tuples of names."""
        named = jax.tree.map(
            lambda variable: variable.replace(logical_axes(variable)),
            self._abstract,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
        return cast(Params, nnx.to_pure_dict(named))

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


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    layout: Layout | None = None,
) -> jax.stages.Wrapped:
    """The jitted update `(state, batch) -> (state, metrics)`; the state passed in is donated.

    The loss is the mean over the batch's tokens, over those that `batch["mask"]` counts where there
    is one. A step whose loss or gradient is not finite leaves the state as it was.

    Args:
        model: the decoder.
        optimizer: of its parameters.
        micro_batches: forward and backward passes that a batch is cut into; their gradients are
            summed in float32 (CLA section 3.1). Divides the batch.
        layout: where the state lies, before and after; the step is called with it in force.

    Returns:
        The step. Metrics: `loss`, and `gradient_norm` before clipping, both float32.
    """

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        return weighted_loss(
            model(params), batch["tokens"], batch["weights"], batch.get("documents")
        )

    def loss_and_gradients(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        rows, window = batch["tokens"].shape
        mask = batch.get("mask", jnp.ones((rows, window - 1), jnp.float32))
        batch = {**batch, "weights": mask / mask.sum()}
        if micro_batches == 1:
            return jax.value_and_grad(loss_fn)(params, batch)
        # Strided, not contiguous: every device keeps rows of its own in each micro-batch.
        micro = jax.tree.map(
            lambda x: x.reshape(rows // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1),
            batch,
        )

        def add(total: Any, rows: Batch) -> tuple[Any, None]:
            one = jax.value_and_grad(loss_fn)(params, rows)
            return jax.tree.map(jnp.add, total, one), None

        zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zeros, micro)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.named_scope("forward_backward"):
            loss, grads = loss_and_gradients(state.params, batch)
        with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
            norm = optax.tree.norm(grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = cast(Params, optax.apply_updates(state.params, updates))
            updated = TrainState(state.step + 1, params, opt_state)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return state, {"loss": loss, "gradient_norm": norm}

    if layout is None:
        return jax.jit(train_step, donate_argnums=0)
    shardings = (state_shardings(model, optimizer, layout), layout.replicated)
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def make_eval_step(model: Model) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted sum of a batch's masked losses, in nats, and the number of tokens they count."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        losses = token_losses(model(params), batch["tokens"], batch.get("documents"))
        return (losses * batch["mask"]).sum(), batch["mask"].sum()

    return eval_step


def init_state(
    model: Model, optimizer: optax.GradientTransformation, seed: int, layout: Layout | None = None
) -> TrainState:
    """Step 0 with random parameters, which are made where they lie: no device holds them all."""
    if layout is None:
        return begin_state(model.init(seed), optimizer)
    shardings = state_shardings(model, optimizer, layout)
    make = jax.jit(lambda: _begin(model.init(seed), optimizer), out_shardings=shardings)
    return make()


def begin_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """Step 0 with given parameters: float32 arrays.

    Args:
        params: the parameters.
        optimizer: of them.
        shardings: where they lie on a mesh, and the rest is to.
    """
    if shardings is None:
        return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    return jax.jit(lambda params: _begin(params, optimizer), out_shardings=shardings)(params)


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Where every array of a state lies: what the optimizer keeps of a parameter lies with it."""
    return _shardings(_shapes(model, optimizer), model, optimizer, layout)


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, layout: Layout | None = None
) -> TrainState:
    """The shapes of a state, with where they lie: what a checkpoint is restored into.

    Args:
        model: the decoder.
        optimizer: of its parameters.
        layout: of the state; default the default device.
    """
    shapes = _shapes(model, optimizer)
    if layout is None:
        here = jnp.zeros((), jnp.int32).sharding
        shardings = jax.tree.map(lambda _: here, shapes)
    else:
        shardings = _shardings(shapes, model, optimizer, layout)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _shapes(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    return jax.eval_shape(lambda: _begin(model.init(0), optimizer))


def _shardings(
    shapes: TrainState, model: Model, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
    of_params = layout.of(model.axes)
    of_optimizer = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        of_params,
        transform_non_params=lambda _: layout.replicated,
    )
    return TrainState(layout.replicated, of_params, of_optimizer)


def _begin(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
