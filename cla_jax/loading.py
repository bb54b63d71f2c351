"""Trained models, ready to write text: `cla_jax.load("runs/mine").generate("Once upon a time")`."""

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np

from cla_jax._choices import resembled
from cla_jax.configs import CacheDtype, ComputeDtype, ExecutionConfig, MeshConfig, ModelConfig
from cla_jax.conversion import load_huggingface
from cla_jax.conversion.hf_keys import note_of_unknown
from cla_jax.conversion.huggingface import load_config
from cla_jax.conversion.layouts import family
from cla_jax.conversion.safetensors_io import find_tensors, holds_weights, read_json_object
from cla_jax.data.prepared import read_tokenizer
from cla_jax.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, tokenizer_at
from cla_jax.inference import GenerateConfig, Sampling, check_prompts, generate
from cla_jax.models import Decoder
from cla_jax.parallel import Layout, check_inference_mesh, in_force, make_layout
from cla_jax.parallel.mesh import one_device_note
from cla_jax.training.checkpoints import load_params
from cla_jax.training.initial import InitialParams
from cla_jax.training.run_directory import read_json
from cla_jax.training.step import Model

__all__ = ["TextContinuation", "TextModel", "load"]

# Entries of a run's `config.json`, as the trainer writes it.
_ENTRIES = ("model", "training", "data", "execution", "mesh", "pass", "attention", "versions",
            "tokenizer")  # fmt: skip
_DEPTH = 4  # folders below which no run is looked for
_SHOWN = 12  # runs that a message lists

type OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class TextContinuation:
    """What a model wrote behind a prompt.

    Attributes:
        prompt: as it was given.
        text: what follows it, without the stop string.
        tokens: of the text, without the stop; at a stop string, those that end before it.
        finished: `stop_token` (the model ended the document), `stop_string` or `length`.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finished: str


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
    """A decoder with the tokenizer that it was trained with.

    Attributes:
        config: the architecture.
        decoder: float32 parameters; computes in `decoder.execution.compute_dtype`.
        tokenizer: text to tokens and back.
        layout: of the decoder on a mesh; None: on one device.
    """

    config: ModelConfig
    decoder: Decoder = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    layout: Layout | None = dataclasses.field(default=None, repr=False)

    @overload
    def generate(
        self, prompts: str, *, max_new_tokens: int = ..., temperature: float = ...,
        top_k: int = ..., top_p: float = ..., seed: int = ..., stop: Sequence[str] = ...,
        cache_dtype: CacheDtype | None = ..., on_text: OnText | None = ...,
        first_row: int = ..., room: int = ...,
    ) -> TextContinuation: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: list[str] | tuple[str, ...], *, max_new_tokens: int = ...,
        temperature: float = ..., top_k: int = ..., top_p: float = ..., seed: int = ...,
        stop: Sequence[str] = ..., cache_dtype: CacheDtype | None = ...,
        on_text: OnText | None = ..., first_row: int = ..., room: int = ...,
    ) -> list[TextContinuation]: ...  # fmt: skip
    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        cache_dtype: CacheDtype | None = None,
        on_text: OnText | None = None,
        first_row: int = 0,
        room: int = 0,
    ) -> TextContinuation | list[TextContinuation]:
        """Continue a prompt, or several as one batch.

        A text ends at the end of the document, at a stop string or after `max_new_tokens`.

        Args:
            prompts: one, or several.
            max_new_tokens: of each.
            temperature: 0 is greedy; this and the next three as in `Sampling`.
            top_k: how many of the likeliest tokens may be drawn; 0 is all.
            top_p: share of the probability that may be drawn from; 1 is all.
            seed: of the random streams.
            stop: strings that end a text; they are no part of it.
            cache_dtype: of the K/V cache; by default the decoder's compute dtype.
            on_text: told each prompt's index and its text, piece by piece as it is written.
            first_row: number of the first prompt, where a long list is continued batch by batch:
                a prompt's random stream is that of the seed and its number.
            room: tokens of a row to make room for at least (what `check` returns), so that batch
                after batch compiles once.

        Returns:
            A continuation for a string, a list of them for several.

        Raises:
            ValueError: no prompt or an empty one, a value out of its range, a prompt too long.
        """
        config = GenerateConfig(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, seed),
            stop_tokens=(self.tokenizer.end_of_text,),
            stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
            cache_dtype=cache_dtype,
            room=room,
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        with in_force(self.layout):
            found = generate(
                self._unstacked,
                self._encode(texts),
                config,
                decode=self.tokenizer.decode,
                on_text=on_text,
                first_row=first_row,
            )
        continuations = [
            TextContinuation(prompt, one.text or "", one.tokens, one.finished)
            for prompt, one in zip(texts, found, strict=True)
        ]
        return continuations[0] if isinstance(prompts, str) else continuations

    def check(self, prompts: list[str] | tuple[str, ...], max_new_tokens: int) -> int:
        """Whether `generate` will take these prompts, before long work on the first of them.

        Returns:
            Tokens of the longest row, new ones and all: a `room` in which every batch of the
            prompts is of one shape.

        Raises:
            ValueError: there is none; one is empty or, with `max_new_tokens`, too long.
        """
        ids = check_prompts(self.config, self._encode(prompts), max_new_tokens)
        return max(map(len, ids)) + max_new_tokens

    def _encode(self, prompts: list[str] | tuple[str, ...]) -> list[np.ndarray]:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt is text, a str; this is {prompt!r}")
        return self.tokenizer.encode_batch(prompts)

    @functools.cached_property
    def _unstacked(self) -> Decoder:
        """The decoder as it decodes fastest; made when it is first needed."""
        return self.decoder.unstacked()


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    compute_dtype: ComputeDtype | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
) -> TextModel:
    """A model that `cla-jax train`, an experiment or the quickstart trained, or a converted one.

    Takes the newest checkpoint of a run, whose training need not be finished; or a Hugging Face
    checkpoint directory, such as `cla-jax convert` writes.

    Args:
        path: the run's directory, or one below which there is exactly one run; or a directory of
            `config.json` and safetensors.
        tokenizer: for a directory that does not hold its own: `bytes`, a `tokenizers` JSON file or
            `hf:OWNER/NAME`.
        compute_dtype: of activations and matrix products; by default bfloat16, on a CPU float32.
        mesh: devices to spread the model over, whatever it was trained on: `MeshConfig(tensor=4)`.

    Raises:
        ValueError: neither there, or several runs (names them); no checkpoint; a damaged file or a
            model that is not supported; no tokenizer, or another than the run's; a mesh that does
            not fit devices or model.
    """
    if compute_dtype is None:
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    execution = ExecutionConfig(compute_dtype=compute_dtype)
    if _is_huggingface(Path(path).expanduser()):
        return _load_huggingface(Path(path).expanduser(), tokenizer, execution, mesh)
    directory = find_run(path)
    record = read_json(directory / "config.json")
    try:
        config = ModelConfig.from_dict(record["model"])
        trained = record.get("tokenizer") or {  # an older run, or one whose tokens came alone
            "name": "tokenizer", "fingerprint": record["data"]["tokenizer"], "end_token": None,
        }  # fmt: skip
        fingerprint = str(trained["fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{directory / 'config.json'} is not a run's: {reason}") from None
    if unknown := [key + resembled(key, _ENTRIES) for key in record if key not in _ENTRIES]:
        print(
            f"{directory / 'config.json'}: note: entries that are not known here were passed over: "
            f"{', '.join(unknown)}",
            file=sys.stderr,
        )
    text = _tokenizer(directory, {**trained, "fingerprint": fingerprint}, tokenizer)
    layout = _layout(mesh, config)
    model = Model(config, execution)
    like = jax.eval_shape(lambda: model.init(0))
    if layout is not None:
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            like, layout.of(model.axes),
        )  # fmt: skip
    step, params = load_params(directory / "checkpoints", record["model"], like)
    if not (directory / "result.json").exists():
        print(f"{directory} is not finished: this is its step {step}", file=sys.stderr)
    return TextModel(config, model(params), text, layout)


def find_run(path: str | os.PathLike[str]) -> Path:
    """The run in a directory, or the only one below it.

    Raises:
        ValueError: no such directory (with the nearest), no run in it, or several (names them).
    """
    path = Path(path).expanduser()
    if _is_run(path):
        return path
    if not path.exists():
        raise ValueError(f"there is no {path}{_nearest(path)}")
    above = [parent for parent in path.parents if _is_run(parent)]
    if above:
        raise ValueError(f"{path} is part of a run: give the run's directory, {above[0]}")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give a run's directory")
    found = sorted(
        {
            config.parent
            for depth in range(1, _DEPTH + 1)
            for config in path.glob("/".join([*["*"] * depth, "config.json"]))
            if _is_run(config.parent)
        }
    )
    if not found:
        raise ValueError(
            f"there is no run in {path}: `cla-jax train` leaves config.json and checkpoints in a "
            "run's directory, a Hugging Face checkpoint is config.json and *.safetensors"
        )
    if len(found) > 1:
        names = "".join(f"\n  {run}" for run in found[:_SHOWN])
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"there are {len(found)} runs below {path}; name one of them:{names}{more}"
        )
    return found[0]


def _is_run(path: Path) -> bool:
    """Whether a trainer has written there; other programs have a `config.json` too."""
    if not (path / "config.json").is_file():
        return False
    return (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()


def _is_huggingface(path: Path) -> bool:
    """Whether `cla-jax convert` or another program wrote a checkpoint there, be it damaged."""
    if not (path / "config.json").is_file() or _is_run(path):
        return False
    if holds_weights(path):
        return True
    try:
        return "model_type" in read_json_object(path / "config.json")
    except ValueError:
        return False


def _layout(mesh: MeshConfig, config: ModelConfig) -> Layout | None:
    check_inference_mesh(mesh)
    if note := one_device_note(mesh):
        print(note, file=sys.stderr)
    return make_layout(mesh, config)


def _load_huggingface(
    directory: Path,
    place: str | os.PathLike[str] | None,
    execution: ExecutionConfig,
    mesh: MeshConfig,
) -> TextModel:
    # Before any tensor is read: the tokenizer may be refused.
    config, values = load_config(directory)
    if note := note_of_unknown(values, family(config)):
        print(f"{directory}: {note}", file=sys.stderr)
    find_tensors(directory)
    ends = values.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    end = end if type(end) is int else None
    if place is not None:
        text = tokenizer_at(place, None if place == "bytes" else end)
    elif not (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} holds no tokenizer.json: name its tokenizer with --tokenizer "
            "(tokenizer= in Python): bytes, a `tokenizers` JSON file or hf:OWNER/NAME"
        )
    else:
        path = directory / "tokenizer.json"
        text = JsonTokenizer(path.read_bytes(), config.name, end, place=str(path))
    if text.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer {text.name!r} has {text.vocab_size} ids, more than the "
            f"{config.vocab_size} of the model in {directory}: it is another model's"
        )
    layout = _layout(mesh, config)
    checkpoint = load_huggingface(directory)
    if layout is None:
        return TextModel(config, checkpoint.decoder(execution), text)
    model = Model(config, execution)
    params = InitialParams(lambda: checkpoint.params).on_device(
        jax.eval_shape(lambda: model.init(0)), config.name, layout.of(model.axes)
    )
    return TextModel(config, model(params), text, layout)


def _nearest(path: Path) -> str:
    """What there is instead of a path that is not there, for a message."""
    parent = next(p for p in path.absolute().parents if p.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    names = [p.name for p in parent.iterdir() if p.is_dir()]
    near = difflib.get_close_matches(missing, names, n=1)
    return f"; the nearest is {parent / near[0]}" if near else f" ({parent} has no {missing!r})"


def _tokenizer(
    directory: Path, record: dict[str, Any], place: str | os.PathLike[str] | None
) -> Tokenizer:
    """The run's own tokenizer, or the one that is named, if it is the same."""
    fingerprint = record["fingerprint"]
    if place is None:
        if fingerprint == ByteTokenizer.fingerprint:
            return ByteTokenizer()
        if not (directory / "tokenizer.json").exists():
            raise ValueError(
                f"{directory} does not hold the tokenizer that it was trained with (fingerprint "
                f"{fingerprint[:16]}): name it with --tokenizer (tokenizer= in Python), a "
                "`tokenizers` JSON file or hf:OWNER/NAME"
            )
        return read_tokenizer(directory, record)
    end = record.get("end_token") if place != "bytes" else None
    given = tokenizer_at(place, end)
    if given.fingerprint != fingerprint:
        own = ": it needs no --tokenizer" if (directory / "tokenizer.json").exists() else ""
        if fingerprint == ByteTokenizer.fingerprint:
            own = ": bytes"
        raise ValueError(
            f"{place} (fingerprint {given.fingerprint[:16]}) is not the tokenizer that {directory} "
            f"was trained with (fingerprint {fingerprint[:16]}){own}"
        )
    return given
