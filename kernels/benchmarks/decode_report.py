"""The CSV of `decode_attention.py`, and its table and summary. Imports no JAX."""

import collections
import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from decode_shapes import Shape

OURS = "mosaic_gpu"
JAX_PATHS = ("mosaic_gpu", "cudnn", "xla", "jax_nn_xla")
PEERS = ("torch_flash", "torch_cudnn", "flashinfer")
ORDER = (*JAX_PATHS, "reference", *PEERS)


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape and implementation. Without `microseconds` there is no time, and `note` says why.

    `microseconds` are of a call, from the shortest of `windows` of repeated work, of which `clean`
    lie within 1 % of it; the three shortest `agreed`, or something disturbed all of them.
    `tb_per_second` counts the K/V that a call must read, `fraction` is of `ceiling_tb_per_second`,
    the read bandwidth measured in the same run; `error` is the norm of the difference from float32
    over the norm. `layers` caches are read in turn. `default` is what decode_attention chooses.
    """

    shape: Shape
    implementation: str
    default: str = ""
    layers: int = 0
    microseconds: float | None = None
    agreed: bool | None = None
    windows: int | None = None
    clean: int | None = None
    tb_per_second: float | None = None
    fraction: float | None = None
    error: float | None = None
    temporary_bytes: int | None = None
    ceiling_tb_per_second: float | None = None
    device: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[Shape, str]:
        return self.shape, self.implementation


_OF_SHAPE = tuple(field.name for field in dataclasses.fields(Shape))
_OF_ROW = tuple(field.name for field in dataclasses.fields(Row) if field.name != "shape")
# Of a file of an earlier version `spread` is passed over, and these are not there.
_LATER = {"ragged", "agreed", "windows", "clean"}
COLUMNS = ("name", *_OF_SHAPE, "kv_bytes", "cache_bytes", *_OF_ROW)


def append(path: Path, row: Row) -> None:
    """Add a row to the file at once, so that what was measured stays."""
    values = [row.shape.name, *(getattr(row.shape, name) for name in _OF_SHAPE)]
    values += [row.shape.kv_bytes, row.shape.cache_bytes]
    for name in _OF_ROW:
        value = getattr(row, name)
        rounded = isinstance(value, float)
        values.append("" if value is None else f"{value:.5g}" if rounded else value)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(values)


def check_can_grow(path: Path) -> None:
    """Before a run goes on in a file.

    Raises:
        ValueError: its columns are not those that `append` writes.
    """
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                raise ValueError(
                    f"{path}: its columns are not those of this version; expected a new folder"
                )


def read(path: Path) -> list[Row]:
    """The rows of a file; of several with one shape and implementation the last.

    Raises:
        ValueError: not a file that `append` wrote.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the results.csv of an earlier run")
    found: dict[tuple[Shape, str], Row] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) - _LATER <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: its columns are not those of this benchmark's results.csv")
        for number, line in enumerate(reader, 2):
            try:
                row = _row(line)
            except (TypeError, ValueError):
                # A run that was killed while it wrote leaves half a line, the last.
                print(f"{path}, line {number}: not a whole row, passed over")
                continue
            found[row.key] = row
    return list(found.values())


def _row(line: dict[str, str]) -> Row:
    if None in line.values() or None in line:
        raise ValueError("too short")
    B, S, N, K, H = (int(line[name]) for name in ("B", "S", "N", "K", "H"))
    shape = Shape(B, S, N, K, H, line["dtype"], line["skewed"] == "True",
                  int(line.get("ragged") or 0))  # fmt: skip

    def number(name: str) -> float | None:
        return float(line[name]) if line[name] else None

    def count(name: str) -> int | None:
        return int(line[name]) if line.get(name) else None

    return Row(
        shape,
        line["implementation"],
        default=line["default"],
        layers=int(line["layers"]),
        microseconds=number("microseconds"),
        agreed=line["agreed"] == "True" if line.get("agreed") else None,
        windows=count("windows"),
        clean=count("clean"),
        tb_per_second=number("tb_per_second"),
        fraction=number("fraction"),
        error=number("error"),
        temporary_bytes=count("temporary_bytes"),
        ceiling_tb_per_second=number("ceiling_tb_per_second"),
        device=line["device"],
        note=line["note"],
    )


Times = dict[Shape, dict[str, Row]]


def by_shape(rows: Iterable[Row]) -> Times:
    """Rows of each shape by implementation: shapes by size, implementations in a fixed order."""
    rank = {name: i for i, name in enumerate(ORDER)}
    found: Times = {}
    for row in sorted(
        rows,
        key=lambda r: (
            (not r.shape.full, r.shape.skewed, r.shape.dtype, r.shape.kv_bytes),
            (r.shape, rank.get(r.implementation, len(rank))),
        ),
    ):
        found.setdefault(row.shape, {})[row.implementation] = row
    return found


def _columns(times: Times) -> list[str]:
    present = {name for rows in times.values() for name in rows}
    return [name for name in ORDER if name in present]


def default_row(rows: dict[str, Row]) -> Row | None:
    """The row of what decode_attention chooses for this shape, if it was timed."""
    chosen = next((row.default for row in rows.values() if row.default), "")
    return rows.get(chosen)


def table(rows: Sequence[Row]) -> str:
    """A row a shape in Markdown, microseconds, the best in bold; below, why some have no time."""
    times = by_shape(rows)
    names = _columns(times)
    heads = ["shape", "K/V, MB", *names, "default", "of bandwidth"]
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("| --- |" + " ---: |" * (len(names) + 1) + " --- | ---: |")
    missing = collections.Counter[tuple[str, str]]()
    for shape, measured in times.items():
        best = min(
            (row.microseconds for row in measured.values() if row.microseconds), default=None
        )
        cells = [shape.name, f"{shape.kv_bytes / 1e6:.1f}"]
        for name in names:
            row = measured.get(name)
            if row is None:
                cells.append("")
            elif row.microseconds is None:
                missing[name, row.note] += 1
                wrong = row.note.startswith("wrong")
                cells.append("wrong" if wrong else "-")
            else:
                cell = f"{row.microseconds:.1f}"
                cells.append(f"**{cell}**" if row.microseconds == best else cell)
        chosen = default_row(measured)
        cells.append(next((row.default for row in measured.values()), ""))
        cells.append(f"{chosen.fraction:.2f}" if chosen and chosen.fraction else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"* {name}, no time on {_shapes(n)}: {note}" for (name, note), n in sorted(missing.items())
    ]
    how = collections.Counter(
        (row.implementation, row.note) for row in rows if row.microseconds and row.note
    )
    lines += [f"* {name}, on {_shapes(n)}: {note}" for (name, note), n in sorted(how.items())]
    return "\n".join(lines).rstrip() + "\n"


def _shapes(n: int) -> str:
    return f"{n} shape" + "s" * (n != 1)


def geometric_mean(ratios: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def summary(rows: Sequence[Row]) -> str:
    """How the default and our kernel compare: with each path, by size, 8 bits, skewed, ragged.

    And which times no three windows agreed on.
    """
    times = by_shape(rows)
    names = _columns(times)
    ceilings = sorted({row.ceiling_tb_per_second for row in rows if row.ceiling_tb_per_second})
    devices = sorted({row.device for row in rows if row.device})
    lines = [
        f"{_shapes(len(times))} on {', '.join(devices)}; read bandwidth "
        f"{', '.join(f'{c:.3f}' for c in ceilings)} TB/s.", ""
    ]  # fmt: skip
    seen: dict[Shape, Row] = {}
    for label, pick in (("default", default_row), (OURS, lambda rows: rows.get(OURS))):
        chosen = {
            shape: row for shape, found in times.items()
            if (row := pick(found)) and row.microseconds
        }  # fmt: skip
        if not chosen or chosen == seen:
            continue  # nothing, or what has just been said
        seen = chosen
        lines.append(f"{label}, timed on {len(chosen)} of {_shapes(len(times))}:")
        for name in names:
            if name != label:
                lines += _against(name, chosen, times)
        lines += _fastest(label, chosen, times)
        if label == "default":
            lines += _by_size(chosen)
            lines += _pairs("8-bit", chosen, lambda s: dataclasses.replace(s, dtype="bf16"))
            lines += _pairs("skewed", chosen, lambda s: dataclasses.replace(s, skewed=False))
            lines += _pairs("ragged", chosen, lambda s: dataclasses.replace(s, ragged=0))
        lines.append("")
    if unsettled := [row for row in rows if row.microseconds and row.agreed is False]:
        lines.append("Disturbed, maybe too long (no three windows agreed):")
        lines += [
            f"* {row.shape.name}, {row.implementation}: {row.microseconds:.1f} us, {row.clean} of "
            f"{row.windows} windows within 1 % of the shortest" for row in unsettled
        ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _against(name: str, chosen: dict[Shape, Row], times: Times) -> list[str]:
    ratios = {
        shape: other.microseconds / row.microseconds
        for shape, row in chosen.items()
        if row.microseconds
        and (other := times[shape].get(name))
        and other is not row
        and other.microseconds
    }
    if not ratios:
        return []
    worst = min(ratios, key=lambda shape: ratios[shape])
    slower = [shape for shape, ratio in ratios.items() if ratio < 1]
    lines = [
        f"* against {name}: {geometric_mean(list(ratios.values())):.2f} times as fast in the "
        f"geometric mean of {_shapes(len(ratios))}; least {ratios[worst]:.2f} ({worst.name}); "
        f"slower on {len(slower)}"
    ]
    if slower and name in PEERS:
        lines[0] += ":"
        lines += [f"  * {shape.name} ({ratios[shape]:.2f})" for shape in slower]
    return lines


def _fastest(label: str, chosen: dict[Shape, Row], times: Times) -> list[str]:
    """Of all shapes that any JAX path was timed on, whether ours was or not."""
    beaten: list[str] = []
    compared = 0
    for shape, found in times.items():
        paths = {
            name: row.microseconds for name, row in found.items()
            if name in JAX_PATHS and row.microseconds
        }  # fmt: skip
        if not paths:
            continue
        compared += 1
        best = min(paths, key=lambda name: paths[name])
        own = chosen.get(shape)
        if own is None:
            beaten.append(f"{shape.name} (no time; {best} {paths[best]:.1f} us)")
        elif own.microseconds and own.microseconds > paths[best]:
            ratio = own.microseconds / paths[best]
            beaten.append(f"{shape.name} ({best} is {ratio:.2f} times as fast)")
    if not compared:
        return []
    share = 1 - len(beaten) / compared
    lines = [f"* {label} is the fastest JAX path on {share:.1%} of {_shapes(compared)}"]
    if beaten:
        lines[0] += "; not on:"
    return lines + [f"  * {name}" for name in beaten]


_SIZES = ((0, "under 8 MB"), (8e6, "8 to 64 MB"), (64e6, "64 to 128 MB"), (128e6, "128 to 256 MB"),
          (256e6, "256 MB and more"))  # fmt: skip


def _by_size(chosen: dict[Shape, Row]) -> list[str]:
    lines: list[str] = []
    for (least, label), most in zip(
        _SIZES, [*(size for size, _ in _SIZES[1:]), math.inf], strict=True
    ):
        fractions = {
            shape: row.fraction for shape, row in chosen.items()
            if shape.dtype == "bf16" and shape.full and least <= shape.kv_bytes < most
            and row.fraction
        }  # fmt: skip
        if fractions:
            worst = min(fractions, key=lambda shape: fractions[shape])
            mean = geometric_mean(list(fractions.values()))
            lines.append(
                f"* bf16, {label}: {mean:.2f} of the bandwidth in the geometric mean of "
                f"{_shapes(len(fractions))}, at least {fractions[worst]:.2f} ({worst.name})"
            )
    return lines


def _pairs(what: str, chosen: dict[Shape, Row], partner: Callable[[Shape], Shape]) -> list[str]:
    lines: list[str] = []
    for shape, row in chosen.items():
        other = partner(shape)
        own, its = row.microseconds, chosen[other].microseconds if other in chosen else None
        if other != shape and own and its:
            lines.append(
                f"  * {shape.name} {own:.1f} us, {other.name} {its:.1f} us "
                f"({its / own:.2f} times as fast)"
            )
    return [f"* {what} batches against their counterparts:", *lines] if lines else []
