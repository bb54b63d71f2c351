"""The `cla-jax` command: a thin face over the library."""

import csv
import dataclasses
import difflib
import io
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.recipes import RECIPES
from cla_jax.registry import model, model_names
from cla_jax.sharing import KVSharing

if TYPE_CHECKING:
    from cla_jax.data import Streams

_MODEL_COLUMNS = (
    "name",
    "parameters",
    "kv_layers",
    "kv_heads",
    "head_dim",
    "kv_bytes_per_token",
)


@dataclasses.dataclass(frozen=True)
class Models:
    """List every model of both papers: parameters, K/V layers and heads, K/V bytes per token.

    The bytes are those of a 16-bit cache, as in CLA Table 1.
    """

    pattern: Annotated[str, tyro.conf.Positional] = ""
    """Only names that contain this, such as `1B/` or `CLA2`."""
    csv: bool = False
    """Print CSV: name,parameters,kv_layers,kv_heads,head_dim,kv_bytes_per_token."""

    def run(self) -> None:
        """Print them."""
        names = [n for n in model_names() if self.pattern.lower() in n.lower()]
        if not names:
            near = difflib.get_close_matches(self.pattern, model_names(), n=3, cutoff=0.0)
            raise ValueError(f"no model name contains {self.pattern!r}; nearest: {near}")
        rows = [[getattr(model(n), column) for column in _MODEL_COLUMNS] for n in names]
        if self.csv:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([_MODEL_COLUMNS, *rows])
            print(text.getvalue(), end="")
            return
        table = Table(*(c.replace("_", " ") for c in _MODEL_COLUMNS), box=None)
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for name, *figures in rows:
            table.add_row(name, *(f"{figure:,}" for figure in figures))
        Console().print(table)


@dataclasses.dataclass(frozen=True)
class Diagram:
    """Draw which layer owns K/V and which layer reads whose.

    Takes models' names, or a sharing pattern and a depth: `cla-jax diagram CLA3 --layers 10`. With
    `--figure FILE`, several models are drawn side by side as PNG and SVG:
    `cla-jax diagram 1B/H128-MQA 1B/H128-MQA-CLA2 --figure patterns`.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Models (`1B/H128-MQA-CLA2-KeepEnds`) or a pattern (`CLA2`, `MLKV-6`, `owners=0,0,2,2`)."""
    layers: int | None = None
    """Depth, for a pattern."""
    figure: Path | None = None
    """Draw the models as FILE.png and FILE.svg instead of in text."""

    def run(self) -> None:
        """Draw them."""
        if not self.names:
            raise ValueError("name a model or a sharing pattern, such as 1B/H128-MQA-CLA2")
        if self.figure is not None:
            from cla_jax.reporting import figures
            from cla_jax.reporting.patterns import patterns

            drawing = patterns([model(name) for name in self.names])
            for path in figures.save(drawing, self.figure):
                print(f"wrote {path}")
            return
        for name in self.names:
            sharing = self._sharing(name)
            shared = sharing.num_layers - sharing.kv_layers
            print(
                f"{name}: {sharing.num_layers} layers, {sharing.kv_layers} KV layers, {shared} "
                f"readers; equal pipeline stages: {', '.join(map(str, sharing.stage_counts))}"
            )
            print(sharing.diagram() + "\n")

    def _sharing(self, name: str) -> KVSharing:
        if self.layers is None and "/" not in name and "=" not in name:
            raise ValueError(f"{name!r} is a pattern: give its depth too, as in --layers 20")
        if self.layers is None and "=" not in name:
            return model(name).sharing
        depth = name.count(",") + 1 if self.layers is None else self.layers
        return KVSharing.from_name(name, depth)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on text; the run directory holds its config, metrics, checkpoints and result.

    On your own text as bytes: `cla-jax train tiny/MQA-CLA2 --out runs/mine --text my_text/ --preset
    tiny`. A paper's whole recipe on prepared data: `cla-jax train 1B/H128-MQA-CLA2 --out runs/1b
    --data data/slimpajama --preset cla-1b`. SIGTERM and Ctrl-C save first; --resume goes on.
    """

    name: Annotated[str, tyro.conf.Positional]
    """The model; `cla-jax models` lists them."""
    out: Path
    """The run's directory."""
    training: TrainConfig = dataclasses.field(default_factory=lambda: _preset(sys.argv))
    """The recipe, as the preset has it."""
    preset: Literal["tiny", "cla-1b", "cla-3b", "mlkv"] = "tiny"
    """Whose recipe: the quickstart's, CLA section 3.1 at 1B or 3B, MLKV section 4.4."""
    data: Path | None = None
    """A directory that `cla-jax prepare-data` made."""
    text: str | None = None
    """Instead: text as for prepare-data, read as bytes. Default: the Python standard library."""
    data_dir: Path = Path("runs/data")
    """Where prepared text is kept, for the next run."""
    resume: bool = False
    """Go on from the newest checkpoint in `--out`."""
    force: bool = False
    """Resume though recipe or data differ from those that the run was begun with."""

    def run(self) -> None:
        """Train it."""
        config: ModelConfig = model(self.name)  # before the slow imports: a bad name fails at once
        if self.data is not None and self.text is not None:
            raise ValueError("--data and --text both name the training text: give one of them")
        if self.force and not self.resume:
            raise ValueError("--force is about a run that goes on: give --resume too")
        from cla_jax import data
        from cla_jax.training import train

        if self.data is not None:
            streams = data.open_prepared(self.data)
        else:
            corpus = data.prepare_corpus(data.corpus_at(self.text), self.data_dir)
            streams = data.prepare_streams(corpus, data.ByteTokenizer(), self.data_dir)
        if self.resume and not (self.out / "config.json").exists():
            print(f"nothing to resume in {self.out}: starting at step 0", file=sys.stderr)
        trained = train(
            config, self.training, streams, self.out, resume=self.resume, force=self.force
        )
        print(f"validation perplexity {trained.result['validation_perplexity']:.3f}, {self.out}")


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Turn text into a prepared directory: documents, token streams, a summary.

    Killed and run again, it goes on where it was. Example: `cla-jax prepare-data slimpajama/
    --tokenizer hf:EleutherAI/pythia-160m --out data/slimpajama`
    """

    corpus: Annotated[str, tyro.conf.Positional]
    """A file, a folder of .txt, .jsonl and .jsonl.zst files, or
    tfds:NAME[/CONFIG][:VERSION][@SPLIT]."""
    out: Path
    """The prepared directory."""
    tokenizer: str = "bytes"
    """`bytes`, a `tokenizers` JSON file, or hf:OWNER/NAME[@REVISION] on the Hugging Face hub."""
    validation: str | None = None
    """Validation text, named like the corpus. Default: about 5 % of the corpus's documents."""
    text_key: str = "text"
    """The key of a JSON record, or feature of a TFDS dataset, that holds the text."""
    end_of_text: str | None = None
    """The token that ends a document. Default: <|endoftext|> or </s>."""
    sequence_length: int = 2048
    """Tokens per sequence, for the row counts of the summary alone."""

    def run(self) -> None:
        """Prepare it."""
        if self.sequence_length < 1:
            raise ValueError(f"--sequence-length {self.sequence_length} must be at least 1")
        from cla_jax.data import corpus_at, prepare, tokenizer_at

        tokenizer = tokenizer_at(self.tokenizer, self.end_of_text)
        corpus = corpus_at(self.corpus, self.text_key)
        given = corpus_at(self.validation, self.text_key) if self.validation else None
        info, streams = prepare(corpus, tokenizer, self.out, given)
        console = Console()
        console.print(_summary(streams, self.sequence_length))
        if info.copies_left_out:
            print(f"{info.copies_left_out:,} training documents left out: copies of validation")
        print(f"{self.out}: tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids")


def _summary(streams: "Streams", sequence_length: int) -> Table:
    """Figures of both splits."""
    import numpy as np

    from cla_jax.data import first_fit

    both = (streams.train, streams.validation)
    packings = [first_fit(np.diff(stream.offsets), sequence_length + 1) for stream in both]
    table = Table("", "train", "validation", box=None)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, *figures: object) -> None:
        table.add_row(name, *(f"{figure:,}" for figure in figures))

    add("documents", *(stream.num_documents for stream in both))
    add("bytes of text", *(stream.text_bytes for stream in both))
    add("tokens", *(stream.num_tokens for stream in both))
    table.add_row("bytes per token", *(f"{stream.bytes_per_token:.4f}" for stream in both))
    add(f"rows of {sequence_length}, concat",
        *((stream.num_tokens - 1) // sequence_length for stream in both))  # fmt: skip
    add(f"rows of {sequence_length}, first_fit", *(packing.rows for packing in packings))
    add("  tokens cut off", *(packing.dropped for packing in packings))
    table.add_row(
        "  padding", *(f"{1 - p.tokens / (p.rows * (sequence_length + 1)):.2%}" for p in packings)
    )
    return table


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Train a byte-level BPE tokenizer on text and write it as a `tokenizers` JSON file.

    Example: `cla-jax train-tokenizer my_text/ --vocab-size 4096 --out my_tokenizer.json`
    """

    corpus: Annotated[str, tyro.conf.Positional]
    """Text, named as for prepare-data."""
    vocab_size: int
    """Ids: the 256 bytes, the end token and merges."""
    out: Path
    """The JSON file; it must not exist yet."""
    text_key: str = "text"
    """As for prepare-data."""

    def run(self) -> None:
        """Train it."""
        from cla_jax.data import corpus_at, train_tokenizer

        trained = train_tokenizer(corpus_at(self.corpus, self.text_key), self.vocab_size, self.out)
        print(f"wrote {self.out}: {trained.vocab_size} ids, {trained.end_token} ends a document")
        if trained.vocab_size < self.vocab_size:
            print(f"fewer than {self.vocab_size}: this text has no more pairs to merge")


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the tables and figures of experiments or runs again; nothing is trained.

    Examples: `cla-jax report runs/cla-design-space-tiny`, or, to set runs side by side with the
    first as the baseline, `cla-jax report runs/mine runs/other --out comparison`.
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of experiments, or of finished runs."""
    out: Path | None = None
    """Where to write. Default: the experiment's directory; for runs, runs/report."""

    def run(self) -> None:
        """Write and show them."""
        from cla_jax.reporting.report import report, show

        show(report(self.directories, self.out))


def _preset(arguments: list[str]) -> TrainConfig:
    """The recipe that the command line names: the defaults of all `--training.*` options."""
    given = [b for a, b in itertools.pairwise(arguments) if a == "--preset"]
    given += [a.removeprefix("--preset=") for a in arguments if a.startswith("--preset=")]
    return RECIPES.get(given[-1] if given else "tiny", RECIPES["tiny"])


def main() -> None:
    """Entry point of `cla-jax`.

    Exit codes: 0 done, 1 refused or failed, 2 wrong arguments, 130 and 143 stopped by Ctrl-C or
    SIGTERM (a training run has saved first).
    """
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {
                "models": Models,
                "diagram": Diagram,
                "prepare-data": PrepareData,
                "train-tokenizer": TrainTokenizer,
                "train": Train,
                "report": Report,
            },
            prog="cla-jax",
            description="Train and measure transformers whose layers share keys and values.",
        )
        command.run()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"cla-jax: {error}")
    except KeyboardInterrupt as error:  # a training run's says where it was saved
        print(f"cla-jax: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 130))
