"""Hugging Face checkpoint directories: `config.json`, safetensors and tokenizer files; no torch.

`load_huggingface` streams a directory into a parameter tree and keeps every dtype;
`save_huggingface` writes one. For a model that shares nothing the tensors come out byte for byte
as they went in, in one file or in shards; a copy of a tied embedding is not written again. A model
that `transformers` cannot express has the model type `cla_llama` or `cla_gpt_neox`, which the Auto
classes of `transformers` refuse, and its owner map in the config, under the CLA authors' name
`sharing_pattern`.
"""

import dataclasses
import difflib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.conversion import safetensors_io
from cla_jax.conversion.hf_config import from_hf_config, to_hf_config
from cla_jax.conversion.hub import TOKENIZER_FILES
from cla_jax.conversion.layouts import Part, TensorSpec, tensor_specs
from cla_jax.conversion.parameters import (
    layer_place,
    parameter_shapes,
    to_decoder,
)
from cla_jax.conversion.safetensors_io import StoredTensor, TensorToWrite
from cla_jax.data.files import check_free, staged_directory
from cla_jax.models import Decoder
from cla_jax.training.initial import check_params
from cla_jax.training.step import Params

__all__ = [
    "HuggingFaceCheckpoint",
    "load_huggingface",
    "save_huggingface",
]

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Older versions stored what follows from the config: causal masks and rotary frequencies.
_BUFFERS = re.compile(
    r"(model|gpt_neox)\.(layers\.\d+\.(self_attn|attention)\.)?"
    r"(bias|masked_bias|rotary_emb\.inv_freq)"
)
_TIED_COPIES = ("lm_head.weight", "embed_out.weight")


@dataclasses.dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A model and all that its directory held.

    Attributes:
        config: the architecture.
        params: its parameters: the tree that training works with (`cla_jax.conversion.parameters`),
            numpy arrays in the dtypes that they were stored in.
        tokenizer_files: copied beside an exported model.
        source_config: the `config.json` that it came from; entries that say nothing of the
            architecture are exported again.
        buffers: tensors that are no parameters but were stored beside them.
    """

    config: ModelConfig
    params: Params
    tokenizer_files: tuple[Path, ...] = ()
    source_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    buffers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def decoder(
        self,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    ) -> Decoder:
        """The model, its parameters as float32 on the default device."""
        return to_decoder(self.config, self.params, execution)


def load_huggingface(directory: str | Path, *, name: str | None = None) -> HuggingFaceCheckpoint:
    """Read a checkpoint directory, tensor by tensor: at most one exists beside the parameters.

    Before the first tensor is read the config is checked against what is supported, the headers
    and the names, shapes and dtypes of all tensors against the config, and the files against their
    checksums (where `checksums.json` gives them). Only a stored copy of a tied embedding is
    compared when it is read.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards with their index.
        name: of the model; by default the directory's.

    Raises:
        ValueError: it is no checkpoint, is damaged, or is of a kind that is not supported; names
            the file, tensor or setting.
    """
    directory = Path(directory)
    config, values = load_config(directory, name=name)
    stored = safetensors_io.find_tensors(directory)
    specs = {spec.name: spec for spec in tensor_specs(config)}
    _check_tensors(config, specs, stored, directory)
    safetensors_io.check_checksums(directory)
    params, buffers = _read(config, specs, stored)
    found = tuple(f for n in TOKENIZER_FILES if (f := directory / n).is_file())
    return HuggingFaceCheckpoint(config, params, found, values, buffers)


def load_config(directory: Path, *, name: str | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """The architecture of a checkpoint directory, and its `config.json` as it is.

    Args:
        directory: holds `config.json`.
        name: of the model; by default the directory's.

    Raises:
        ValueError: it is no checkpoint, or of a kind that is not supported.
    """
    if not (directory / "config.json").is_file():
        what = "holds no config.json" if directory.is_dir() else "is no directory"
        raise ValueError(f"{directory} is no Hugging Face checkpoint: it {what}")
    values = safetensors_io.read_json_object(directory / "config.json")
    if "model_type" not in values and (directory / "checkpoints").is_dir():
        raise ValueError(
            f"{directory} is a run of `cla-jax train`, no Hugging Face checkpoint: expected a "
            "config.json with a model_type, and safetensors"
        )
    return from_hf_config(values, name or directory.resolve().name), values


def save_huggingface(
    checkpoint: HuggingFaceCheckpoint,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a checkpoint directory: complete or not at all.

    Until it is complete it is a hidden sibling, `.NAME.xxxxxxxx`. SIGKILL or a loss of power leaves
    that behind; it may be removed.

    Beside config, safetensors and tokenizer files it holds `checksums.json` with the SHA-256 of
    each.

    Args:
        checkpoint: what to write; of a model of one's own,
            `HuggingFaceCheckpoint(config, params)`.
        directory: must not exist yet, or be empty and not the working directory.
        max_shard_bytes: of the tensors in a file.

    Raises:
        ValueError: the directory is not empty or cannot be made, the architecture is of no Hugging
            Face family, or the parameters are not those of the config.
        OSError: it could not be written; nothing is left.
    """
    directory, config = Path(directory), checkpoint.config
    check_free(directory)
    specs = tensor_specs(config)
    check_params(checkpoint.params, parameter_shapes(config), config.name)
    tensors = [_to_write(spec, config, checkpoint.params) for spec in specs]
    tensors += [
        TensorToWrite(name, array.nbytes, lambda a=array: a)
        for name, array in checkpoint.buffers.items()
    ]
    dtype = str(np.asarray(checkpoint.params["embedding"]["embedding"]).dtype)
    values = to_hf_config(config, dtype, checkpoint.source_config)
    with staged_directory(directory) as staging:
        (staging / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        for file in checkpoint.tokenizer_files:
            shutil.copyfile(file, staging / file.name)
        safetensors_io.write_tensors(staging, tensors, max_shard_bytes)
        safetensors_io.write_checksums(staging)


def _check_tensors(
    config: ModelConfig,
    specs: dict[str, TensorSpec],
    stored: dict[str, StoredTensor],
    directory: Path,
) -> None:
    """Names, shapes and dtypes of what is stored against what the config needs."""
    for name, spec in specs.items():
        if name not in stored:
            near = difflib.get_close_matches(name, stored.keys() - specs.keys(), n=1)
            hint = f"; the nearest that is there is {near[0]}" if near else ""
            raise ValueError(f"{directory}: tensor {name} is missing{hint}")
        found = stored[name]
        if found.shape != spec.shape:
            raise ValueError(
                f"{found.file}: tensor {name} has the shape {list(found.shape)}; config.json makes "
                f"it {list(spec.shape)}"
            )
        if found.dtype not in _DTYPES:
            raise ValueError(
                f"{found.file}: tensor {name} is {found.dtype}, which is not supported as a "
                f"parameter; expected {', '.join(_DTYPES)}"
            )
    for name in stored.keys() - specs.keys():
        tied = config.tied_embeddings and name in _TIED_COPIES
        if not tied and not _BUFFERS.fullmatch(name):
            near = difflib.get_close_matches(name, specs, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{stored[name].file}: tensor {name} does not belong to this model; the nearest "
                f"that does is {near}"
            )
    first: dict[tuple[Any, ...], str] = {}  # of each parameter: the first tensor that it is made of
    for name, spec in specs.items():
        for other in [first.setdefault(_path(config, spec, part), name) for part in spec.parts]:
            if stored[other].dtype != stored[name].dtype:
                raise ValueError(
                    f"{stored[name].file}: tensor {name} is {stored[name].dtype}, but {other}, "
                    f"with which it makes one parameter, is {stored[other].dtype}: expected one "
                    "dtype"
                )


def _read(
    config: ModelConfig, specs: dict[str, TensorSpec], stored: dict[str, StoredTensor]
) -> tuple[Params, dict[str, np.ndarray]]:
    shapes, params, buffers = parameter_shapes(config), {}, {}
    for name, tensor in safetensors_io.read_tensors({name: stored[name] for name in specs}):
        spec = specs[name]
        for part in spec.parts:
            path = _path(config, spec, part)
            leaf = _leaf(params, shapes, path, tensor.dtype)
            _block(leaf, config, spec, part)[...] = spec.load(tensor, part)
    others = {name: stored[name] for name in stored.keys() - specs.keys()}
    for name, tensor in safetensors_io.read_tensors(others):
        if name not in _TIED_COPIES:
            buffers[name] = tensor
        elif not _same_bytes(tensor, params["embedding"]["embedding"]):
            raise ValueError(
                f"{stored[name].file}: tensor {name} differs from the embedding, though "
                "config.json ties them (tie_word_embeddings)"
            )
    return params, buffers


def _to_write(spec: TensorSpec, config: ModelConfig, params: Params) -> TensorToWrite:
    def leaf(part: Part) -> np.ndarray:
        values: Any = params
        for key in _path(config, spec, part):
            values = values[key]
        return np.asarray(values)

    def make() -> np.ndarray:
        return spec.store([_block(leaf(part), config, spec, part) for part in spec.parts])

    dtypes = {leaf(part).dtype for part in spec.parts}
    if len(dtypes) > 1 or str(next(iter(dtypes))) not in _DTYPES.values():
        raise ValueError(
            f"tensor {spec.name} would be made of {', '.join(map(str, dtypes))}: expected one of "
            f"{', '.join(_DTYPES.values())}"
        )
    return TensorToWrite(spec.name, spec.size * next(iter(dtypes)).itemsize, make)


def _path(config: ModelConfig, spec: TensorSpec, part: Part) -> tuple[Any, ...]:
    """Of the parameter in the whole tree."""
    if spec.layer is None:
        return part.path
    segment, position, _ = layer_place(config.sharing, spec.layer)
    return ("layers", segment, position, *part.path)


def _block(leaf: np.ndarray, config: ModelConfig, spec: TensorSpec, part: Part) -> np.ndarray:
    """The block of a parameter that a part of a tensor is: a view."""
    if spec.layer is not None:
        leaf = leaf[layer_place(config.sharing, spec.layer)[2]]
    return leaf[part.block]


def _leaf(params: Params, shapes: Params, path: tuple[Any, ...], dtype: Any) -> np.ndarray:
    """The array of a parameter, made when its first block comes."""
    for key in path[:-1]:
        params, shapes = params.setdefault(key, {}), shapes[key]
    if path[-1] not in params:
        params[path[-1]] = np.empty(shapes[path[-1]].shape, dtype)
    return params[path[-1]]


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()
