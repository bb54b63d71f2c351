"""Training recipes: the papers', whole, and one for a CPU."""

from cla_jax.configs import DataConfig, ExecutionConfig, OptimizerConfig, TrainConfig

__all__ = ["RECIPES", "cla", "mlkv", "tiny"]


def cla(tokens: float, learning_rate: float = 3e-4) -> TrainConfig:
    """CLA section 3.1: 2048 sequences of 2048 tokens a step, AdamW, about 4 M validation tokens.

    Args:
        tokens: 30e9 for the 1B models, 100e9 for 3B (CLA Table 2).
        learning_rate: peak; 3e-4 is the design-space exploration's (section 3.2.1).
    """
    data = DataConfig(sequence_length=2048, batch_size=2048)
    return TrainConfig(
        steps=round(tokens / (data.sequence_length * data.batch_size)),
        micro_batch_size=16,
        data=data,
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        execution=ExecutionConfig(unroll=32, loss_chunk=8192),
        eval_tokens=4_000_000,
        eval_every=500,
    )


def mlkv() -> TrainConfig:
    """MLKV sections 4.3 and 4.4: uptraining on 2.46 M packed rows of 2048 tokens, 24 a step."""
    return TrainConfig(
        steps=round(2.46e6 / 24),
        data=DataConfig(sequence_length=2048, batch_size=24, packing="first_fit"),
        optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.01, warmup_fraction=0.2),
        execution=ExecutionConfig(unroll=32, loss_chunk=8192),
        eval_tokens=4_000_000,
        eval_every=5_000,
        checkpoint_every=1_000,
        log_every=10,
    )


def tiny(
    steps: int = 500, batch_size: int = 4, sequence_length: int = 256, seed: int = 0
) -> TrainConfig:
    """For the `tiny` models on a CPU: CLA's optimizer, at a learning rate for this size."""
    quarter = max(steps // 4, 1)
    return TrainConfig(
        steps=steps,
        seed=seed,
        data=DataConfig(sequence_length, batch_size, seed=seed),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        execution=ExecutionConfig(compute_dtype="float32"),  # bfloat16 is slow on CPUs
        eval_tokens=50_000,
        eval_every=quarter,
        checkpoint_every=quarter,
    )


RECIPES = {"tiny": tiny(), "cla-1b": cla(30e9), "cla-3b": cla(100e9), "mlkv": mlkv()}
