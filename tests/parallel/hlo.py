"""What a program sends, read from its jaxpr and from its compiled text."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|"
    r"collective-broadcast|ragged-all-to-all|reduce-scatter)(?:-start)?\(.*?"
    r"(?:replica_groups|source_target_pairs)=(?P<groups>.*?)(?:, [a-z_]+=|$)"
)
_OTHERWISE = re.compile(
    r"[})\]] (?:all-|collective-|reduce-scatter|ragged-)[\w-]*(?<!-done)\(|replica_groups"
)
_ARRAY = re.compile(r"\b([a-z]+\d+\w*)\[([\d,]*)\]")


class Sent(NamedTuple):
    """An array that a collective sends, or one of a tuple of arrays.

    Attributes:
        kind: of the collective.
        shape: on a device, without axes of one element.
        groups: of devices, as positions in the mesh.
    """

    kind: str
    shape: tuple[int, ...]
    groups: list[tuple[int, ...]]


def collectives(text: str, devices: int) -> list[Sent]:
    """Every array that the collectives of a compiled program send."""
    found = []
    for line in text.splitlines():
        if (match := _COLLECTIVE.search(line)) is None:
            # Nothing is overlooked because it is written otherwise.
            assert not _OTHERWISE.search(line), line
            continue
        groups = read_groups(match["groups"], devices)
        arrays = _ARRAY.findall(match["result"])
        assert arrays, line
        for _, sizes in arrays:
            shape = tuple(int(n) for n in sizes.split(",") if n and n != "1")
            found.append(Sent(match["kind"], shape, groups))
    return found


def read_groups(text: str, devices: int) -> list[tuple[int, ...]]:
    """Groups of devices in each of the ways that XLA writes them.

    `{{0,2},{1,3}}`; `[2,4]<=[8]` and `[2,2]<=[2,2]T(1,0)` (an iota, reshaped and transposed);
    `mesh['stage'=2,'data'=4] {'stage'}` (the devices that differ in these axes alone); `{}`: all.
    """
    if text == "{}":
        return [tuple(range(devices))]
    if text.startswith("{"):
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", text)]
    if match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None
                                for part in match.groups())  # fmt: skip
        assert shape is not None
        assert source is not None
        ids = np.arange(math.prod(source)).reshape(source)
        return [tuple(g) for g in ids.transpose(order).reshape(shape).tolist()]
    match = re.fullmatch(r"mesh\[(.*?)\] \{(.*)\}", text)
    assert match is not None, f"groups of devices written as {text}"
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    named = re.findall(r"'(\w+)'", match[2])
    assert named, text
    assert "device_ids" not in text, text
    ids = np.arange(devices).reshape(tuple(axes.values()))
    places = [list(axes).index(name) for name in named]
    moved = np.moveaxis(ids, places, range(-len(places), 0))
    return [tuple(g) for g in moved.reshape(-1, math.prod(axes[n] for n in named)).tolist()]


def across_stages(text: str, stages: int, devices: int) -> list[Sent]:
    """The collectives whose groups hold devices of several stages, the mesh's outermost axis."""
    each = devices // stages
    return [
        sent
        for sent in collectives(text, devices)
        if any(len({device // each for device in group}) > 1 for group in sent.groups)
    ]


def permuted(jaxpr: ClosedJaxpr) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of all that `ppermute` sends, in inner jaxprs too."""
    avals: list[Any] = [
        invar.aval
        for equation in _equations(jaxpr.jaxpr)
        if equation.primitive.name == "ppermute"
        for invar in equation.invars
    ]
    return [(aval.shape, str(aval.dtype)) for aval in avals]


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        values = itertools.chain.from_iterable(
            value if isinstance(value, tuple | list) else [value]
            for value in equation.params.values()
        )
        for value in values:
            if hasattr(value, "eqns"):
                yield from _equations(value)
            elif hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)
