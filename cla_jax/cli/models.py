"""`cla-jax models` and `diagram`: the papers' models and who shares K/V with whom."""

import csv
import dataclasses
import difflib
import io
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

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
    `--figure FILE`, several models are drawn side by side:
    `cla-jax diagram 1B/H128-MQA 1B/H128-MQA-CLA2 --figure patterns`.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Models (`1B/H128-MQA-CLA2-KeepEnds`) or a pattern (`CLA2`, `MLKV-6`, `owners=0,0,2,2`)."""
    layers: int | None = None
    """Depth, for a pattern."""
    figure: Path | None = None
    """Draw the models instead of printing them: as FILE.png and FILE.svg, or, where FILE ends in
    .png, .svg or .pdf, as that alone."""

    def run(self) -> None:
        """Draw them."""
        if not self.names:
            raise ValueError("name a model or a sharing pattern, such as 1B/H128-MQA-CLA2")
        if self.figure is not None:
            from cla_jax.reporting import figures
            from cla_jax.reporting.patterns import patterns

            figures.files_of(self.figure)
            drawing = patterns([model(name) for name in self.names])
            for path in figures.save(drawing, self.figure):
                print(f"wrote {path}")
            return
        for name in self.names:
            sharing = self._sharing(name)
            shared = sharing.num_layers - sharing.kv_layers
            print(
                f"{name}: {sharing.num_layers} layers, {sharing.kv_layers} KV layers, {shared} "
                f"readers; pipeline stages: {', '.join(map(str, sharing.pipeline_stages))}"
            )
            print(sharing.diagram() + "\n")

    def _sharing(self, name: str) -> KVSharing:
        if self.layers is None and "/" not in name and "=" not in name:
            raise ValueError(f"{name!r} is a pattern: give its depth too, as in --layers 20")
        if self.layers is None and "=" not in name:
            return model(name).sharing
        depth = name.count(",") + 1 if self.layers is None else self.layers
        return KVSharing.from_name(name, depth)
