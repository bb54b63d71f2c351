"""A run's directory: what it belongs to, and JSON that is written whole or not at all.

It holds `config.json` (resolved configuration, package versions, data fingerprint),
`metrics.jsonl`, `checkpoints/`, `tokenizer.json` (unless the tokens are bytes) and, when finished,
`result.json`.
"""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.data.pipeline import data_fingerprint
from cla_jax.data.prepared import tokenizer_of
from cla_jax.data.token_stream import Streams
from cla_jax.data.tokenizers import Tokenizer
from cla_jax.training.checkpoints import FORCE_HINT, check_identity
from cla_jax.training.initial import InitialParams

_PACKAGES = ("cla-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

type Identity = dict[str, dict[str, Any]]
"""What decides a run's numbers, as JSON values by section."""


def identity_of(
    config: ModelConfig,
    training: TrainConfig,
    streams: Streams,
    initial: InitialParams | None = None,
) -> Identity:
    """Architecture, recipe and data of a run; execution is no part of it, but for the dtype.

    Of a run that began with given parameters, their fingerprint is part of the recipe.
    """
    recipe: dict[str, Any] = {
        "steps": training.steps,
        "seed": training.seed,
        "eval_tokens": training.eval_tokens,
        "compute_dtype": training.execution.compute_dtype,
    }
    recipe |= {f"optimizer.{k}": v for k, v in dataclasses.asdict(training.optimizer).items()}
    if initial is not None:
        recipe["initial_parameters"] = initial.fingerprint
    data = data_fingerprint(streams.train, training.data)
    data["validation_tokens"] = streams.validation.fingerprint
    identity = {"model": config.to_dict(), "training": recipe, "data": data}
    return json.loads(json.dumps(identity))  # as it will be read back


def check_directory(directory: Path, identity: Identity, resume: bool, force: bool) -> None:
    """Whether a run may be started, or resumed, in a directory.

    Args:
        directory: of the run.
        identity: of the run.
        resume: a run that is there may go on.
        force: though its recipe or data were others.

    Raises:
        ValueError: it holds another run, this run without `resume`, or something else.
    """
    config = directory / "config.json"
    if config.exists():
        saved = read_json(config)
        sections = {k: v for k, v in saved.items() if k in identity and isinstance(v, dict)}
        # A finished run is only loaded: what it was trained with cannot be overlooked.
        finished = (directory / "result.json").exists()
        hint = "" if finished else FORCE_HINT
        where = f"the {'finished ' if finished else ''}run in {directory}"
        check_identity(sections, identity, where, force=force and not finished, hint=hint)
        if not resume:
            raise ValueError(
                f"{directory} already holds this run: resume it (--resume), or choose another "
                "directory"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"{directory} is not empty and holds no run; nothing in it was touched: choose another "
            "directory"
        )


def find_tokenizer(streams: Streams) -> Tokenizer | None:
    """What a run keeps, so that its model can read and write text; training does without it."""
    try:
        return tokenizer_of(streams)
    except ValueError as error:
        print(f"this run is left without its tokenizer: {error}", file=sys.stderr)
        return None


def versions() -> dict[str, str]:
    """Of Python, the device and the packages that decide numbers."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run.

    Raises:
        ValueError: the file holds none.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a run's: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a run's: it holds no JSON object")
    return values
