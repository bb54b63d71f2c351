"""The `cla-jax` command: a thin face over the library."""

import csv
import dataclasses
import difflib
import io
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.registry import model, model_names
from cla_jax.sharing import KVSharing

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

    Example: `cla-jax train tiny/MQA-CLA2 --out runs/mine --text my_text/ --training.steps 500
    --training.data.sequence-length 256 --training.data.batch-size 8`
    """

    name: Annotated[str, tyro.conf.Positional]
    """The model; `cla-jax models` lists them."""
    out: Path
    """The run's directory."""
    training: TrainConfig
    """The recipe; the defaults are the CLA paper's."""
    text: Path | None = None
    """A UTF-8 text file, or a folder of .txt files. Default: the Python standard library."""
    data_dir: Path = Path("runs/data")
    """Where prepared text is kept, for the next run."""
    resume: bool = False
    """Go on from the newest checkpoint in `--out`."""

    def run(self) -> None:
        """Train it."""
        config: ModelConfig = model(self.name)  # before the slow imports: a bad name fails at once
        from cla_jax.data import ByteTokenizer, corpus_at, prepare_corpus, prepare_streams
        from cla_jax.training import train

        corpus = prepare_corpus(corpus_at(self.text), self.data_dir)
        streams = prepare_streams(corpus, ByteTokenizer(), self.data_dir)
        if self.resume and not (self.out / "config.json").exists():
            print(f"nothing to resume in {self.out}: starting at step 0", file=sys.stderr)
        trained = train(config, self.training, streams, self.out, resume=self.resume)
        print(f"validation perplexity {trained.result['validation_perplexity']:.3f}, {self.out}")


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


def main() -> None:
    """Entry point of `cla-jax`. Exit codes: 0 done, 1 refused or failed, 2 wrong arguments."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {"models": Models, "diagram": Diagram, "train": Train, "report": Report},
            prog="cla-jax",
            description="Train and measure transformers whose layers share keys and values.",
        )
        command.run()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"cla-jax: {error}")
    except KeyboardInterrupt:
        sys.exit("cla-jax: interrupted")
