"""Against the real `transformers`, in an environment of its own: `make test-parity`.

It runs `make_goldens.py` under the Python that CLA_JAX_PARITY_PYTHON names.
"""

import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from cla_jax.conversion import (
    HuggingFaceCheckpoint,
    convert,
    load_huggingface,
    save_huggingface,
)
from cla_jax.conversion.parameters import parameter_shapes
from cla_jax.registry import model
from cla_jax.sharing import KVSharing
from tests.conversion import make_goldens
from tests.conversion.checkpoints import NAMES, logits, relative_error, stored

PYTHON = os.environ.get("CLA_JAX_PARITY_PYTHON")
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(PYTHON is None, reason="compares with transformers: run `make test-parity`"),
]


def transformers(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PYTHON), make_goldens.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of every configuration, saved by `transformers` in shards."""
    directory = tmp_path_factory.mktemp("transformers")
    result = transformers("save", directory, "1")
    assert result.returncode == 0, result.stderr
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_computes_the_same_here(name: str, saved: Path):
    checkpoint = load_huggingface(saved / name)
    expected = np.load(saved / name / "logits.npy")
    assert relative_error(logits(checkpoint), expected) < 1e-4


@pytest.mark.parametrize("name", ["llama/llama3-all", "gpt_neox/sequential-all"])
def test_our_export_of_it_is_the_same_tensors(name: str, saved: Path, tmp_path: Path):
    save_huggingface(load_huggingface(saved / name), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(saved / name)


def test_transformers_computes_the_same_from_our_exports(saved: Path, tmp_path: Path):
    """Imported, widened, merged within layers, and trained from scratch here."""
    exports: dict[str, HuggingFaceCheckpoint] = {}
    for name in NAMES:
        exports[name] = load_huggingface(saved / name)
    exports["gqa-to-mqa"] = convert(exports["llama/gqa"], KVSharing.none(3), 1, match_params=True)
    exports["mha-to-gqa"] = convert(exports["llama/mha"], KVSharing.none(3), 2, match_params=True)
    for name in ("tiny/MQA", "pythia-tiny/MHA"):
        random, config = np.random.default_rng(0), model(name)
        params = jax.tree.map(
            lambda s, r=random: (0.05 * r.standard_normal(s.shape)).astype(np.float32),
            parameter_shapes(config),
        )
        exports[name] = HuggingFaceCheckpoint(config, params)
    directories = []
    for name, checkpoint in exports.items():
        directories.append(tmp_path / name)
        save_huggingface(checkpoint, directories[-1], max_shard_bytes=20_000)
    result = transformers("logits", *directories)
    assert result.returncode == 0, result.stderr
    for directory, checkpoint in zip(directories, exports.values(), strict=True):
        found = np.load(directory / "logits.npy")
        assert relative_error(logits(checkpoint), found) < 1e-4, directory


def test_transformers_refuses_what_it_cannot_express(saved: Path, tmp_path: Path):
    """It would run a model that shares K/V with random tensors in the place of those it misses."""
    for name in ("llama/gqa", "gpt_neox/plain"):
        directory = tmp_path / name
        converted = convert(load_huggingface(saved / name), KVSharing((0, 0, 2)))
        save_huggingface(converted, directory)
        result = transformers("logits", directory)
        assert result.returncode != 0
        assert "cla_" in result.stderr
        shutil.rmtree(directory)


def test_the_stored_goldens_are_what_transformers_computes(tmp_path: Path):
    copy = shutil.copy(make_goldens.__file__, tmp_path)
    result = subprocess.run(
        [str(PYTHON), str(copy), "goldens"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "goldens.npz") as new, np.load(make_goldens.GOLDENS) as old:
        assert sorted(new.files) == sorted(old.files)
        for key in old.files:
            if key.endswith("/logits"):
                assert relative_error(new[key], old[key]) < 1e-5, key
            elif key.endswith("/shapes"):
                assert str(new[key]) == str(old[key]), key
