"""What the experiments have in common: options, data, exit codes."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cla_jax.configs import TrainConfig
from cla_jax.recipes import SCALES, Scale, recipe
from cla_jax.registry import match_models

if TYPE_CHECKING:
    from cla_jax.data import Streams

__all__ = ["ExperimentOptions", "check_seeds", "open_data", "run_experiment"]


def open_data(data: Path | None, text: str | None, scale: str, cache: Path) -> "Streams":
    """Prepared tokens: those in `data`, or, at scale tiny, the bytes of `text`.

    Args:
        data: what `cla-jax prepare-data` made.
        text: a UTF-8 file or a folder of them; None: the Python standard library's sources.
        scale: decides whether bytes will do.
        cache: where prepared text is kept.

    Raises:
        ValueError: both, or neither at a scale whose models are not for bytes; unusable data.
    """
    if data is not None and text is not None:
        raise ValueError("give either --data (prepared tokens) or --text, not both")
    if data is not None:
        from cla_jax.data import open_prepared

        return open_prepared(data)
    if scale != "tiny":
        raise ValueError(
            f"scale {scale} is trained on prepared tokens: make them with `cla-jax prepare-data "
            "CORPUS --tokenizer T --out DIR` and give --data DIR (text as bytes is for scale tiny)"
        )
    from cla_jax.data import ByteTokenizer, corpus_at, prepare_corpus, prepare_streams

    return prepare_streams(prepare_corpus(corpus_at(text), cache), ByteTokenizer(), cache)


def check_seeds(seeds: Sequence[int]) -> None:
    """Whether they can be those of runs to compare.

    Raises:
        ValueError: there is none, or one twice: a run again is no second sample.
    """
    if not seeds:
        raise ValueError("no seeds: give --seeds 0, or --seeds 0 1 for a measure of noise")
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"--seeds {' '.join(map(str, seeds))} names a seed twice; expected different ones, "
            f"such as --seeds {' '.join(map(str, dict.fromkeys(seeds)))}"
        )


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
    except KeyboardInterrupt as error:  # a run's says where it was saved
        where = str(error).partition(";")[0] or "interrupted"
        print(f"{name}: stopped, {where}; the same command goes on from there", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 130))
    sys.exit(1 if failed else 0)


@dataclasses.dataclass(frozen=True)
class ExperimentOptions:
    """What the training experiments have in common on the command line."""

    scale: str = "tiny"
    """An experiment says which there are."""
    models: tuple[str, ...] = ()
    """Names or globs, such as H128-MQA 'H64-*'. Default: all that the paper's table has."""
    data: Path | None = None
    """Prepared tokens (`cla-jax prepare-data`); every scale but tiny needs them."""
    text: str | None = None
    """Scale tiny: a UTF-8 file or a folder of them. Default: the Python standard library."""
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

    def scales(self) -> Mapping[str, Scale]:
        """The recipes by scale."""
        return SCALES

    def preset(self) -> Scale:
        """The scale's recipe, or what `smoke` makes of it."""
        scale = self.scales()[self.scale]
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
