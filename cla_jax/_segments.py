"""Owner map -> scan segments: the least code that a compiler must trace to run every layer.

Compile time of a scanned stack follows the layers in the scans' bodies, not the depth, so a sharing
map is cut into segments whose periods sum to the least. Maps without a period come out as one
segment that is run once, by the same rule: there is no second code path.
"""

import dataclasses
import functools
import heapq
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` times the same `period` of layer roles, starting at layer `start`.

    CLA2 on 20 layers is one segment, `(own, read) x 10`; KeepEnds is `(own) x 1, (own, read) x 9,
    (own) x 1`; DenseFront is `(own) x 10, (read) x 9, (own) x 1`.

    Attributes:
        start: first layer.
        period: layers in one repeat: the body of the scan.
        repeats: steps of the scan.
        sources: for each of the `period` layers, where its K/V come from. In `[0, period)`: the
            layer at that position of the same repeat (its own position: an owner). Below zero,
            `~layer`: the absolute layer, before `start`, that every repeat reads.
    """

    start: int
    period: int
    repeats: int
    sources: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last layer."""
        return self.start + self.period * self.repeats

    @property
    def owners(self) -> tuple[int, ...]:
        """The owner of each of the segment's layers, `start` to `stop`: the inverse of the cut."""
        return tuple(
            self.start + repeat * self.period + source if source >= 0 else ~source
            for repeat in range(self.repeats)
            for source in self.sources
        )


@functools.lru_cache(maxsize=256)
def segments(owners: tuple[int, ...]) -> tuple[Segment, ...]:
    """The cut of a valid owner map with the fewest traced layers, then the fewest segments.

    A shortest path over the layers (Dijkstra), whose edges are the segments that start at a layer;
    maps of hundreds of layers take well under a second.
    """
    depth = len(owners)
    last_read = {owner: layer for layer, owner in enumerate(owners)}
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    came_by: dict[int, Segment] = {}
    queue: list[tuple[tuple[int, int], int]] = [((0, 0), 0)]
    while queue:
        cost, start = heapq.heappop(queue)
        if start == depth:
            break
        if cost > best[start]:
            continue
        for period in range(1, depth - start + 1):
            new = (cost[0] + period, cost[1] + 1)
            if depth in best and new >= best[depth]:
                break
            for segment in _grow(owners, last_read, start, period):
                if segment.stop not in best or new < best[segment.stop]:
                    best[segment.stop], came_by[segment.stop] = new, segment
                    heapq.heappush(queue, (new, segment.stop))
    path: list[Segment] = []
    stop = depth
    while stop:
        path.append(came_by[stop])
        stop = path[-1].start
    return tuple(reversed(path))


def _grow(
    owners: Sequence[int], last_read: dict[int, int], start: int, period: int
) -> Iterator[Segment]:
    """Every segment of this start and period, shortest first.

    K/V leave a scan through its carry, which holds those of the last repeat alone; so an owner of
    an earlier repeat must have had its last reader by the end of its own.
    """
    sources = tuple(o - start if o >= start else ~o for o in owners[start : start + period])
    repeats = 1
    while True:
        yield Segment(start, period, repeats, sources)
        begin = start + repeats * period
        if begin + period > len(owners):
            return
        same = all(
            owners[begin + position] == (begin + source if source >= 0 else ~source)
            for position, source in enumerate(sources)
        )
        escapes = any(last_read.get(layer, -1) >= begin for layer in range(begin - period, begin))
        if not same or escapes:
            return
        repeats += 1
