"""The training loop: one model, one run directory.

A run directory holds `config.json` (resolved configuration, package versions, data fingerprint),
`metrics.jsonl`, `checkpoints/` and, when finished, `result.json`.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.configs import DataConfig, ModelConfig, TrainConfig
from cla_jax.data.pipeline import batches, data_fingerprint, evaluation_batches
from cla_jax.data.token_stream import Streams, TokenStream
from cla_jax.models.attention import attention_path
from cla_jax.training.checkpoints import Checkpoints, check_identity
from cla_jax.training.hardware import peak_flops
from cla_jax.training.metrics import MetricLog, TrainingProgress, read_metrics
from cla_jax.training.optimizer import learning_rate_schedule, make_optimizer
from cla_jax.training.step import (
    Model,
    Params,
    TrainState,
    check_loss_chunk,
    init_state,
    make_eval_step,
    make_train_step,
)

_LARGEST_LOSS = 700.0  # nats: whose exponential is still a float
_PACKAGES = ("cla-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        directory: of the run.
        model: the decoder, without its parameters.
        params: the last step's parameters.
        result: what `result.json` holds.
    """

    directory: Path
    model: Model
    params: Params
    result: dict[str, Any]


def train(
    config: ModelConfig,
    training: TrainConfig,
    streams: Streams,
    directory: str | os.PathLike[str],
    *,
    resume: bool = False,
) -> Trained:
    """Train a model, or take up a run where its last checkpoint left it.

    A resumed run repeats the uninterrupted one bit by bit on the same machine: the checkpoint holds
    parameters, optimizer state, step and data position, and the metrics after it are dropped.

    Args:
        config: the architecture.
        training: the recipe.
        streams: prepared tokens.
        directory: of the run; made if it is missing.
        resume: go on from the newest checkpoint in `directory`; a finished run is loaded. Without
            it, a directory that already holds a run is refused.

    Raises:
        ValueError: a tokenizer larger than the model's vocabulary, a stream shorter than one batch,
            a `loss_chunk` that does not divide the batch, a directory that holds a run (of another
            configuration, or without `resume`). All of them before anything is written.
        FloatingPointError: the loss or the gradient is not finite, or the validation loss has no
            perplexity; nothing of it is saved, checkpoints stay as they are.
    """
    directory = Path(directory)
    identity = check_run(config, training, streams, directory, resume=resume)

    path = attention_path(config.head_dim, jnp.dtype(training.execution.compute_dtype))
    resolved = {
        **identity,
        "execution": dataclasses.asdict(training.execution),
        "attention": f"{path.implementation}: {path.reason}",
        "versions": _versions(),
    }
    model = Model(config, training.execution)
    optimizer = make_optimizer(training.optimizer, training.steps)
    state = init_state(model, optimizer, training.seed)
    iterator = iter(batches(streams.train, training.data,
                            process_index=jax.process_index(),
                            process_count=jax.process_count()))  # fmt: skip

    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", resolved)
    with Checkpoints(
        directory / "checkpoints", identity, keep=training.keep_checkpoints
    ) as checkpoints:
        if (restored := checkpoints.restore(state)) is not None:
            state = restored.state
            iterator.set_state(restored.data)
        if (directory / "result.json").exists():
            if restored is None:
                raise ValueError(
                    f"{directory} holds a finished run but no checkpoint: put its checkpoints "
                    "back, or train in another directory"
                )
            return Trained(directory, model, state.params, _read_json(directory / "result.json"))
        start = int(state.step)
        with (
            MetricLog(directory / "metrics.jsonl", resume_step=start) as log,
            TrainingProgress(config.name, training.steps, start) as progress,
        ):
            progress.say(f"{config.name}: attention {resolved['attention']}")
            if start:
                progress.say(f"{config.name}: resumed at step {start}")
            loop = _Loop(model, training, streams, checkpoints, log, progress)
            if start < training.steps:
                state = loop.run(state, iterator, make_train_step(model, optimizer))
                loop.validate(state)
                checkpoints.save(state, iterator.get_state())
        checkpoints.wait()
    result = _result(config, training, read_metrics(directory / "metrics.jsonl"))
    _write_json(directory / "result.json", result)
    return Trained(directory, model, state.params, result)


def check_run(
    config: ModelConfig,
    training: TrainConfig,
    streams: Streams,
    directory: str | os.PathLike[str],
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Everything that `train` refuses, without building a model or writing anything.

    Returns:
        What the run's checkpoints belong to: `model`, `training` and `data`, as JSON values.

    Raises:
        ValueError: as `train`.
    """
    _check_streams(config, training.data, streams)
    check_loss_chunk(training.execution.loss_chunk, _tokens_per_step(training.data))
    identity = _as_json(
        {
            "model": config.to_dict(),
            "training": _recipe(training),
            "data": data_fingerprint(streams.train, training.data, jax.process_count()),
        }
    )
    _check_directory(Path(directory), identity, resume)
    return identity


def _result(
    config: ModelConfig, training: TrainConfig, records: list[dict[str, Any]]
) -> dict[str, Any]:
    validation = [r for r in records if "validation_loss" in r][-1]
    steps = [r for r in records if "loss" in r]
    tokens = [r["tokens"] for r in steps]
    seconds = sum(
        (now - before) / r["tokens_per_second"]
        for r, now, before in zip(steps, tokens, [0, *tokens[:-1]], strict=True)
    )
    return {
        "model": config.name,
        "parameters": config.parameters,
        "num_layers": config.num_layers,
        "kv_layers": config.kv_layers,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "kv_bytes_per_token": config.kv_bytes_per_token,
        "steps": training.steps,
        "tokens": validation["tokens"],
        "seconds": seconds,
        "validation_loss": validation["validation_loss"],
        "validation_perplexity": validation["validation_perplexity"],
        "seed": training.seed,
    }


class _Loop:
    """The loop's parts that stay the same from step to step."""

    def __init__(
        self,
        model: Model,
        training: TrainConfig,
        streams: Streams,
        checkpoints: Checkpoints,
        log: MetricLog,
        progress: TrainingProgress,
    ) -> None:
        self.training, self.streams = training, streams
        self.checkpoints, self.log, self.progress = checkpoints, log, progress
        self.eval_step = make_eval_step(model)
        self.schedule = learning_rate_schedule(training.optimizer, training.steps)
        self.tokens_per_step = _tokens_per_step(training.data)
        peak = peak_flops()
        flops = model.config.flops_per_token(training.data.sequence_length)
        self.mfu_per_rate = flops / peak if peak else None
        self._pending: tuple[int, Any] | None = None
        self._clock, self._logged = time.perf_counter(), 0

    def run(self, state: TrainState, iterator: Any, train_step: Any) -> TrainState:
        """Steps up to the last."""
        training, step = self.training, int(state.step)
        self._clock, self._logged = time.perf_counter(), step
        while step < training.steps:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, next(iterator))
            step += 1
            # A step's metrics are read when the next is under way, so that reading never idles the
            # device.
            self._flush()
            if step % training.log_every == 0 or step == training.steps:
                self._pending = (step, metrics)
            if step == training.steps:
                break
            if training.eval_every and step % training.eval_every == 0:
                self._flush()
                self.validate(state)
                self._clock = time.perf_counter()
            if training.checkpoint_every and step % training.checkpoint_every == 0:
                self._flush()
                _check_finite(step, metrics)  # this step's may not be logged
                self.checkpoints.save(state, iterator.get_state())
        self._flush()
        return state

    def _flush(self) -> None:
        """Record the metrics that were left for later."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        rate = (step - self._logged) * self.tokens_per_step / (now - self._clock)
        self._clock, self._logged = now, step
        self._record(step, values, rate)

    def _record(self, step: int, values: dict[str, float], rate: float) -> None:
        _check_finite(step, values)
        self.log.write(
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "loss": values["loss"],
                "learning_rate": float(jnp.asarray(self.schedule(step - 1))),
                "gradient_norm": values["gradient_norm"],
                "tokens_per_second": rate,
            }
        )
        mfu = rate * self.mfu_per_rate if self.mfu_per_rate else None
        self.progress.update(step, values["loss"], rate, mfu)

    def validate(self, state: TrainState) -> float:
        """Mean loss over the validation stream, in nats per token; recorded."""
        data = self.training.data
        total = count = 0.0
        dataset = evaluation_batches(
            self.streams.validation, data.sequence_length, data.batch_size,
            document_ids=data.document_mask,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        for index, batch in enumerate(dataset):
            if self.training.eval_batches and index >= self.training.eval_batches:
                break
            losses, tokens = self.eval_step(state.params, batch)
            total, count = total + float(losses), count + float(tokens)
        loss, step = total / count, int(state.step)
        if not loss < _LARGEST_LOSS:
            raise _diverged("validation loss", step, loss)
        self.log.write(
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "validation_loss": loss,
                "validation_perplexity": math.exp(loss),
            }
        )
        self.progress.say(f"step {step}: validation perplexity {math.exp(loss):.3f}")
        return loss


def _check_finite(step: int, metrics: Mapping[str, Any]) -> None:
    # A gradient that is not finite has already spoiled the parameters, though the loss shows it
    # only a step later.
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(value := float(metrics[name])):
            raise _diverged(name.replace("_", " "), step, value)


def _diverged(name: str, step: int, value: float) -> FloatingPointError:
    return FloatingPointError(
        f"the {name} of step {step} is {value}; the last checkpoint is untouched. "
        "A lower learning rate or a longer warm-up is the usual cure"
    )


def _check_streams(config: ModelConfig, data: DataConfig, streams: Streams) -> None:
    for stream in (streams.train, streams.validation):
        if stream.vocab_size > config.vocab_size:
            raise ValueError(
                f"tokenizer {stream.tokenizer!r} has {stream.vocab_size} ids, more than "
                f"{config.name}'s vocab_size={config.vocab_size}: use a model with at least "
                f"{stream.vocab_size}, or a smaller tokenizer"
            )
    _check_length(streams.train, data)
    if streams.validation.num_tokens < 2:
        raise ValueError("the validation stream has no token to predict: give it more text")


def _check_length(stream: TokenStream, data: DataConfig) -> None:
    windows = (stream.num_tokens - 1) // data.sequence_length
    if windows < data.batch_size:
        raise ValueError(
            f"the {stream.split} stream has {stream.num_tokens} tokens, {windows} windows of "
            f"{data.sequence_length}: fewer than one batch of {data.batch_size}; the largest "
            f"batch_size that works is {windows}"
            if windows
            else f"the {stream.split} stream has {stream.num_tokens} tokens: shorter than one "
            f"window of sequence_length={data.sequence_length}; the longest that works is "
            f"{max(stream.num_tokens - 1, 0)}"
        )


def _check_directory(directory: Path, identity: dict[str, Any], resume: bool) -> None:
    config = directory / "config.json"
    if config.exists():
        saved = _read_json(config)
        sections = {k: v for k, v in saved.items() if k in identity and isinstance(v, dict)}
        check_identity(sections, identity, f"the run in {directory}")
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


def _recipe(training: TrainConfig) -> dict[str, Any]:
    """What decides the numbers of a run, apart from architecture and data."""
    recipe: dict[str, Any] = {"steps": training.steps, "seed": training.seed}
    recipe |= {f"optimizer.{k}": v for k, v in dataclasses.asdict(training.optimizer).items()}
    return recipe | {"compute_dtype": training.execution.compute_dtype}


def _tokens_per_step(data: DataConfig) -> int:
    return data.batch_size * data.sequence_length


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they will be read back."""
    return json.loads(json.dumps(values))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a run's: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a run's: it holds no JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replacement = path.with_name(path.name + ".new")
    replacement.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    os.replace(replacement, path)
