"""`cla-jax generate`: trained models continue prompts."""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cla_jax.configs import CacheDtype, MeshConfig

if TYPE_CHECKING:
    from cla_jax.loading import TextContinuation, TextModel


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue prompts with a trained model; a single prompt's text appears as it is written.

    Examples: `cla-jax generate runs/mine --prompt "def main("` and `cla-jax generate runs/mine
    --prompts prompts.jsonl --temperature 0.8 --top-p 0.95 --out written.jsonl`
    """

    directory: Annotated[Path, tyro.conf.Positional]
    """The run: what `cla-jax train --out`, an experiment or the quickstart left; or a Hugging Face
    checkpoint directory, such as `cla-jax convert --out` writes."""
    prompt: tuple[str, ...] = ()
    """One prompt, or several."""
    prompts: Path | None = None
    """Instead: a .txt file with a prompt a line, or .jsonl with {"prompt": ...} a line."""
    max_new_tokens: int = 128
    """Of each prompt."""
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of the probability."""
    seed: int = 0
    """Of what is drawn; each prompt has a random stream of its own."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, such as $'\\n\\n' in bash."""
    out: Path | None = None
    """Write JSON lines of prompt, text, tokens and finished (stop_token, stop_string or length)
    here; it must not exist yet. Default: print prompts and texts."""
    batch: int = 8
    """Prompts at a time."""
    cache_dtype: CacheDtype | None = None
    """Of the K/V cache; int8 and float8_e4m3fn halve it again. Default: that of the activations."""
    tokenizer: str | None = None
    """For a directory that does not hold its own: as for prepare-data."""
    mesh: str = ""
    """Devices to spread model and cache over, as in tensor=4 or data=2,tensor=2. Default: one."""

    def run(self) -> None:
        """Write them."""
        prompts = self._prompts()
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch} must be at least 1")
        if self.out is not None and self.out.exists():
            raise ValueError(f"{self.out} exists already; choose another --out")
        from cla_jax.inference import GenerateConfig, Sampling

        # Wrong values are told before a model is loaded.
        MeshConfig.parse(self.mesh)
        GenerateConfig(
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_k, self.top_p, self.seed),
            stop_strings=self.stop,
        )
        if self.out is not None:
            with _json_lines(self.out, len(prompts)) as write:
                self._in_batches(prompts, write)
        elif len(prompts) > 1:
            self._in_batches(prompts, _show)
        else:
            model, _ = self._load(prompts)
            _print(prompts[0], dim=True)
            self._generate(model, prompts, on_text=lambda _, text: _print(text))
            _print("\n")

    def _prompts(self) -> list[str]:
        """What to continue.

        Raises:
            ValueError: nothing, an empty prompt, two sources, a file that holds something else.
        """
        if self.prompt and self.prompts is not None:
            raise ValueError("--prompt and --prompts both name what to continue: give one of them")
        if self.prompts is not None:
            return read_prompts(self.prompts)
        if not self.prompt:
            raise ValueError(
                'nothing to continue: give --prompt "Once upon a time" or --prompts FILE'
            )
        if "" in self.prompt:
            number = self.prompt.index("") + 1
            raise ValueError(f"--prompt: number {number} of {len(self.prompt)} is empty")
        if any(map(_surrogates, self.prompt)):
            raise ValueError("--prompt: not UTF-8")
        return list(self.prompt)

    def _load(self, prompts: list[str]) -> tuple["TextModel", int]:
        """The model, and the room that the longest prompt needs."""
        from cla_jax.loading import load

        mesh = MeshConfig.parse(self.mesh)
        model = load(self.directory, tokenizer=self.tokenizer, mesh=mesh)
        return model, model.check(prompts, self.max_new_tokens)

    def _in_batches(
        self, prompts: list[str], write: Callable[[list["TextContinuation"]], None]
    ) -> None:
        model, room = self._load(prompts)
        for start in range(0, len(prompts), self.batch):
            batch = prompts[start : start + self.batch]
            write(self._generate(model, batch, first_row=start, room=room))

    def _generate(
        self, model: "TextModel", prompts: list[str], **more: Any
    ) -> list["TextContinuation"]:
        return model.generate(
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            cache_dtype=self.cache_dtype,
            **more,
        )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each (.txt), or `{"prompt": ...}` a line (.jsonl).

    Raises:
        ValueError: no such file, another kind of file, a line that holds no prompt (its number).
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"--prompts {path}: expected a .txt file (a prompt a line) or a .jsonl file "
            '({"prompt": ...} a line)'
        )
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name,
            [p.name for p in path.parent.glob("*") if p.suffix in (".txt", ".jsonl")],
            n=1,
        )
        hint = f"; the nearest is {path.parent / near[0]}" if near else ""
        raise ValueError(f"--prompts: there is no file {path}{hint}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is wrong") from None
    # Not splitlines, which takes rarer characters for line ends too.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    if not lines:
        raise ValueError(f"{path} is empty: it holds no prompt")
    read = _json_prompt if path.suffix == ".jsonl" else _line_prompt
    return [read(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _line_prompt(line: str, where: str) -> str:
    if not line:
        raise ValueError(f"{where} is empty: a prompt needs at least one character")
    return line


def _json_prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or "prompt" not in record:
        found = sorted(record) if isinstance(record, dict) else record
        raise ValueError(f'{where} has no prompt: expected {{"prompt": "..."}}, found {found!r}')
    if isinstance(record["prompt"], str) and _surrogates(record["prompt"]):
        raise ValueError(f"{where}: the prompt holds half a surrogate pair: it is no Unicode text")
    if not isinstance(record["prompt"], str) or not record["prompt"]:
        raise ValueError(
            f"{where}: prompt is {record['prompt']!r}, expected a text that is not empty"
        )
    return record["prompt"]


def _surrogates(text: str) -> bool:
    """What no UTF-8 can say."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _print(text: str, *, dim: bool = False) -> None:
    # A model may write any byte; those that steer a terminal are not for it to send.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    # Not with rich, which expands tabs.
    if dim and sys.stdout.isatty():
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, end="", flush=True)


def _show(continuations: Sequence["TextContinuation"]) -> None:
    for one in continuations:
        _print(one.prompt, dim=True)
        _print(f"{one.text}\n\n")


@contextlib.contextmanager
def _json_lines(out: Path, total: int) -> Iterator[Callable[[Sequence["TextContinuation"]], None]]:
    """Writes continuations beside `out`, which appears when all `total` are there.

    If the block fails, those that were written stay, and are told of.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.partial")
    console = Console(stderr=True)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0
    try:
        with (
            staging.open("x", encoding="utf-8") as file,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task("", total=total)

            def write(continuations: Sequence["TextContinuation"]) -> None:
                nonlocal done
                for one in continuations:
                    line = json.dumps(dataclasses.asdict(one))
                    file.write(line + "\n")
                file.flush()
                done += len(continuations)
                progress.update(task, completed=done)

            yield write
            os.fsync(file.fileno())
        if out.exists():
            raise ValueError(f"{out} was made by somebody else meanwhile, and is left as it is")
        staging.rename(out)
    except BaseException:
        if done:
            print(f"{done} of {total} continuations are in {staging}", file=sys.stderr)
        else:
            staging.unlink(missing_ok=True)
        raise
    print(f"wrote {out}: {done} continuations", file=sys.stderr)
