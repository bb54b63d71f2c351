"""What a program sends, read from its jaxpr and from its compiled text."""

import re
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr

from cla_jax.evaluation.collectives import read_groups
from tests.jaxprs import equations

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
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "ppermute"
        for invar in equation.invars
    ]
    return [(aval.shape, str(aval.dtype)) for aval in avals]
