"""The training loop: one model, one run directory."""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from cla_jax.configs import DataConfig, ModelConfig, TrainConfig
from cla_jax.data.files import append_json, write_json
from cla_jax.data.pipeline import batch_rows, batches
from cla_jax.data.prepared import keep_tokenizer, tokenizer_record
from cla_jax.data.token_stream import Streams
from cla_jax.models.attention import attention_path
from cla_jax.parallel import Layout, check_mesh, in_force, make_layout
from cla_jax.parallel.mesh import one_device_note, resolve_mesh
from cla_jax.parallel.processes import (
    agree,
    check_same,
    first_says,
    is_first,
    naming_lost_processes,
)
from cla_jax.training.checkpoints import Checkpoints
from cla_jax.training.checks import check_streams
from cla_jax.training.hardware import peak_flops
from cla_jax.training.initial import InitialParams
from cla_jax.training.interruption import Interrupted, StopRequest
from cla_jax.training.metrics import MetricLog, TrainingProgress, read_metrics
from cla_jax.training.optimizer import learning_rate_schedule, make_optimizer
from cla_jax.training.run_directory import (
    check_directory,
    find_tokenizer,
    identity_of,
    read_json,
    versions,
)
from cla_jax.training.step import (
    Model,
    Params,
    TrainState,
    abstract_state,
    begin_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)
from cla_jax.training.trackers import Listener, check_trackers, open_trackers
from cla_jax.training.validation import mean_loss

_LARGEST_LOSS = 700.0  # nats: whose exponential is still a float


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        directory: of the run.
        model: the decoder, without its parameters.
        params: the last step's parameters, where the mesh has them.
        result: what `result.json` holds.
    """

    directory: Path
    model: Model
    params: Params
    result: dict[str, Any]


@naming_lost_processes()
def train(
    config: ModelConfig,
    training: TrainConfig,
    streams: Streams,
    directory: str | os.PathLike[str],
    *,
    initial: InitialParams | None = None,
    resume: bool = False,
    force: bool = False,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Train a model, or take up a run where its last checkpoint left it.

    A resumed run repeats the uninterrupted one bit by bit on the same machine: the checkpoint holds
    parameters, optimizer state, step and data position, and the metrics after it are dropped.

    Several processes (`cla_jax.parallel.join`) all call it, with the same arguments and a directory
    that all of them see. Each reads the rows that its devices hold; the first alone prints and
    writes metrics.

    Args:
        config: the architecture.
        training: the recipe.
        streams: prepared tokens.
        directory: of the run; made if it is missing.
        initial: parameters to begin with, instead of random ones; their validation loss is the
            first record, at step 0.
        resume: go on from the newest checkpoint in `directory`; a finished run is loaded. Without
            it, a directory that already holds a run is refused.
        force: resume though recipe or data differ from those of the checkpoint.
        on_record: told every record of `metrics.jsonl` as it is written, instead of the progress
            on standard error: for curves that are drawn while a model trains.

    Raises:
        ValueError: a tokenizer larger than the model's vocabulary, a sequence length longer than
            the model's, a stream shorter than one batch, initial parameters of another model, a
            mesh that does not fit devices, model or batch, a pipeline of fewer microbatches than
            stages that were not asked for, a directory that holds a run (of another configuration
            or other initial parameters, or without `resume`). All of them before anything is
            written.
        FloatingPointError: the loss or the gradient is not finite, or the validation loss has no
            perplexity; nothing of it is saved, checkpoints stay as they are.
        Interrupted: SIGTERM or SIGINT came, of several processes to any; a checkpoint was saved.
        ProcessLostError: another process has gone.
    """
    directory = Path(directory)
    first = is_first()
    identity = agree(
        lambda: check_run(
            config, training, streams, directory, initial=initial, resume=resume, force=force
        )
    )
    whole, installed = dataclasses.asdict(dataclasses.replace(training, trackers=())), versions()
    check_same(
        "model, recipe, data, mesh or version of JAX", [identity, whole, resume, force, installed]
    )
    trackers = open_trackers(training.trackers if first else (), directory)
    if on_record is not None and first:
        trackers.append(Listener(on_record))
    console = Console(quiet=True) if on_record is not None or not first else None

    path = attention_path(config.head_dim, jnp.dtype(training.execution.compute_dtype))
    layout, schedule = make_layout(training.mesh, config), check_mesh(config, training)
    resolved = {
        **identity,
        "execution": dataclasses.asdict(training.execution),
        "mesh": str(resolve_mesh(training.mesh)),
        "pass": schedule.record,
        "attention": f"{path.implementation}: {path.reason}",
        "versions": installed,
    }
    tokenizer = find_tokenizer(streams) if first else None
    if tokenizer is not None:
        resolved["tokenizer"] = tokenizer_record(tokenizer)
    model = Model(config, training.execution)
    optimizer = make_optimizer(training.optimizer, training.steps)
    rows = None if layout is None else layout.rows(training.data.batch_size)
    iterator = iter(batches(streams.train, training.data, rows=rows))

    def first_state() -> TrainState:
        if initial is None:
            return init_state(model, optimizer, training.seed, layout)
        shapes = jax.eval_shape(lambda: model.init(0))
        shardings = None if layout is None else state_shardings(model, optimizer, layout)
        params = initial.on_device(shapes, config.name, shardings and shardings.params)
        return begin_state(params, optimizer, shardings)

    begun = first_says((directory / "config.json").exists)
    # A new run's may be refused, before anything is written. One that goes on has its state from
    # the checkpoint, and no room beside it for another.
    state = None if begun else first_state()

    result_file, metrics_file = directory / "result.json", directory / "metrics.jsonl"

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if not begun:
            write_json(directory / "config.json", resolved)
        if tokenizer is not None:
            keep_tokenizer(directory, tokenizer)

    first_says(begin)
    with Checkpoints(
        directory / "checkpoints", identity, keep=training.keep_checkpoints, force=force
    ) as checkpoints:
        like = abstract_state(model, optimizer, layout)
        restored = checkpoints.restore(like) if begun else None
        if restored is not None:
            state = restored.state
            iterator.set_state(restored.data)
        if first_says(result_file.exists):
            if restored is None:
                raise ValueError(
                    f"{directory} holds a finished run but no checkpoint: put its checkpoints "
                    "back, or train in another directory"
                )
            finished = first_says(lambda: read_json(result_file))
            return Trained(directory, model, restored.state.params, finished)
        state = first_state() if state is None else state
        start = int(state.step)
        if begun and first:  # what the run was begun with stays as it was written
            append_json(directory / "resumes.jsonl", {"step": start, **resolved})
        with (
            in_force(layout),
            StopRequest() as stop,
            MetricLog(metrics_file if first else None, start, trackers) as log,
            TrainingProgress(config.name, training.steps, start, console) as progress,
        ):
            progress.say(f"{config.name}: attention {resolved['attention']}")
            if layout is not None:
                progress.say(
                    f"{config.name}: mesh {resolved['mesh']}, {layout.mesh.size} of "
                    f"{jax.device_count()} devices"
                    + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")
                )
                progress.say(f"{config.name}: {schedule}")
            elif note := one_device_note(training.mesh):
                progress.say(f"{config.name}: {note}")
            if start:
                progress.say(f"{config.name}: resumed at step {start}")
            loop = _Loop(model, training, streams, checkpoints, log, progress, stop, layout)
            if initial is not None and loop.validated() is None:
                loop.validate(state)
            if start < training.steps:
                train_step = make_train_step(model, optimizer, training.micro_batches, layout)
                state = loop.run(state, iterator, train_step)
                checkpoints.save(state, iterator.get_state())
            if loop.validated() != training.steps:
                loop.validate(state, last=True)
            checkpoints.wait()

    def end() -> dict[str, Any]:
        result = _result(config, training, read_metrics(metrics_file))
        write_json(result_file, result)
        return result

    return Trained(directory, model, state.params, first_says(end))


def check_run(
    config: ModelConfig,
    training: TrainConfig,
    streams: Streams,
    directory: str | os.PathLike[str],
    *,
    initial: InitialParams | None = None,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Everything that `train` refuses, without building a model or writing anything.

    Returns:
        What the run's checkpoints belong to: `model`, `training` and `data`, as JSON values.

    Raises:
        ValueError: as `train`.
    """
    check_streams(config, training.data, streams)
    check_mesh(config, training)
    check_trackers(training.trackers if is_first() else ())
    identity = identity_of(config, training, streams, initial)
    check_directory(Path(directory), identity, resume, force)
    return identity


def _result(
    config: ModelConfig, training: TrainConfig, records: list[dict[str, Any]]
) -> dict[str, Any]:
    validation = [r for r in records if "validation_loss" in r][-1]
    # The median: the first record holds the compilation, others a save.
    rate = statistics.median(r["tokens_per_second"] for r in records if "loss" in r)
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
        "seconds": validation["tokens"] / rate,
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
        stop: StopRequest,
        layout: Layout | None,
    ) -> None:
        self.training, self.streams, self.layout = training, streams, layout
        self.checkpoints, self.log, self.progress = checkpoints, log, progress
        self.stop = stop
        self.eval_step = make_eval_step(model)
        self.schedule = learning_rate_schedule(training.optimizer, training.steps)
        self.tokens_per_step = _tokens_per_step(training.data)
        peak = peak_flops(1 if layout is None else layout.mesh.size)
        flops = model.config.flops_per_token(training.data.sequence_length)
        self.mfu_per_rate = flops / peak if peak else None
        self._pending: tuple[int, Any] | None = None
        self._clock, self._logged = time.perf_counter(), 0

    def run(self, state: TrainState, iterator: Any, train_step: Any) -> TrainState:
        """Steps up to the last.

        Raises:
            Interrupted: a signal came; the state was saved.
        """
        training, step = self.training, int(state.step)
        self._clock, self._logged = time.perf_counter(), step
        while step < training.steps:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = next(iterator)
                if self.layout is not None:
                    batch = self.layout.batch(batch, training.data.batch_size)
                state, metrics = train_step(state, batch)
            step += 1
            # A step's metrics are read when the next is under way, so that reading never idles
            # the device.
            self._flush()
            self._pending = (step, metrics)
            if step == training.steps:
                break
            if _every(training.eval_every, step):
                self._flush()
                self.validate(state)
                self._clock, self._logged = time.perf_counter(), step
            stopping = self.stop.came()
            if _every(training.checkpoint_every, step) or stopping:
                self._flush()
                self.checkpoints.save(state, iterator.get_state())
            if stopping:
                self._leave(step)
        self._flush()
        return state

    def _flush(self) -> None:
        """Check the metrics that were left for later, and record them where that is due."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise self._diverged(name, step, value)
        if step % self.training.log_every and step != self.training.steps:
            return
        now = time.perf_counter()
        rate = (step - self._logged) * self.tokens_per_step / (now - self._clock)
        self._clock, self._logged = now, step
        self.log.write(
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "loss": loss,
                "learning_rate": float(jnp.asarray(self.schedule(step - 1))),
                "gradient_norm": norm,
                "tokens_per_second": rate,
            }
        )
        mfu = rate * self.mfu_per_rate if self.mfu_per_rate else None
        self.progress.update(step, loss, rate, mfu)

    def _diverged(self, name: str, step: int, value: float) -> FloatingPointError:
        rows = batch_rows(self.streams.train, self.training.data, step - 1)
        saved = self.checkpoints.latest_step
        return FloatingPointError(
            f"the {name} of step {step} is {value}; its update was not applied. The batch is "
            f"rows {', '.join(map(str, rows[:16]))}{', ...' if len(rows) > 16 else ''} of the "
            f"training stream; the last checkpoint is "
            f"{'none' if saved is None else f'step {saved}'}. A lower learning rate or a longer "
            "warm-up is the usual cure"
        )

    def validate(self, state: TrainState, *, last: bool = False) -> None:
        """Record the mean loss over the validation stream, in nats per token.

        Raises:
            Interrupted: a signal came during the `last` one, whose state is saved already.
        """
        step = int(state.step)

        def look() -> None:
            if last and self.stop.came():
                self._leave(step)

        loss = mean_loss(
            self.eval_step, state.params, self.training, self.streams, self.layout,
            before_each=look,
        )  # fmt: skip
        if not loss < _LARGEST_LOSS:
            raise FloatingPointError(
                f"the validation loss of step {step} is {loss}: it has no perplexity. A lower "
                "learning rate or a longer warm-up is the usual cure"
            )
        self.log.write(
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "validation_loss": loss,
                "validation_perplexity": math.exp(loss),
            }
        )
        self.progress.say(f"step {step}: validation perplexity {math.exp(loss):.3f}")

    def validated(self) -> int | None:
        """Step of the last validation in the log, which process 0 keeps."""
        return first_says(lambda: self.log.last_step("validation_loss"))

    def _leave(self, step: int) -> None:
        assert self.stop.signal is not None
        self.checkpoints.wait()
        raise Interrupted(self.stop.signal, step)


def _tokens_per_step(data: DataConfig) -> int:
    return data.batch_size * data.sequence_length


def _every(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0
