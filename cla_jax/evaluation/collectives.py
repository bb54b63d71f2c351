"""What a compiled program sends between devices, read from its HLO text, by mesh axis.

A collective in a loop counts as often as the loop runs; one that XLA has cut into asynchronous
parts, which share a channel, counts once; an all-reduce that XLA for TPUs has fused with the slice
that a device keeps of it is a reduce-scatter.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Collective", "bytes_by_axis", "collectives", "read_groups"]

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
          "ragged-all-to-all", "collective-broadcast")  # fmt: skip
_FUSED = "all-reduce-scatter"
_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4}
_GROUPS = re.compile(
    r"(?P<kind>replica_groups|source_target_pairs)=(?P<groups>.*?)(?:, [a-z_]+=|$)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: as HLO names it.
        axes: the mesh axes that its groups span; None: they could not be read.
        group: devices of a group; of a permutation 2.
        bytes: of the whole array, one device's group's: what an all-gather returns.
        times: how often a run of the program does it.
        counted: whether that is known; if not it is so often at least, in a loop whose turns
            cannot be told.
    """

    kind: str
    axes: tuple[str, ...] | None
    group: int
    bytes: int
    times: int
    counted: bool = True

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a run of the program, in a ring."""
        share = (self.group - 1) / max(self.group, 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return round(self.bytes * factor * self.times)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
        hlo: `Compiled.as_text()`.
        mesh: devices along each axis, in the mesh's order.
    """
    programs, entry = _parse(hlo)
    scattered = {
        one.name for name, program in programs.items() if name.startswith(_FUSED) for one in program
    }
    found = dict[Any, Collective]()
    for number, (one, times, counted) in enumerate(_walk(programs, entry, 1, True)):
        kind = one.operation.removesuffix("-start")
        if kind not in _KINDS:
            continue
        axes, group = _axes(one.rest, mesh)
        if group < 2:
            continue
        size = _bytes(one, kind, group)
        kind = "reduce-scatter" if one.name in scattered else kind
        collective = Collective(kind, axes, group, size, times, counted)
        channel, groups = re.search(r"channel_id=(\d+)", one.rest), _GROUPS.search(one.rest)
        # A permutation and its transpose, in the backward pass, share one too: not the groups.
        key = (channel[1], groups and groups["groups"]) if channel else number
        # Its parts may lie in a loop that hides it: it is begun as often as the one outside.
        if key not in found or collective.times < found[key].times:
            found[key] = collective
    return list(found.values())


def bytes_by_axis(found: Sequence[Collective]) -> dict[str, int]:
    """Bytes that a device sends, by mesh axis (`fsdp+tensor`: over both at once), most first."""
    total = dict[str, int]()
    for one in found:
        name = "unknown" if one.axes is None else "+".join(one.axes)
        total[name] = total.get(name, 0) + one.sent
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def read_groups(text: str, devices: int) -> list[tuple[int, ...]]:
    """Groups of devices, or pairs of a permutation, in each of the ways that XLA writes them.

    `{{0,2},{1,3}}`; `[2,4]<=[8]` and `[2,2]<=[2,2]T(1,0)` (an iota, reshaped and transposed);
    `mesh['stage'=2,'data'=4] {'stage'}` (the devices that differ in these axes alone, of which
    `'data':(2)2` is the factor 2 behind the outermost 2); `{}`: all.

    Args:
        text: the value of `replica_groups` or `source_target_pairs`.
        devices: of the program.

    Raises:
        ValueError: they are written otherwise.
    """
    if text == "{}":
        return [tuple(range(devices))]
    if text.startswith("{"):
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", text)]
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (
            [int(n) for n in (part or "").split(",") if n] for part in iota.groups()
        )
        ids = np.arange(math.prod(source)).reshape(source)
        groups = (ids.transpose(order) if order else ids).reshape(shape)
        return [tuple(group) for group in groups.tolist()]
    mesh = re.fullmatch(r"mesh\[(.*?)\] \{(.*)\}", text)
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1] if mesh else "")}
    if mesh is None or "device_ids" in text or math.prod(sizes.values()) != devices:
        raise ValueError(f"groups of {devices} devices written as {text!r}")
    # An axis from the product of its factors further out to that with its own, as a range.
    named = [
        (axis, int(out or 1), int(out or 1) * int(size or sizes[axis]))
        for axis, out, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2])
    ]
    factors = [
        (axis, *cut)
        for axis, n in sizes.items()
        for cut in itertools.pairwise(sorted({1, n, *_ends(named, axis)}))
    ]
    ids = np.arange(devices).reshape([stop // start for _, start, stop in factors])
    differ = [
        position
        for axis, first, last in named
        for position, (of, start, stop) in enumerate(factors)
        if of == axis and first <= start and stop <= last
    ]
    moved = np.moveaxis(ids, differ, range(-len(differ), 0))
    groups = moved.reshape(-1, math.prod(ids.shape[position] for position in differ))
    return [tuple(group) for group in groups.tolist()]


def _ends(named: Sequence[tuple[str, int, int]], axis: str) -> set[int]:
    return {end for of, start, stop in named if of == axis for end in (start, stop)}


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    programs, entry, current = dict[str, list[_Instruction]](), "", list[_Instruction]()
    for line in hlo.splitlines():
        if opened := _COMPUTATION.match(line):
            current = programs.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif (found := _INSTRUCTION.match(line)) and found[4]:
            current.append(_Instruction(found[2], found[3], found[4], found[5], bool(found[1])))
    return programs, entry


def _walk(
    programs: dict[str, list[_Instruction]], name: str, times: int, counted: bool
) -> Iterator[tuple[_Instruction, int, bool]]:
    """Every instruction that is run, with how often, and whether that is known."""
    for one in programs.get(name, []):
        yield one, times, counted
        trips = _trips(programs, programs[name], one) if one.operation == "while" else 1
        known = counted and trips is not None
        inner = times * (1 if trips is None else trips)
        called = _CALLED.findall(one.rest)
        for branches in _BRANCHES.findall(one.rest):
            called += re.findall(r"[\w.\-]+", branches)
        for other in called:
            yield from _walk(programs, other, inner, known)


def _trips(
    programs: dict[str, list[_Instruction]], within: list[_Instruction], loop: _Instruction
) -> int | None:
    """How often a loop runs: XLA says, or it counts up to a constant; None: not to be told.

    Of the last, which XLA for TPUs writes, a start that is no constant is taken to be 0.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition, body = (
        programs.get(match[1], [])
        if (match := re.search(rf"{part}=%?([\w.\-]+)", loop.rest))
        else []
        for part in ("condition", "body")
    )
    test = next((one for one in condition if one.root), None)
    if test is None or test.operation != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = (_origin(condition, name) for name in test.operands)
    index = re.search(r"index=(\d+)", counter.rest) if counter else None
    if index is None or limit is None or limit.name not in _constants(condition):
        return None
    position = int(index[1])
    following, steps = _element(body, next((o for o in body if o.root), None), position), []
    if following is not None and following.operation == "add":
        origins = [_origin(body, name) for name in following.operands]
        steps = [_constants(body).get(one.name, 0) for one in origins if one]
    step = max(steps, default=0)
    if step < 1:
        return None
    begun = _element(within, _origin(within, loop.operands[0]), position)
    start = _constants(within).get(begun.name, 0) if begun else 0
    return max(-(-(_constants(condition)[limit.name] - start) // step), 0)


def _element(
    program: list[_Instruction], whole: _Instruction | None, position: int
) -> _Instruction | None:
    """What an element of a tuple is, where that is made in the same computation."""
    if whole is None or whole.operation != "tuple" or position >= len(whole.operands):
        return None
    return _origin(program, whole.operands[position])


def _origin(program: list[_Instruction], name: str) -> _Instruction | None:
    """The instruction of a name, or what it is a copy of."""
    one = next((one for one in program if one.name == name), None)
    copied = one is not None and one.operation in ("copy", "bitcast")
    return _origin(program, one.operands[0]) if one and copied else one


def _constants(program: list[_Instruction]) -> dict[str, int]:
    """The scalar integers of a computation."""
    return {
        one.name: int(value[1])
        for one in program
        if one.operation == "constant"
        and re.match(r"[su]\d+\[\]", one.type)
        and (value := re.match(r"(\d+)\)", one.rest))
    }


def _bytes(one: _Instruction, kind: str, group: int) -> int:
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) * _bits(dtype) // 8
        for dtype, shape in _ARRAY.findall(one.type)
        if shape
    ]
    total = sum(sizes) or 4
    if kind == "reduce-scatter":
        return total * group
    if one.operation.endswith("-start"):  # the operand is part of the result
        if kind == "all-gather":
            return round(total * group / (group + 1))
        if kind == "collective-permute":
            return total // 2
    return total


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype) or (int(digits[0]) if digits else 32)


def _axes(text: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...] | None, int]:
    """The mesh axes along which the devices of a group differ, and how many they are."""
    devices = math.prod(mesh.values())
    written = _GROUPS.search(text)
    try:
        groups = read_groups(written["groups"] if written else "", devices)
    except ValueError:
        return None, devices
    if written and written["kind"] == "source_target_pairs":
        groups = [pair for pair in groups if pair[0] != pair[1]]
    size = max(map(len, groups), default=1)
    coordinates = np.array(np.unravel_index(np.arange(devices), tuple(mesh.values()))).T
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        differ |= np.ptp(coordinates[list(group)], axis=0) > 0
    return tuple(itertools.compress(mesh, differ)), size
