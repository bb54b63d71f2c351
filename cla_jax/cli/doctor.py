"""`cla-jax doctor`: versions, devices and the paths that attention takes on them."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from cla_jax.environment import Choice, Diagnosis, Package

_COLORS = {"ok": "green", "missing": "red", "wrong version": "red"}


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what this machine offers: versions, devices, and which attention runs here and why.

    Exit code 1 if something that is needed is missing or too old, else 0. For a bug report:
    `cla-jax doctor --json`.
    """

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print it."""
        # A look must not take most of a GPU's memory, even for a moment.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from cla_jax.environment import diagnose

        diagnosis = diagnose()
        if self.json:
            print(json.dumps(diagnosis.to_dict(), indent=2))
        else:
            _show(diagnosis, Console(highlight=False))
        if diagnosis.problems:
            sys.exit(1)


def _show(diagnosis: "Diagnosis", console: Console) -> None:
    console.print(f"[bold]cla-jax[/] {escape(diagnosis.version)}")
    console.print(f"Python {diagnosis.python}, {diagnosis.system}")
    _section(console, "Packages", _needed(p for p in diagnosis.packages if p.extra is None))
    _section(console, "Optional", _optional([p for p in diagnosis.packages if p.extra]))
    from cla_jax.inference.sizes import format_size

    devices = []
    for device in diagnosis.devices:
        memory = "" if device.memory_bytes is None else f"{format_size(device.memory_bytes)} each"
        capability = device.compute_capability
        devices.append((
            f"{device.count} x {device.kind}",
            f"JAX may use {memory}" if memory else "",
            f"compute capability {capability}" if capability else "",
        ))  # fmt: skip
    _section(console, "Devices", devices or [("none: JAX does not start",)])
    _section(console, "Attention on the first of them", _choices(diagnosis.attention))
    places = [
        (place.what, escape(place.path),
         "" if place.free_bytes is None else f"{format_size(place.free_bytes)} free")
        for place in diagnosis.places
    ]  # fmt: skip
    _section(console, "Places", places, (1,))
    console.print()
    for problem in diagnosis.problems:
        console.print(f"[red]problem:[/] {escape(problem)}", soft_wrap=True)
    if not diagnosis.problems:
        console.print("[green]Everything that is needed is here.[/]")


def _section(
    console: Console, title: str, rows: Sequence[Sequence[str]], wraps: tuple[int, ...] = (2,)
) -> None:
    if not rows:
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for number in range(max(map(len, rows))):
        table.add_column(no_wrap=number not in wraps, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/]")
    console.print(table)


def _needed(packages: Iterable["Package"]) -> list[tuple[str, ...]]:
    return [
        (p.name, p.version or "", f"[{_COLORS[p.state]}]{p.state}[/]",
         "" if p.state == "ok" else f"{p.wanted or 'any version'} is needed")
        for p in packages
    ]  # fmt: skip


def _optional(packages: Sequence["Package"]) -> list[tuple[str, ...]]:
    """A line for each extra."""
    rows = []
    for extra in dict.fromkeys(p.extra for p in packages):
        members = [p for p in packages if p.extra == extra]
        lacking = [p for p in members if p.state != "ok"]
        held = ", ".join(f"{p.name} {p.version or 'missing'}" for p in members)
        state = "[green]ok[/]" if not lacking else "[yellow]not there[/]"
        hint = "" if not lacking else escape(f"pip install 'cla-jax[{extra}]'")
        rows.append((str(extra), state, held, hint))
    return rows


def _choices(choices: Sequence["Choice"]) -> list[tuple[str, ...]]:
    """Inputs that are treated alike stand in one line."""
    grouped = dict[tuple[str, str, str], list[str]]()
    others = dict[tuple[str, str, str], dict[str, str]]()
    for choice in choices:
        key = (choice.operation, choice.taken, choice.reason)
        grouped.setdefault(key, []).append(choice.inputs)
        others.setdefault(key, {}).update(choice.others)
    rows, operations = list[tuple[str, ...]](), [operation for operation, *_ in grouped]
    for key, inputs in grouped.items():
        operation, taken, reason = key
        which = f" [dim]({'; '.join(inputs)})[/]" if operations.count(operation) > 1 else ""
        rows.append((operation, taken, escape(reason) + which))
        rows += [("", f"[dim]not {name}[/]", f"[dim]{escape(why)}[/]")
                 for name, why in others[key].items()]  # fmt: skip
    return rows
