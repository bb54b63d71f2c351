"""The built wheel, as somebody has it who installed it: alone, away from this checkout.

A fresh folder holds the wheel and nothing else; a new process sees that folder, the environment's
dependencies, and neither the repository nor its tests. Importing torch or TensorFlow fails there.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.documents import ROOT, python_blocks

HEAVY = ("matplotlib", "tensorflow_datasets", "orbax", "grain", "huggingface_hub", "tokenizers",
         "safetensors", "lm_eval", "IPython")  # fmt: skip
DOCUMENTS = ("README.md", "docs/reuse.md")
ALONE = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "tensorflow"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Forbidden())
sys.path.insert(0, WHEEL)
assert REPOSITORY not in sys.path
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, built without network and without isolation."""
    built, installed = (tmp_path_factory.mktemp(name) for name in ("built", "installed"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (archive,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--disable-pip-version-check", "--target", str(installed), str(archive)]  # fmt: skip
    subprocess.run(install, check=True)
    (installed / "wheel.txt").write_text("\n".join(zipfile.ZipFile(archive).namelist()))
    return installed


def alone(wheel: Path, code: str, folder: Path) -> str:
    """What code prints in a new process that sees the wheel and the dependencies."""
    head = ALONE.replace("WHEEL", repr(str(wheel))).replace("REPOSITORY", repr(str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-I", "-c", head + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_holds_both_packages_and_nothing_else(wheel: Path):
    names = (wheel / "wheel.txt").read_text().splitlines()
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"cla_jax", "cla_kernels"}
    assert {"cla_jax/py.typed", "cla_jax/cli/__init__.py"} <= set(names)
    shipped = {name for name in names if name.endswith(".py")}
    written = {p.relative_to(base).as_posix() for base, package in
               ((ROOT, "cla_jax"), (ROOT / "kernels", "cla_kernels"))
               for p in (base / package).rglob("*.py")}  # fmt: skip
    assert shipped == written


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if (ROOT / d).exists()])
def test_public_examples(wheel: Path, tmp_path: Path, document: str):
    code = "\n".join(python_blocks(document))
    assert "cla_jax" in code
    where = "\nimport cla_jax, cla_kernels\nprint(cla_jax.__file__, cla_kernels.__file__)"
    *_, last = alone(wheel, code + where, tmp_path).splitlines()
    assert all(path.startswith(str(wheel)) for path in last.split())


@pytest.mark.slow
def test_doctor_and_version(wheel: Path, tmp_path: Path):
    code = "sys.argv = ['cla-jax', 'doctor', '--json']\nfrom cla_jax.cli import main\nmain()"
    found = json.loads(alone(wheel, code, tmp_path))
    assert found["problems"] == []
    assert "sources" not in found["version"]


@pytest.mark.slow
def test_import_is_light(wheel: Path, tmp_path: Path):
    """The package imports no JAX; what it has for models imports nothing beside JAX and Flax."""
    code = """
import cla_jax
print(*sys.modules)
import jax, flax.nnx
before = set(sys.modules)
import cla_kernels
[getattr(cla_jax, name) for name in cla_jax.__all__ if name not in ("TextModel", "load")]
print(*set(sys.modules) - before)
"""
    first, second = (
        {name.partition(".")[0] for name in line.split()}
        for line in alone(wheel, code, tmp_path).splitlines()
    )
    assert not first & {"jax", "jaxlib", "flax", "numpy", *HEAVY}
    assert not second & {*HEAVY}
