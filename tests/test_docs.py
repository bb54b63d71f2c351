"""README and docs: every block of Python runs, every command runs or is taken by its parser.

Sybil finds the blocks. Those of Python run in order, document by document, in an empty folder; a
`text` block right behind one is what it prints.
A command of a `sh` block, or one that stands in the text as code,

* runs, if it is one of `INSTANT`;
* runs in the slow tests, if it is a training of a tiny model (three steps of it), or the document
  calls it a matter of seconds;
* else is parsed by the program it names, without being run: program, options and values are right.

A block of Python that takes long, or needs what commands above it leave, has `<!-- slow -->` right
above it: it runs in the slow tests, where the whole document runs in order.
"""

import contextlib
import doctest
import importlib
import inspect
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import tyro
import yaml

from cla_jax import cli
from cla_jax.experiment import ExperimentOptions
from cla_jax.registry import model
from tests.documents import ROOT, SLOW, examples, is_shell, is_slow

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "notebooks", "experiments")
    for path in (ROOT / folder).glob("*.md")
)
MODULES = sorted(
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for root in (ROOT, ROOT / "kernels")
    for path in (root / ("cla_jax" if root == ROOT else "cla_kernels")).rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)
# What is neither sh nor python is prose.
LANGUAGES = {"sh", "python", "text", "json", "toml", "yaml", ""}
INSTANT = {"models", "diagram", "plan", "doctor"}
SHOWN = re.compile(r"(?:```)?\n\n```text\n(.*?)```", re.DOTALL)  # behind a block of Python
RUN_BY = {"docs/reuse.md": "tests/test_reuse.py"}  # which needs what the page's Python leaves
CUT = ("--training.steps", "3", "--training.data.sequence-length", "32",
       "--training.eval-tokens", "64")  # fmt: skip
TEXT = "the cat sat on the mat, and the dog lay under it.\n" * 200


class Command(NamedTuple):
    """A command line of a document."""

    document: str
    line: int
    words: tuple[str, ...]
    comment: str = ""

    @property
    def program(self) -> str:
        return Path(self.words[0]).name

    @property
    def runs_at_once(self) -> bool:
        first = self.words[1:2]
        return self.program == "cla-jax" and (bool({*first} & INSTANT) or "--help" in self.words)

    @property
    def runs_in_seconds(self) -> bool:
        if self.program not in ("python", "cla-jax") or self.runs_at_once:
            return False
        return "--smoke" in self.words or "seconds" in self.comment

    @property
    def runs_after_those_above(self) -> bool:
        """Training a tiny model, and what reads a run that is there then."""
        tiny = self.words[1:2] == ("train",) and self.words[2].startswith("tiny/")
        reads = self.words[1:2] == ("generate",) and Path(self.words[2]).exists()
        return self.program == "cla-jax" and (tiny or reads)


def commands_of(document: str, text: str, line: int) -> list[Command]:
    """The commands of a block: one a line, `\\` continues it, `#` begins a comment."""
    found, pending = [], ""
    for number, row in enumerate(text.splitlines(), start=line):
        pending += row
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        pending = re.sub(r"^([A-Z_]+=\S* )+", "", pending)  # environment variables
        words, comment = shlex.split(pending, comments=True), pending.partition(" # ")[2]
        if words:
            found.append(Command(document, number, tuple(words), comment))
        pending = ""
    return found


def all_commands() -> list[Command]:
    found = list[Command]()
    for document in DOCUMENTS:
        for example in examples(document):
            if is_shell(example):
                found += commands_of(document, str(example.parsed), example.line + 1)
        text = prose_of(document)
        for span in re.finditer(r"`((?:cla-jax|python experiments/)[^`]*)`", text):
            words = shlex.split(span[1])
            if any(word.startswith("--") for word in words):
                line = text.count("\n", 0, span.start()) + 1
                found.append(Command(document, line, tuple(words)))
    return found


def prose_of(document: str) -> str:
    """The text without its blocks, line for line."""
    text = (ROOT / document).read_text("utf-8")
    blocks = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    return blocks.sub(lambda block: "\n" * block[0].count("\n"), text)


COMMANDS = all_commands()


def name_of(command: Command) -> str:
    return f"{command.document}:{command.line}: {' '.join(command.words)}"


# --- What can be asked of a command without running it --------------------------------------------


class Parsed(BaseException):
    """A parser took the arguments; not an Exception, which a program may catch."""


def options_of(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], start: Callable) -> object:
    """What a program that reads its arguments with tyro makes of them; it gets no further."""

    def stopping(parse: Callable) -> Callable:
        def call(*args: object, **more: object) -> None:
            raise Parsed(parse(*args, **more))

        return call

    extras = tyro.extras
    monkeypatch.setattr(tyro, "cli", stopping(tyro.cli))
    monkeypatch.setattr(extras, "subcommand_cli_from_dict",
                        stopping(extras.subcommand_cli_from_dict))  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(words))
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0?$"):
            start()
        return None
    with pytest.raises(Parsed) as caught:
        start()
    monkeypatch.undo()
    return caught.value.args[0]


def check_make(words: tuple[str, ...]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\$\({name}\)" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile knows no {word}"


def check_foreign(words: tuple[str, ...]) -> None:
    """Another program: it exists, and its help names the options."""
    name = Path(words[0]).name
    if name in ("python", "python3", "pip"):  # this Python's
        module = words[2] if words[1] == "-m" else "pip"
        rest = words[3:] if words[1] == "-m" else words[1:]
        call = [sys.executable, "-m", module]
    else:
        assert shutil.which(name), f"there is no program {name}"
        call, rest = [name], words[1:]
    if rest and not rest[0].startswith(("-", ".")):  # a subcommand
        call, rest = [*call, rest[0]], rest[1:]
    shown = subprocess.run([*call, "--help"], capture_output=True, text=True, check=True).stdout
    for word in rest:
        option = word.partition("=")[0]
        assert not option.startswith("-") or re.search(rf"{re.escape(option)}\b", shown), word
        assert not word.endswith(".lock") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch):
    words = command.words
    if command.program == "make":
        check_make(words[1:])
    elif command.program == "cla-jax":
        options_of(monkeypatch, words, cli.main)
    elif command.program == "python" and words[1] != "-m":
        script = ROOT / words[1]
        assert script.is_file()
        start = lambda: runpy.run_path(str(script), run_name="__main__")  # noqa: E731
        options = options_of(monkeypatch, words[1:], start)
        if isinstance(options, ExperimentOptions):
            assert options.names()
    else:
        check_foreign(words)
    for word in words:
        if re.fullmatch(r"(1B|3B|mini|tiny|pythia-\w+)/[\w-]*[a-z0-9]", word, re.IGNORECASE):
            model(word)


# --- What runs ------------------------------------------------------------------------------------


def run(command: Command, folder: Path, *more: str) -> None:
    """As a user would, with this Python and this checkout."""
    words = [*command.words[1:], *more]
    if command.program == "cla-jax":
        call = ["-c", "from cla_jax.cli import main; main()", *words]
    else:
        call = [str(ROOT / words[0]), *words[1:]]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *call], cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},  # not those of the tests
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{name_of(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.runs_at_once], ids=name_of)
def test_command_runs(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(command.words))
    if "--help" in command.words:
        with pytest.raises(SystemExit, match=r"^0?$"):
            cli.main()
    else:
        cli.main()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.runs_in_seconds], ids=name_of)
def test_command_that_takes_seconds_runs(command: Command, tmp_path: Path):
    run(command, tmp_path)


@pytest.fixture
def _as_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In an empty folder but for a text, with JAX's own defaults."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def evaluate(document: str, *, slow: bool) -> None:
    """A document's Python in order; with `slow` all of it, and the commands that it needs."""
    for example in examples(document):
        if is_shell(example):
            for command in commands_of(document, str(example.parsed), example.line + 1):
                if slow and command.runs_after_those_above:
                    run(command, Path.cwd(), *(CUT if command.words[1] == "train" else ()))
        elif slow or not is_slow(example):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                example.evaluate()
            if shown := SHOWN.match(example.document.text, example.end):
                assert out.getvalue() == shown[1], f"{document}:{example.line}"


def with_python(*, slow: bool) -> list[str]:
    return [
        document
        for document in DOCUMENTS
        if "```python" in (text := (ROOT / document).read_text("utf-8"))
        and (SLOW in text if slow else not (ROOT / RUN_BY.get(document, "none")).exists())
    ]


@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("document", with_python(slow=False))
def test_python_runs(document: str):
    evaluate(document, slow=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_as_a_user")
@pytest.mark.parametrize("document", with_python(slow=True))
def test_the_whole_document_runs(document: str):
    evaluate(document, slow=True)


@pytest.mark.slow
def test_the_processes_of_two_shells_run(tmp_path: Path):
    commands = [c for c in COMMANDS if c.document == "docs/launching.md" and "--process" in c.words]
    assert len(commands) == 2
    (tmp_path / "my.txt").write_text(TEXT)
    with ThreadPoolExecutor() as shells:
        running = [shells.submit(run, command, tmp_path, *CUT) for command in commands]
        for shell in running:
            shell.result()
    assert (tmp_path / "runs/two/result.json").exists()


def test_files_that_start_processes(monkeypatch: pytest.MonkeyPatch):
    """SLURM's is bash, that of Kubernetes YAML, and both start the command as it is."""
    slurm = ROOT / "docs/launching/train.slurm"
    subprocess.run(["bash", "-n", str(slurm)], check=True)
    (command,) = [c for c in commands_of("", slurm.read_text("utf-8"), 1) if c.program == "srun"]
    words = command.words[command.words.index("cla-jax") :]
    assert "slurm" in words
    options_of(monkeypatch, words, cli.main)

    service, job = yaml.safe_load_all((ROOT / "docs/launching/job.yaml").read_text("utf-8"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    shell, option, text = pod["containers"][0]["command"]
    assert (shell, option) == ("sh", "-c")
    subprocess.run(["bash", "-n", "-c", text], check=True)
    words = shlex.split(text.replace("$JOB_COMPLETION_INDEX", "1"))[1:]
    options_of(monkeypatch, tuple(words), cli.main)
    name = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    given = dict(itertools.pairwise(words))
    assert given["--coordinator"].partition(":")[0] == name
    assert int(given["--processes"]) == spec["completions"] == spec["parallelism"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_escapes(document: str):
    """A block of an unknown language would be neither run nor checked; links lead somewhere."""
    text = (ROOT / document).read_text("utf-8")
    opening = re.findall(r"^[ ]*```(.*)$", text, re.MULTILINE)
    assert len(opening) % 2 == 0
    assert {*opening[::2]} <= LANGUAGES
    for body in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert not re.match(r"\$|cla-jax|python |make |>>> ", body), body
    assert sum(map(is_shell, examples(document))) == len(re.findall(r"```sh$", text, re.MULTILINE))
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose_of(document)):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted == len(re.findall(r"^ *>>> ", inspect.getsource(module), re.MULTILINE))
