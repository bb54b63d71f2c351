"""AdamW with linear warm-up and cosine decay: the recipe of both papers, by configuration."""

from typing import Any

import jax
import optax

from cla_jax.configs import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over the warm-up, then cosine to `final_fraction` of the peak.

    (CLA section 3.1: 5 % warm-up, decay to 10 % of the peak over the rest.)
    """
    warmup = round(config.warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.final_fraction * config.learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    Weight decay is on matrices and embeddings, not on norms and biases: neither paper says, and
    this is the custom (docs/paper-notes.md).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: str(getattr(path[-1], "key", path[-1])) not in ("bias", "scale"), params
    )
