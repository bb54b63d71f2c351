"""What a train step costs on a mesh, from a state and tokens that are made where they lie."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.evaluation.ahead_of_time import lower_train_step
from cla_jax.parallel import Layout, in_force
from cla_jax.training import Model, TrainState
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import init_state

__all__ = ["TrainLoop"]


class TrainLoop:
    """The train step for one recipe and mesh, traced; to be compiled, begun and run.

    Compile it before a state takes the memory: XLA tries out matrix products as it compiles.
    Several may be compiled at once, in threads.

    Args:
        config: the model.
        training: the recipe, of which batch, sequence length, optimizer and execution count.
        layout: of the model, on one device (`Layout.on(MeshConfig(), config)`) or many.

    Attributes:
        layout: as given.
        compiled: the program; None until `compile`.
        compile_seconds: it took, that of the initial state with it.
        state: None until `begin`.
    """

    def __init__(self, config: ModelConfig, training: TrainConfig, layout: Layout) -> None:
        self.layout, data = layout, training.data
        model = Model(config, training.execution)
        optimizer = make_optimizer(training.optimizer, training.steps)
        shape = (data.batch_size, data.sequence_length + 1)

        def tokens() -> jax.Array:
            return jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size, jnp.int32)

        self._lowered = lower_train_step(config, training, layout)
        with in_force(layout):
            begin = jax.jit(lambda: init_state(model, optimizer, 0, layout))
            self._begin: Any = begin.lower()
            draw = jax.jit(tokens, out_shardings=layout.of(("batch", "length")))
            self._draw: Any = draw.lower()
        self._tokens: Any = None
        self.compiled: Any = None
        self.compile_seconds = 0.0
        self.state: TrainState | None = None

    def compile(self) -> None:
        """Compile the step, and what makes state and tokens."""
        began = time.perf_counter()
        self.compiled = self._lowered.compile()
        self._begin, self._draw = self._begin.compile(), self._draw.compile()
        self.compile_seconds = time.perf_counter() - began

    def begin(self, state: TrainState | None = None) -> None:
        """Make the state at step 0, random weights, and one batch of random tokens.

        Args:
            state: of the same mesh, to go on with instead.
        """
        self.state = jax.block_until_ready(self._begin()) if state is None else state
        self._tokens = jax.block_until_ready(self._draw())

    def run(self) -> tuple[float, float]:
        """Take a step, always on the same batch: its seconds, and the loss before it."""
        began = time.perf_counter()
        with in_force(self.layout):
            self.state, metrics = self.compiled(self.state, {"tokens": self._tokens})
        loss = float(metrics["loss"])
        jax.block_until_ready(self.state)
        return time.perf_counter() - began, loss

    def end(self) -> None:
        """Free the state and the tokens."""
        self.state = self._tokens = None
