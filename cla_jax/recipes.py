"""The CLA experiments' recipes at every scale, and the options that all of them share.

At `1B` and `3B` they are the paper's (CLA section 3.1 and Table 2). `mini` is for one GPU and
`tiny` for two CPU cores; what is not a matter of size (optimizer, schedule) is the paper's.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cla_jax.configs import DataConfig, ExecutionConfig, OptimizerConfig, TrainConfig
from cla_jax.registry import match_models

if TYPE_CHECKING:
    from cla_jax.data.token_stream import Streams

__all__ = [
    "SCALES",
    "ExperimentOptions",
    "Scale",
    "chunked",
    "climb",
    "next_rate",
    "open_data",
    "recipe",
    "run_experiment",
]

_LOSS_CHUNK = 4096  # tokens whose logits exist at a time: 0.8 GB of a 50,432-word vocabulary's


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


# Whole segments unrolled: worth a quarter of the speed on a GPU (docs/results.md).
_GPU = ExecutionConfig(unroll=20, loss_chunk=_LOSS_CHUNK)
SCALES: dict[str, Scale] = {
    "tiny": Scale(
        tokens=150 * 8 * 256, sequence_length=256, batch_size=8, micro_batch=0, learning_rate=3e-3,
        first_rate=1e-3, validation_tokens=24 * 8 * 256, validations=3, log_every=1,
        execution=ExecutionConfig(compute_dtype="float32"),  # bfloat16 is slow on CPUs
    ),
    "mini": Scale(
        tokens=100_000_000, sequence_length=2048, batch_size=16, micro_batch=0,
        learning_rate=1e-3, first_rate=3e-4, validation_tokens=1_000_000, validations=10,
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
    tokens: float | None = None,
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
    data = DataConfig(scale.sequence_length, size, seed=0)
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
    at_once = (micro or size) * scale.sequence_length
    return TrainConfig(
        steps=steps,
        micro_batch_size=micro,
        seed=seed,
        data=data,
        optimizer=OptimizerConfig(scale.learning_rate if learning_rate is None else learning_rate),
        execution=chunked(scale.execution, at_once),
        eval_every=max(steps // scale.validations, 1),
        eval_batches=-(-scale.validation_tokens // at_once),  # batches as large as one pass,
        checkpoint_every=max(steps // scale.validations, 1),
        log_every=min(scale.log_every, steps),
    )


def chunked(execution: ExecutionConfig, tokens: int) -> ExecutionConfig:
    """The same, with the largest loss chunk that divides a batch of so many tokens."""
    chunk = math.gcd(execution.loss_chunk, tokens) if execution.loss_chunk else 0
    return dataclasses.replace(execution, loss_chunk=chunk)


# CLA section 3.2.2: from 3e-4 "in multiplicative increments of 1.5x", as Tables 3 and 5 print it.
_PRINTED_RATES = (3e-4, 4.5e-4, 6.75e-4, 1e-3, 1.5e-3, 2.25e-3)


def next_rate(rate: float) -> float:
    """The learning rate above this one: the paper's printed ladder, then x 1.5 to three digits.

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


def open_data(data: Path | None, text: Path | None, scale: str, cache: Path) -> "Streams":
    """Prepared tokens: those in `data`, or, at scale tiny, the bytes of `text`.

    Args:
        data: what `cla-jax prepare-data` made.
        text: a UTF-8 file or a folder of .txt files; None: the Python standard library's sources.
        scale: decides whether bytes will do.
        cache: where prepared text is kept.

    Raises:
        ValueError: both, or neither at a scale whose models are not for bytes; unusable data.
    """
    if data is not None and text is not None:
        raise ValueError("give either --data (prepared tokens) or --text, not both")
    if data is not None:
        from cla_jax.data import Streams

        return Streams.open(data)
    if scale != "tiny":
        raise ValueError(
            f"scale {scale} is trained on prepared tokens: make them with `cla-jax prepare-data "
            "CORPUS --tokenizer T --out DIR` and give --data DIR (text as bytes is for scale tiny)"
        )
    from cla_jax.data import ByteTokenizer, corpus_at, prepare_corpus, prepare_streams

    return prepare_streams(prepare_corpus(corpus_at(text), cache), ByteTokenizer(), cache)


def run_experiment(name: str, main: Callable[[], int]) -> NoReturn:
    """Run an experiment and leave: 0 done, 1 refused or something failed, 128 + n by signal n.

    What a user can mend is one line on standard error.

    Args:
        name: that the line begins with.
        main: returns how many runs failed.
    """
    try:
        failed = main()
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command goes on from the last checkpoint")
    except Exception as error:
        code = getattr(error, "exit_code", None)  # a run's `Interrupted`, without importing JAX
        if code is None:
            raise
        print(f"{name}: stopped, {str(error).partition(';')[0]}; the same command goes on",
              file=sys.stderr)  # fmt: skip
        sys.exit(code)
    sys.exit(1 if failed else 0)


@dataclasses.dataclass(frozen=True)
class ExperimentOptions:
    """What the CLA training experiments have in common on the command line."""

    scale: Literal["tiny", "mini", "1B", "3B"] = "tiny"
    """tiny: minutes on a CPU; mini: one GPU; 1B and 3B: the paper's own recipe."""
    models: tuple[str, ...] = ()
    """Names or globs, such as H128-MQA 'H64-*'. Default: all that the paper's table has."""
    data: Path | None = None
    """Prepared tokens (`cla-jax prepare-data`); every scale but tiny needs them."""
    text: Path | None = None
    """Scale tiny: a UTF-8 file or a folder of .txt files. Default: the Python standard library."""
    tokens: float | None = None
    """Training tokens of each run, such as 20e6. Default: the scale's."""
    batch_size: int | None = None
    """Sequences per step. Default: the scale's."""
    micro_batch: int | None = None
    """Sequences per forward and backward pass; 0: the whole batch. Default: the scale's."""
    out: Path | None = None
    """Where runs, tables and figures go. Default: runs/EXPERIMENT-SCALE."""
    smoke: bool = False
    """A few steps of two short sequences: seconds, to see that everything works."""

    def names(self, default: tuple[str, ...] = ("*",)) -> tuple[str, ...]:
        """The models, by their full names."""
        return match_models(self.scale, self.models or default)

    def preset(self) -> Scale:
        """The scale's recipe, or what `smoke` makes of it."""
        scale = SCALES[self.scale]
        if not self.smoke:
            return scale
        return dataclasses.replace(
            scale, tokens=6 * 128, sequence_length=64, batch_size=2, micro_batch=0,
            validation_tokens=512,
            validations=2, log_every=1,
        )  # fmt: skip

    def recipe(self, *, learning_rate: float | None = None, seed: int = 0) -> TrainConfig:
        """The recipe of one run."""
        return recipe(
            self.preset(), tokens=self.tokens, batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            learning_rate=learning_rate, seed=seed,
        )  # fmt: skip

    def directory(self, experiment: str) -> Path:
        """Of the sweep."""
        if self.out is not None:
            return self.out
        return Path("runs") / f"{experiment}-{self.scale}{'-smoke' if self.smoke else ''}"

    def streams(self, experiment: str) -> "Streams":
        """The tokens."""
        return open_data(self.data, self.text, self.scale, self.directory(experiment) / "data")

    def shared(self, streams: "Streams", **more: Any) -> dict[str, dict[str, Any]]:
        """What is the same for all runs, for `Sweep`."""
        training = self.recipe()
        return {
            "experiment": {
                "scale": self.scale,
                "steps": training.steps,
                "batch_size": training.data.batch_size,
                "sequence_length": training.data.sequence_length,
                **more,
            },
            "data": {
                "tokens": streams.train.fingerprint,
                "validation_tokens": streams.validation.fingerprint,
                "tokenizer": streams.train.tokenizer,
            },
        }
