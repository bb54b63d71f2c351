"""Training: optimizer, step, checkpoints, metrics and the loop."""

from cla_jax.training.initial import InitialParams
from cla_jax.training.loss import token_losses, weighted_loss
from cla_jax.training.step import Model, TrainState, init_state, make_train_step
from cla_jax.training.trainer import Trained, check_run, train
from cla_jax.training.validation import validate

__all__ = [
    "InitialParams",
    "Model",
    "TrainState",
    "Trained",
    "check_run",
    "init_state",
    "make_train_step",
    "token_losses",
    "train",
    "validate",
    "weighted_loss",
]
