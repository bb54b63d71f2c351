"""The notebooks: in step with their .py texts, saved as they should be seen, and they run."""

import base64
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ("what_is_shared", "train_a_pair", "convert_a_checkpoint", "inside_the_cache", "on_a_gpu")
FIGURES = {"what_is_shared": 2, "train_a_pair": 3, "convert_a_checkpoint": 2,
           "inside_the_cache": 5, "on_a_gpu": 1}  # fmt: skip
MACHINE = re.compile(r"(?<![\w.])/(root|home|tmp|work|Users|var|opt|usr|mnt|content)\b|[A-Z]:\\")


def saved(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in saved(name)["cells"] if cell["cell_type"] == "code"]


def outputs(name: str) -> list[dict[str, Any]]:
    return [output for cell in code_cells(name) for output in cell["outputs"]]


def test_each_is_a_pair_and_listed():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (FOLDER / "README.md").read_text("utf-8"))
    assert listed == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_text_are_in_step(name):
    pair = [jupytext.read(FOLDER / f"{name}{suffix}") for suffix in (".ipynb", ".py")]
    notebook, text = ([(c.cell_type, c.source) for c in each.cells] for each in pair)
    assert notebook == text, "`make notebooks` makes the .ipynb anew"


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_are_whole_and_clean(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all("execution" not in cell["metadata"] for cell in cells)  # times: noise in a diff
    for output in outputs(name):
        assert output["output_type"] != "error"
        # Progress bars and warnings go to standard error.
        assert output.get("name") != "stderr", output
        data = output.get("data", {})
        texts = [output.get("text", ""), *(v for k, v in data.items() if k != "image/png")]
        found = "".join("".join(text) for text in texts)
        assert not MACHINE.search(found), found
        assert str(Path.home()) not in found
        assert "\x1b" not in found
        assert "\r" not in found


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_there_at_a_readable_size(name):
    figures = [output for output in outputs(name) if "image/png" in output.get("data", {})]
    assert len(figures) >= FIGURES[name]
    for figure in figures:
        image = base64.b64decode(figure["data"]["image/png"])
        width, _ = struct.unpack(">II", image[16:24])
        shown = figure["metadata"]["image/png"]["width"]
        assert 500 <= shown <= 1000
        assert width >= 2 * shown - 2  # sharp on a screen of twice the density
        assert len(image) < 300_000


def test_the_package_is_installed_only_where_it_is_missing():
    for name in NAMES:
        first = "".join(code_cells(name)[0]["source"])
        assert 'find_spec("cla_jax") is None' in first
        assert "pip" in first


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_executes(name, tmp_path):
    # By nbmake, in an environment as a user's: these tests' own settings are not for notebooks.
    ours = ("XLA_FLAGS", "MPLBACKEND", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ours and not key.startswith("PYTEST_XDIST")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment["TMPDIR"] = str(tmp_path)  # where it trains
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=600", "-q",
               "-p", "no:cacheprovider", str(FOLDER / f"{name}.ipynb")]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
