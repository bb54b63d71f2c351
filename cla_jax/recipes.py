"""Training recipes: the CLA paper's at every scale, and MLKV's.

At `1B` and `3B` they are the paper's (CLA section 3.1 and Table 2). `mini` is for one GPU and
`tiny` for two CPU cores; what is not a matter of size (optimizer, schedule) is the paper's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from cla_jax.configs import DataConfig, ExecutionConfig, OptimizerConfig, TrainConfig

__all__ = [
    "LOSS_CHUNK",
    "MLKV_SCALES",
    "RECIPES",
    "SCALES",
    "Scale",
    "climb",
    "mlkv",
    "next_rate",
    "recipe",
]

LOSS_CHUNK = 4096  # tokens whose logits exist at a time: 0.8 GB of a 50,432-word vocabulary's


@dataclasses.dataclass(frozen=True)
class Scale:
    """How the models of a scale are trained.

    Attributes:
        tokens: training tokens.
        sequence_length: tokens per sequence.
        batch_size: sequences per step.
        micro_batch: sequences per forward and backward pass, gradients summed; 0: all at once.
        learning_rate: peak, where the experiment does not search for it.
        first_rate: where the search for it begins.
        validation_tokens: at most, each time.
        validations: how many, evenly over the run; the last is at its end.
        log_every: steps between metric records.
        execution: how the models are run.
        packing: of documents into rows.
        optimizer: all of it but the learning rate.
    """

    tokens: int
    sequence_length: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    first_rate: float
    validation_tokens: int
    validations: int
    log_every: int
    execution: ExecutionConfig
    packing: Literal["concat", "first_fit"] = "concat"
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009 (frozen)


# Whole segments unrolled: worth a quarter of the speed on a GPU (docs/results.md).
_GPU = ExecutionConfig(unroll=20, loss_chunk=LOSS_CHUNK)
SCALES: dict[str, Scale] = {
    "tiny": Scale(
        tokens=300 * 4 * 256, sequence_length=256, batch_size=4, micro_batch=0, learning_rate=3e-3,
        first_rate=1e-3, validation_tokens=50_000, validations=3, log_every=1,
        execution=ExecutionConfig(compute_dtype="float32"),  # bfloat16 is slow on CPUs
    ),
    "mini": Scale(
        tokens=100_000_000, sequence_length=2048, batch_size=16, micro_batch=0,
        learning_rate=6e-4, first_rate=3e-4, validation_tokens=1_000_000, validations=10,
        log_every=10, execution=_GPU,
    ),
    "1B": Scale(
        tokens=30_000_000_000, sequence_length=2048, batch_size=2048, micro_batch=16,
        learning_rate=3e-4, first_rate=3e-4, validation_tokens=4_000_000, validations=20,
        log_every=1, execution=_GPU,
    ),
    "3B": Scale(
        tokens=100_000_000_000, sequence_length=2048, batch_size=2048, micro_batch=8,
        learning_rate=1e-3, first_rate=3e-4, validation_tokens=4_000_000, validations=20,
        log_every=1, execution=_GPU,
    ),
}  # fmt: skip


def recipe(
    scale: Scale,
    *,
    tokens: int | float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
) -> TrainConfig:
    """The recipe of a run; what is None is the scale's.

    The data order is the same whatever the seed, which is the parameters' (CLA section 3.2: "using
    a consistent data order").

    Raises:
        ValueError: fewer tokens than one step takes.
    """
    size = scale.batch_size if batch_size is None else batch_size
    data = DataConfig(scale.sequence_length, size, seed=0, packing=scale.packing)
    per_step = size * scale.sequence_length
    wanted = scale.tokens if tokens is None else tokens
    if not wanted >= per_step:
        raise ValueError(
            f"tokens={wanted:g} is less than one step of {size} x {scale.sequence_length} tokens "
            f"takes; the least is {per_step}"
        )
    steps = round(wanted / per_step)
    # The scale's micro-batch is made to divide; one that was asked for must.
    micro = math.gcd(scale.micro_batch, size) if scale.micro_batch else 0
    micro = micro if micro_batch is None else micro_batch
    return TrainConfig(
        steps=steps,
        micro_batch_size=micro,
        seed=seed,
        data=data,
        optimizer=dataclasses.replace(
            scale.optimizer,
            learning_rate=scale.learning_rate if learning_rate is None else learning_rate,
        ),
        execution=scale.execution,
        eval_every=-(-steps // scale.validations),
        eval_tokens=scale.validation_tokens,
        checkpoint_every=max(-(-steps // scale.validations), min(100, steps)),
        log_every=min(scale.log_every, steps),
    )


# CLA section 3.2.2: from 3e-4 "in multiplicative increments of 1.5x", as Tables 3 and 5 print it.
_PRINTED_RATES = (3e-4, 4.5e-4, 6.75e-4, 1e-3, 1.5e-3, 2.25e-3)


def next_rate(rate: float) -> float:
    """The learning rate above this one: the paper's printed ladder, then x 1.5 to three digits.

    Examples:
        >>> [next_rate(rate) for rate in (3e-4, 6.75e-4, 2.25e-3)]
        [0.00045, 0.001, 0.00338]
    """
    above = 1.5 * rate
    for printed in _PRINTED_RATES:
        if math.isclose(above, printed, rel_tol=0.02):
            return printed
    return float(f"{above * (1 + 1e-9):.2e}")  # 3.375e-3 goes up


def climb(
    perplexity_at: Callable[[float], float | None], start: float
) -> tuple[tuple[float, float], ...]:
    """Rates from `start` upwards until the perplexity stops improving (CLA section 3.2.2).

    Args:
        perplexity_at: trains at a learning rate; `inf` for a run that diverged; None if there is
            no answer, which ends the climb.
        start: the first rate.

    Returns:
        The rates with their perplexities, in order; the last is no better than the one before,
        unless the climb was ended.
    """
    seen, rate = list[tuple[float, float]](), start
    while (perplexity := perplexity_at(rate)) is not None:
        seen.append((rate, perplexity))
        if perplexity == math.inf or (len(seen) > 1 and not perplexity < seen[-2][1]):
            break
        rate = next_rate(rate)
    return tuple(seen)


# MLKV sections 4.3 and 4.4: 2.46 M packed rows of 2048 tokens, 24 a step.
_UPTRAINING = OptimizerConfig(weight_decay=0.01, warmup_fraction=0.2)
_MLKV = Scale(
    tokens=2_460_000 * 2048, sequence_length=2048, batch_size=24, micro_batch=0,
    learning_rate=6e-4, first_rate=6e-4, validation_tokens=4_000_000, validations=50, log_every=10,
    execution=_GPU, packing="first_fit", optimizer=_UPTRAINING,
)  # fmt: skip
MLKV_SCALES: dict[str, Scale] = {
    # Twelve heads' attention is what a CPU's time goes to: hence the short rows. A document is a
    # file, so `first_fit` would keep each one's first line or two: hence `concat`.
    "tiny": Scale(
        tokens=80 * 4 * 128, sequence_length=128, batch_size=4, micro_batch=0, learning_rate=3e-3,
        first_rate=3e-3, validation_tokens=20_000, validations=1, log_every=1,
        execution=ExecutionConfig(compute_dtype="float32"), optimizer=_UPTRAINING,
    ),
    # What it is uptrained from, where nothing was trained before: 13 % on top (MLKV: 5 %).
    "tiny-source": Scale(
        tokens=600 * 4 * 128, sequence_length=128, batch_size=4, micro_batch=0, learning_rate=3e-3,
        first_rate=3e-3, validation_tokens=20_000, validations=3, log_every=1,
        execution=ExecutionConfig(compute_dtype="float32"), optimizer=_UPTRAINING,
    ),
    # 5 % of the source's tokens, in its batches: 153 steps.
    "mini": dataclasses.replace(
        _MLKV, tokens=5_000_000, batch_size=16, validation_tokens=1_000_000, validations=5,
        log_every=1,
    ),
    # The source takes all the text: `first_fit` would cut off four fifths of a corpus of books.
    "mini-source": dataclasses.replace(
        SCALES["mini"], optimizer=OptimizerConfig(weight_decay=0.01)
    ),
    "160m": _MLKV,
    "410m": _MLKV,
}  # fmt: skip


def mlkv() -> TrainConfig:
    """MLKV sections 4.3 and 4.4: uptraining a converted model on 5 % of its corpus."""
    return recipe(MLKV_SCALES["160m"])


RECIPES = {
    "tiny": recipe(SCALES["tiny"]),
    "cla-1b": recipe(SCALES["1B"]),
    "cla-3b": recipe(SCALES["3B"]),
    "mlkv": mlkv(),
}
