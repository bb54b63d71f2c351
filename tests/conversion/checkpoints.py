"""Small checkpoint directories for the tests of this folder."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from cla_jax.configs import ExecutionConfig
from cla_jax.conversion import HuggingFaceCheckpoint
from tests.conversion import make_goldens

NAMES = [f"llama/{v}" for v in make_goldens.LLAMA] + [
    f"gpt_neox/{v}" for v in make_goldens.GPT_NEOX
]
EXACT = ExecutionConfig(compute_dtype="float32")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Config, tensors and logits of a stored golden."""
    with np.load(make_goldens.GOLDENS) as stored:
        config = json.loads(str(stored[f"{name}/config"]))
        shapes = json.loads(str(stored[f"{name}/shapes"]))
        return config, make_goldens.tensors(shapes), stored[f"{name}/logits"]


def write(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A directory with these; one safetensors file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def written(directory: Path, name: str = "llama/gqa", dtype: str = "float32", **changes: Any):
    """A golden's checkpoint as a directory."""
    config, tensors, _ = golden(name)
    tensors = {k: v.astype(DTYPES[dtype]) for k, v in tensors.items()}
    return write(directory, {**config, **changes}, tensors)


def stored(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, read by the library alone."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in found
            found[name] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
    return found


def logits(checkpoint: HuggingFaceCheckpoint) -> np.ndarray:
    """Of the tokens that all comparisons use, in float32."""
    decoder = checkpoint.decoder(EXACT)
    tokens = jnp.asarray(make_goldens.tokens(checkpoint.config.vocab_size), jnp.int32)
    return np.asarray(jax.jit(lambda d, t: d(t))(decoder, tokens))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over the largest logit."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
