"""What fails on other people's machines: the Python finder and the locks; and the citation."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FINDER = ROOT / ".ci" / "find-python"
LOCKS = ("requirements.lock", "requirements-dev.lock")


def find_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FINDER), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def program(folder: Path, name: str, *, says: str = "", status: int = 0, is_python: bool = False):
    """Puts a script `name` into `folder` that runs this Python, or only talks and exits."""
    path = folder / name
    body = f'exec "{sys.executable}" "$@"' if is_python else f"echo '{says}'\nexit {status}"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def pinned(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.!+]+)", (ROOT / lock).read_text(), re.MULTILINE))


def test_finder_refuses_an_old_python_that_was_asked_for(tmp_path: Path):
    old = program(tmp_path, "python3.9", says="Python 3.9.1", status=1)
    result = find_python(PYTHON=str(old))
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"PYTHON={old} does not fit" in result.stderr
    assert f"{old}: Python 3.9.1" in result.stderr
    assert "CPython 3.12, 3.13 or 3.14" in result.stderr


def test_finder_refuses_a_python_that_does_not_exist():
    result = find_python(PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no-such-python: no such program" in result.stderr


def test_finder_passes_over_a_shim_that_fails(tmp_path: Path):
    shim = program(tmp_path, "python3.14", says="pyenv: python3.14: command not found", status=127)
    program(tmp_path, "python3.13", is_python=True)
    result = find_python(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", PYENV_ROOT="/none")
    assert result.returncode == 0, result.stderr
    found = Path(result.stdout.strip())
    assert found != shim
    assert find_python("--check", str(found)).returncode == 0


def test_finder_says_what_it_tried_when_nothing_fits(tmp_path: Path):
    """With a uv that fails too, so that nothing is fetched."""
    for name in ("bash", "dirname", "head", "tail", "sort", "ls"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    program(tmp_path, "python3.12", says="pyenv: python3.12: command not found", status=127)
    program(tmp_path, "python3", says="Python 3.11.2", status=1)
    program(tmp_path, "uv", says="uv: no network", status=1)
    result = find_python(PATH=str(tmp_path), PYENV_ROOT="/none")
    assert result.returncode == 1
    assert "No suitable Python" in result.stderr
    assert f"{tmp_path}/python3.12: pyenv: python3.12: command not found" in result.stderr
    assert f"{tmp_path}/python3: Python 3.11.2" in result.stderr


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hold_names_versions_and_hashes_only(lock: str):
    pin = re.compile(r"[\w.-]+==[\w.!+]+( ; [^\\/]+)? \\")
    digest = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    lines = (ROOT / lock).read_text().splitlines()
    other = [
        line
        for line in lines
        if not (line.startswith("#") or pin.fullmatch(line) or digest.fullmatch(line))
    ]
    assert other == []
    assert not any("/" in line or "index" in line for line in lines if line.startswith("#"))


def test_development_lock_extends_the_run_time_lock():
    run_time, development = (pinned(lock) for lock in LOCKS)
    assert run_time.items() <= development.items()
    assert "tensorflow" not in development


def test_locks_hold_every_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        stripped = (re.split(r"[\[><=~! ;]", r)[0] for r in requirements)
        return {re.sub(r"[-_.]+", "-", name).lower() for name in stripped}

    assert names(project["dependencies"]) <= pinned("requirements.lock").keys()
    extras = project["optional-dependencies"]
    declared = (names(extras["test"]) | names(extras["dev"])) - {"cla-jax"}
    assert declared <= pinned("requirements-dev.lock").keys()


def test_every_import_root_is_linted():
    """A root that import-linter does not name would be unchecked, silently."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    roots = {
        "cla_jax": "cla_jax",
        "experiments": "experiments",
        "kernels/cla_kernels": "cla_kernels",
    }
    expected = {name for folder, name in roots.items() if any((ROOT / folder).glob("*.py"))}
    assert expected == set(configuration["tool"]["importlinter"]["root_packages"])


def test_citation_names_the_software_both_papers_and_the_thesis():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    references = citation["references"]
    identifiers = {i["value"] for reference in references for i in reference["identifiers"]}
    assert {"arXiv:2405.12981", "arXiv:2406.09297"} <= identifiers
    thesis = next(reference for reference in references if reference["type"] == "thesis")
    assert thesis["authors"][0]["family-names"] == "Brandon"
