#!/usr/bin/env python3
"""Makes each notebook anew from its .py text and executes it; what it prints and draws is saved.

All of them, or those that are named: `.ci/execute_notebooks.py on_a_gpu` where there is one.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"


def execute(script: Path) -> None:
    """The notebook of a text, beside it: whole or not at all."""
    notebook = jupytext.read(script)
    target = script.with_suffix(".ipynb")
    began = time.monotonic()
    # Without times, which are others at every run.
    NotebookClient(notebook, timeout=600, record_timing=False).execute(cwd=str(FOLDER))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{target.stem.replace('_', '-')}-{number}"  # the same at every run
    notebook.metadata.pop("language_info", None)  # Python's version: any will do
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)
    partial = target.with_name(f".{target.name}.partial")
    nbformat.write(notebook, partial)
    partial.replace(target)
    print(f"{target.relative_to(ROOT)}: {time.monotonic() - began:.0f} s", flush=True)


def main(names: list[str]) -> None:
    """Those named, or all."""
    known = {script.stem: script for script in sorted(FOLDER.glob("*.py"))}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    # The package of this checkout, installed or not.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for name in names or known:
        execute(known[name])


main(sys.argv[1:])
