"""`cla-jax convert`: trained checkpoints to a K/V sharing map."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cla_jax.configs import ModelConfig

_ROWS = ("parameters", "ffn_dim", "kv_layers", "kv_heads", "kv_bytes_per_token")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a Hugging Face checkpoint to a K/V sharing map by merging its KV heads.

    Llama and GPT-NeoX (Pythia) models; the result is meant to be trained a little more (MLKV
    section 4). Example: `cla-jax convert EleutherAI/pythia-160m --sharing MLKV-6 --match-params
    --out pythia-160m-mlkv-6`
    """

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint directory, or OWNER/NAME[@REVISION] on the Hugging Face hub."""
    sharing: str
    """The map: `none`, `CLA2`, `CLA2-KeepEnds`, `MLKV-6`, `owners=0,0,2,2`, ..."""
    out: Path
    """The new checkpoint directory; it must not exist yet, or be empty."""
    kv_heads: int | None = None
    """KV heads of a layer that has any. Default: the source's; with MLKV-n, which counts the heads
    of all layers together, 1."""
    merge: Literal["mean", "first"] = "mean"
    """What becomes of heads that are merged: their mean, or the first of them alone."""
    match_params: bool = False
    """Widen the MLPs, by units that change nothing yet, to the source's parameter count."""
    seed: int = 0
    """Of the new units' input weights."""

    def run(self) -> None:
        """Convert it."""
        from cla_jax import conversion
        from cla_jax.conversion.hf_keys import note_of_unknown
        from cla_jax.conversion.huggingface import load_config
        from cla_jax.conversion.layouts import family
        from cla_jax.data.files import check_free

        # All that can be refused is, before any tensor is read.
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: expected 0 or more")
        check_free(self.out)
        directory = conversion.huggingface_directory(self.source)
        name = conversion.source_name(self.source)
        source, values = load_config(directory, name=name)
        sharing, kv_heads = conversion.parse_sharing(self.sharing, source, self.kv_heads)
        config = conversion.converted_config(source, sharing, kv_heads, self.match_params)
        checkpoint = conversion.load_huggingface(directory, name=name)
        merge = {"mean": conversion.mean, "first": conversion.first}[self.merge]
        converted = conversion.convert(
            checkpoint, sharing, kv_heads, merge, self.match_params, self.seed
        )
        with _sigterm_interrupts():
            conversion.save_huggingface(converted, self.out)
        Console().print(_table(source, config))
        if note := note_of_unknown(values, family(source)):
            print(note)
        print(f"wrote {self.out}")


class _Stopped(KeyboardInterrupt):
    """By a signal; `main` leaves with this code."""

    exit_code = 128 + signal.SIGTERM


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises instead of ending the process at once: what is half written is removed."""

    def stop(*_: object) -> None:
        raise _Stopped("stopped by SIGTERM")

    if threading.current_thread() is not threading.main_thread():  # where no signals are delivered
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _table(source: "ModelConfig", config: "ModelConfig") -> Table:
    table = Table("", source.name, "converted", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in _ROWS:
        figures = (getattr(source, row), getattr(config, row))
        table.add_row(row.replace("_", " "), *(f"{figure:,}" for figure in figures))
    return table
