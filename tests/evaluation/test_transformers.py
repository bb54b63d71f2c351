"""Scores against those of the real `transformers`, on checkpoints that it saved itself.

torch and transformers have an environment of their own: `make test-parity`, which sets
CLA_JAX_PARITY_PYTHON. Without it these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cla_jax.conversion import load_huggingface
from cla_jax.evaluation import Request, Scorer
from tests.conversion import make_goldens
from tests.conversion.checkpoints import EXACT
from tests.evaluation import score_with_transformers

PYTHON = os.environ.get("CLA_JAX_PARITY_PYTHON")
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(PYTHON is None, reason="compares with transformers: run `make test-parity`"),
]


def run(script: str | None, *arguments: object) -> None:
    done = subprocess.run(
        [str(PYTHON), str(script), *map(str, arguments)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("transformers")
    run(make_goldens.__file__, "save", directory, "3")
    return directory


@pytest.mark.parametrize("name", ["llama/gqa", "llama/llama3-all", "gpt_neox/plain"])
def test_log_likelihoods_are_those_of_transformers(name: str, saved: Path, tmp_path: Path):
    random = np.random.default_rng(0)
    context = make_goldens._SIZES["max_position_embeddings"]
    lengths = [(1, 1), (5, 3), (31, 4), (context - 3, 4), (context + 7, 2), (20, 40)]
    pairs = [
        [random.integers(make_goldens.VOCAB, size=n).tolist() for n in pair] for pair in lengths
    ]
    requests, scores = tmp_path / "requests.json", tmp_path / "scores.json"
    requests.write_text(json.dumps(pairs))
    run(score_with_transformers.__file__, saved / name, requests, scores)
    expected = json.loads(scores.read_text())

    decoder = load_huggingface(saved / name).decoder(EXACT)
    found = Scorer(decoder, batch_size=2).score([Request(*pair) for pair in pairs])
    np.testing.assert_allclose(
        [score.log_likelihood for score in found], [e[0] for e in expected], rtol=1e-5, atol=1e-5
    )
    assert [score.greedy for score in found] == [e[1] for e in expected]
    # One that is greedy: each choice's likeliest token, found by its scores.
    ones = Scorer(decoder, batch_size=2).score(
        [Request(pairs[1][0], [token]) for token in range(make_goldens.VOCAB)]
    )
    assert sum(score.greedy for score in ones) == 1
    assert max(ones, key=lambda score: score.log_likelihood).greedy
