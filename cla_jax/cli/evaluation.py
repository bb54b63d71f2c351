"""`cla-jax evaluate` and `cla-jax perplexity`: how well trained models predict."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from cla_jax.configs import CacheDtype


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score a model on benchmarks, zero-shot, through EleutherAI's lm-evaluation-harness.

    Needs `pip install 'cla-jax[eval]'`. Examples: `cla-jax evaluate runs/mine --tasks cla
    --data-dir eval --out runs/mine-eval` and `cla-jax evaluate runs/mine --tasks piqa --limit 100`
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run's directory or a Hugging Face checkpoint directory, as for generate."""
    tasks: tuple[str, ...]
    """The papers' sets, cla and mlkv; or tasks of the harness by name."""
    limit: int | None = None
    """The first so many items of each task. Default: all."""
    data_dir: Path | None = None
    """Take the papers' tasks from files (docs/experiments.md has the layout), nothing from the hub.
    Default: from the Hugging Face hub, or what its cache holds."""
    include_path: Path | None = None
    """A directory of task YAML files of your own."""
    batch_size: int | None = None
    """Sequences of full length at a time; shorter ones go in larger batches. Default: 8,192
    tokens."""
    through_cache: bool = False
    """Score token by token through the KV cache, as text is generated, instead of by prefill."""
    cache_dtype: CacheDtype | None = None
    """Of that cache, which prefill reads too. Default: that of the activations."""
    out: Path | None = None
    """Write evaluation.json, the harness's results.json and tables here; it must hold no evaluation
    yet. Default: print the table."""
    tokenizer: str | None = None
    """For a directory that does not hold its own: as for prepare-data."""

    def run(self) -> None:
        """Evaluate."""
        from cla_jax.evaluation.task_sets import expand, local_data

        if not self.tasks:
            raise ValueError("--tasks: name cla, mlkv or tasks of the harness")
        for option, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{option} {value} must be at least 1")
        if self.out is not None:
            _check_free(self.out)
        names = expand(self.tasks)
        local = None if self.data_dir is None else local_data(names, self.data_dir)
        # Slow to import; and unknown tasks are told before a model is loaded.
        from cla_jax.evaluation import harness
        from cla_jax.loading import load
        from cla_jax.reporting.downstream import (
            load_evaluation,
            read_evaluation,
            table,
            write_evaluation,
            write_evaluations,
        )
        from cla_jax.reporting.report import show

        built = harness.build_tasks(names, local, self.include_path)
        model = load(self.checkpoint, tokenizer=self.tokenizer)
        record, results = harness.evaluate(
            model, built, local=local, limit=self.limit, batch_size=self.batch_size,
            through_cache=self.through_cache, cache_dtype=self.cache_dtype,
        )  # fmt: skip
        if self.out is None:
            Console(soft_wrap=True).print(table([read_evaluation(record, str(self.checkpoint))]))
        else:
            write_evaluation(record, results, self.out)
            show([write_evaluations([load_evaluation(self.out)], self.out)])
        requests = record["requests"]
        scored = (
            f", of which {requests['compile_seconds']:,.1f} s compiling "
            f"{requests['compiled_shapes']} shapes; {requests['requests_per_second']:,.1f} "
            "requests/s without that"
        )
        print(
            f"{requests['requests']:,} requests, {requests['truncated']:,} of them longer than "
            f"the context of {record['context']:,} tokens; {requests['seconds']:,.1f} s"
            f"{scored if requests['compiled_shapes'] else ''}"
        )


def _check_free(out: Path) -> None:
    """Whether results can be written there: told before anything is scored.

    Raises:
        ValueError: it is no directory, or holds something.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is no directory")
    if (out / "config.json").exists():
        raise ValueError(f"{out} is a model's directory; choose --out {out}/evaluation")
    if (out / "evaluation.json").exists():
        raise ValueError(f"{out} holds an evaluation already; choose another --out")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; choose a new directory")


@dataclasses.dataclass(frozen=True)
class PerplexityOf:
    """Measure a model's perplexity on texts: per token, per byte and per word.

    Example: `cla-jax perplexity runs/mine --text book.txt --stride 128`
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run's directory or a Hugging Face checkpoint directory, as for generate."""
    text: tuple[Path, ...]
    """UTF-8 files, each a document of its own."""
    stride: int | None = None
    """Tokens that each window adds: fewer give every token more context and take longer. Default:
    the model's context, disjoint windows."""
    batch_size: int | None = None
    """Windows at a time. Default: 8,192 tokens."""
    through_cache: bool = False
    """Token by token through the KV cache, as text is generated, instead of by prefill."""
    cache_dtype: CacheDtype | None = None
    """Of that cache, which prefill reads too: what int8 or float8_e4m3fn costs. Default: that of
    the activations."""
    tokenizer: str | None = None
    """For a directory that does not hold its own: as for prepare-data."""

    def run(self) -> None:
        """Measure."""
        texts = [_read(path) for path in self.text]
        if not any(texts):
            raise ValueError("--text: nothing but empty files")
        from cla_jax.evaluation import Scorer, perplexity
        from cla_jax.loading import load

        model = load(self.checkpoint, tokenizer=self.tokenizer)
        scorer = Scorer(
            model.decoder, batch_size=self.batch_size, through_cache=self.through_cache,
            cache_dtype=self.cache_dtype,
        )  # fmt: skip
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("windows", total=None)
            found = perplexity(
                scorer, model.tokenizer, texts, stride=self.stride,
                on_done=lambda n: bar.advance(task, n),
            )  # fmt: skip
        stride = scorer.context if self.stride is None else self.stride
        through = self.through_cache or self.cache_dtype
        cached = f", {scorer.cache_dtype} cache" if through else ""
        print(f"{model.config.name}, context {scorer.context:,}, stride {stride:,}{cached}")
        for what, count, value in (
            ("token", found.tokens, found.token_perplexity),
            ("byte", found.bytes, found.byte_perplexity),
            ("word", found.words, found.word_perplexity),
        ):
            print(f"{what:5}  perplexity {value:,.4f}  ({count:,})")
        print(f"{found.bits_per_byte:.4f} bits per byte")


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--text: there is no file {path}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is wrong") from None
