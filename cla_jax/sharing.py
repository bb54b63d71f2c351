"""Which layer owns keys and values, and which layer reads whose: the one idea of this library.

A decoder layer either *owns* K/V (it projects, rotates and caches them) or *reads* those of an
earlier layer. `KVSharing` is that list of owners and everything that follows from it: how many K/V
layers are cached, which layers a scan can run over (`segments`), and where a pipeline may be cut
(`stages`). It is pure Python: hashable, cheap, and it knows no array.

Sources: Cross-Layer Attention (CLA), Brandon et al. 2024, sections 2.2 and 3.2.1; Multi-Layer
Key-Value sharing (MLKV), Zuhri et al. 2024, section 3; the shared upper half is the K/V map of
YOCO, Sun et al. 2024.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Sequence

from cla_jax import _segments
from cla_jax._segments import Segment

__all__ = ["KVSharing", "Segment"]

NAMES = (
    "none",
    "CLA<factor>",
    "CLA<factor>-KeepEnds",
    "CLA<factor>-DenseFront",
    "CLA<factor>-DenseBack",
    "MLKV-<KV heads in all>",
    "SharedUpperHalf",
    "owners=0,0,2,2",
)


@dataclasses.dataclass(frozen=True)
class KVSharing:
    """The owner of every layer's K/V.

    Attributes:
        owners: `owners[i]` is the layer whose K/V layer `i` attends to; `owners[i] == i` makes
            layer `i` an owner.

    Raises:
        ValueError: an owner above its reader, or one that itself only reads; names the layer and
            the nearest valid owner.

    Examples:
        >>> KVSharing((0, 0, 2, 2)).kv_layers
        2
        >>> KVSharing.cla(6, factor=2).owners
        (0, 0, 2, 2, 4, 4)
    """

    owners: tuple[int, ...]

    def __post_init__(self) -> None:
        for layer, owner in enumerate(self.owners):
            if isinstance(owner, bool) or not hasattr(owner, "__index__"):
                raise ValueError(f"layer {layer} has owner {owner!r}: expected a layer's number")
        object.__setattr__(self, "owners", tuple(int(o) for o in self.owners))
        if not self.owners:
            raise ValueError("owners is empty: a sharing map needs at least one layer")
        for layer, owner in enumerate(self.owners):
            if owner > layer:
                raise ValueError(
                    f"layer {layer} reads the K/V of layer {owner}, which runs after it: an upward "
                    "map, as in Layer-Condensed KV (LCKV), is not supported. An owner is the layer "
                    f"itself or an earlier one: 0 to {layer}, the nearest is {layer}"
                )
            if owner < 0 or self.owners[owner] != owner:
                nearest = _nearest_owner(self.owners, layer, owner)
                why = "is no layer" if owner < 0 else f"itself reads layer {self.owners[owner]}"
                raise ValueError(
                    f"layer {layer} reads the K/V of layer {owner}, but layer {owner} {why}: only "
                    f"an owner's K/V can be read, the nearest is layer {nearest}"
                )

    # --- the named patterns, for any depth -------------------------------------------------------

    @classmethod
    def none(cls, num_layers: int) -> "KVSharing":
        """Every layer owns its K/V: plain MHA, GQA or MQA."""
        _check_depth(num_layers)
        return cls(tuple(range(num_layers)))

    @classmethod
    def cla(cls, num_layers: int, factor: int) -> "KVSharing":
        """CLA with a sharing factor: each K/V serves `factor` adjacent layers (CLA section 2.2).

        When `factor` does not divide the depth, the short group comes first, as in the paper's
        Figure 2, where layer 0 of the 10-layer CLA3 stands alone.

        Raises:
            ValueError: `factor` is below 1 or larger than the depth.
        """
        _check_depth(num_layers)
        _check_factor(factor, num_layers)
        return cls(_groups(num_layers, factor))

    @classmethod
    def keep_ends(cls, num_layers: int, factor: int = 2) -> "KVSharing":
        """CLA with first and last layer unshared (CLA section 3.2.1, KeepEnds)."""
        _check_depth(num_layers)
        _check_factor(factor, max(1, num_layers - 2))
        inner = _groups(num_layers - 2, factor) if num_layers > 2 else ()
        ends = (num_layers - 1,) if num_layers > 1 else ()
        return cls((0, *(1 + o for o in inner), *ends))

    @classmethod
    def dense_front(cls, num_layers: int, factor: int = 2) -> "KVSharing":
        """Owners first, then readers of the last of them, then one owner (CLA section 3.2.1).

        20 layers, factor 2: layers 0 to 9 own, 10 to 18 read layer 9, 19 owns: one K/V layer more
        than CLA2.
        """
        _check_depth(num_layers)
        _check_factor(factor, num_layers)
        kv_layers = math.ceil(num_layers / factor)
        last = num_layers - 1
        return cls((*(min(i, kv_layers - 1) for i in range(last)), last))

    @classmethod
    def dense_back(cls, num_layers: int, factor: int = 2) -> "KVSharing":
        """Two owners, readers of the second, then owners to the end (CLA section 3.2.1).

        20 layers, factor 2: layers 0 and 1 own, 2 to 10 read layer 1, 11 to 19 own. (The paper's
        text has ten readers, which would make 21 layers; see docs/paper-notes.md.)
        """
        _check_depth(num_layers)
        _check_factor(factor, num_layers)
        first_back = num_layers - math.ceil(num_layers / factor) + 1
        return cls(tuple(i if i < 2 or i >= first_back else 1 for i in range(num_layers)))

    @classmethod
    def mlkv(cls, num_layers: int, kv_layers: int) -> "KVSharing":
        """MLKV with `kv_layers` owners spread evenly (MLKV section 3, eq. 17).

        Layer `i`, counted from 0, reads group `floor(i * kv_layers / num_layers)`; groups differ
        by a layer where `kv_layers` does not divide the depth.

        Raises:
            ValueError: `kv_layers` is not between 1 and the depth.
        """
        _check_depth(num_layers)
        if not 1 <= kv_layers <= num_layers:
            nearest = min(max(kv_layers, 1), num_layers)
            raise ValueError(
                f"kv_layers={kv_layers}: expected 1 to {num_layers} (the depth), "
                f"the nearest is {nearest}"
            )
        group = [i * kv_layers // num_layers for i in range(num_layers)]
        return cls(tuple(group.index(g) for g in group))

    @classmethod
    def shared_upper_half(cls, num_layers: int) -> "KVSharing":
        """The upper half reads the K/V of its first layer: YOCO's map, without local attention."""
        _check_depth(num_layers)
        return cls(tuple(min(i, num_layers // 2) for i in range(num_layers)))

    @classmethod
    def from_sharing_pattern(cls, sharing_pattern: Iterable[int]) -> "KVSharing":
        """The owner map under the name that the CLA authors' configuration files give it."""
        return cls(tuple(sharing_pattern))

    @classmethod
    def from_name(cls, name: str, num_layers: int, kv_heads: int = 1) -> "KVSharing":
        """A pattern by name: `CLA2`, `CLA2-KeepEnds`, `MLKV-6`, `owners=0,0,2,2`, ...

        Args:
            name: one of `NAMES`; case is ignored.
            num_layers: depth of the model.
            kv_heads: KV heads per layer; `MLKV-n` counts KV heads over the whole model, as in
                MLKV Table 2, so it has `n / kv_heads` KV layers.

        Raises:
            ValueError: unknown name (the nearest is suggested), or a factor that does not fit.
        """
        lower = name.strip().lower()
        plain = {"none": cls.none, "sharedupperhalf": cls.shared_upper_half}
        if lower in plain:
            return plain[lower](num_layers)
        if match := re.fullmatch(r"cla(\d+)(?:-(keepends|densefront|denseback))?", lower):
            variants = {None: cls.cla, "keepends": cls.keep_ends,
                        "densefront": cls.dense_front, "denseback": cls.dense_back}  # fmt: skip
            return variants[match[2]](num_layers, int(match[1]))
        if match := re.fullmatch(r"mlkv-(\d+)", lower):
            return cls.mlkv(num_layers, _mlkv_layers(int(match[1]), num_layers, kv_heads))
        if match := re.fullmatch(r"owners=\[?(-?\d+(?:\s*,\s*-?\d+)*)\]?", lower):
            sharing = cls(tuple(int(o) for o in match[1].split(",")))
            if sharing.num_layers != num_layers:
                raise ValueError(
                    f"{name!r} maps {sharing.num_layers} layers; the model has {num_layers}"
                )
            return sharing
        examples = {n.replace("<factor>", "2").replace("<KV heads in all>", "6"): n for n in NAMES}
        by_lower = {e.lower(): e for e in examples}
        close = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown KV sharing {name!r}; expected one of {', '.join(NAMES)}; "
            f"the nearest is {by_lower[close[0]]!r}"
        )

    # --- what follows from the map ---------------------------------------------------------------

    @property
    def sharing_pattern(self) -> list[int]:
        """The owner map as the plain list that the CLA authors' configuration files hold."""
        return list(self.owners)

    @property
    def num_layers(self) -> int:
        """Depth `L`."""
        return len(self.owners)

    @functools.cached_property
    def owner_layers(self) -> tuple[int, ...]:
        """The layers that own K/V, in order; position in this tuple is the cache slot `g`."""
        return tuple(i for i, o in enumerate(self.owners) if i == o)

    @property
    def kv_layers(self) -> int:
        """Number of layers whose K/V are cached, `G`."""
        return len(self.owner_layers)

    @functools.cached_property
    def cache_slots(self) -> tuple[int, ...]:
        """For every layer, which of the `G` cache entries it attends to."""
        slot = {owner: g for g, owner in enumerate(self.owner_layers)}
        return tuple(slot[o] for o in self.owners)

    def owns(self, layer: int) -> bool:
        """Whether `layer` projects K/V of its own."""
        return self.owners[layer] == layer

    def kv_bytes_per_token(
        self, kv_heads: int, head_dim: int, bytes_per_element: int = 2, scale_bytes: int = 0
    ) -> int:
        """Bytes of K and V cached for one token: `2 * G * K * (H * element + scale)`.

        Args:
            kv_heads: `K`.
            head_dim: `H`.
            bytes_per_element: of a key's or value's element.
            scale_bytes: of a KV head's scale, 4 for the 8-bit caches of `cla_jax.inference`.
        """
        return 2 * self.kv_layers * kv_heads * (head_dim * bytes_per_element + scale_bytes)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The map as scans: the fewest traced layers, then the fewest segments (see `Segment`)."""
        return _segments.segments(self.owners)

    def part(self, layers: range) -> "KVSharing":
        """The map of a stretch of layers alone, counted from 0.

        Raises:
            ValueError: one of them reads K/V of a layer before the stretch.
        """
        return KVSharing(tuple(self.owners[layer] - layers.start for layer in layers))

    @functools.cached_property
    def free_cuts(self) -> tuple[int, ...]:
        """Layers before which a pipeline may be cut with no K/V crossing (CLA section 2.3)."""
        lowest, cuts = self.num_layers, []
        for layer in reversed(range(1, self.num_layers)):
            lowest = min(lowest, self.owners[layer])
            if lowest >= layer:
                cuts.append(layer)
        return tuple(reversed(cuts))

    @property
    def stage_counts(self) -> tuple[int, ...]:
        """Every number of equal stages, of all layers, that splits no sharing group.

        Those that a pipeline here can have are `pipeline_stages`.
        """
        cuts, depth = set(self.free_cuts), self.num_layers
        return tuple(
            n
            for n in range(1, depth + 1)
            if depth % n == 0 and all(c in cuts for c in range(depth // n, depth, depth // n))
        )

    def stages(self, num_stages: int) -> tuple[range, ...]:
        """The layers of each of `num_stages` equal pipeline stages.

        Layers that share K/V must sit in one stage (CLA section 2.3).

        Raises:
            ValueError: no such split; names the counts that work.
        """
        if num_stages not in self.stage_counts:
            why = (
                f"{self.num_layers} layers do not divide into {num_stages} equal stages"
                if num_stages < 1 or self.num_layers % num_stages
                else "a cut would separate layers that share K/V"
            )
            raise ValueError(
                f"{num_stages} pipeline stages: {why}; "
                f"{_counts_that_work(self.stage_counts, num_stages)}"
            )
        size = self.num_layers // num_stages
        return tuple(range(s, s + size) for s in range(0, self.num_layers, size))

    @functools.cached_property
    def pipeline_body(self) -> int | None:
        """Which of `segments` can run in pipeline stages; None if none can.

        Every stage of a pipeline runs the same program, so the body is one segment, cut between
        its repeats. It holds most of the layers, and no K/V enters or leaves it: those before and
        after it run outside the stages. CLA2 is a body alone, KeepEnds has a layer on either side;
        the K/V of DenseFront's layer 9 leave the only segment that repeats with owners.
        """
        place = max(range(len(self.segments)), key=lambda i: _length(self.segments[i]))
        body = self.segments[place]
        whole = all(c in (0, self.num_layers, *self.free_cuts) for c in (body.start, body.stop))
        return place if whole and 2 * _length(body) > self.num_layers else None

    @functools.cached_property
    def pipeline_stages(self) -> tuple[int, ...]:
        """Every number of stages that a pipeline can have, 1 (none) first: divisors of its body.

        Layers outside the body are in no stage, so that there may be counts which `stage_counts`
        lacks; and every stage is the same program, so that there may be fewer.
        """
        if self.pipeline_body is None:
            return (1,)
        body = self.segments[self.pipeline_body]
        counts = self.part(range(body.start, body.stop)).stage_counts
        return tuple(n for n in counts if body.repeats % n == 0)

    def pipeline(self, num_stages: int) -> tuple[range, ...]:
        """The layers of each stage of a pipeline; those in none run outside it.

        One stage is no pipeline, and has all layers.

        Raises:
            ValueError: the body does not divide so, or there is none; says why, and names the stage
                counts or the patterns that work.
        """
        if num_stages == 1:
            return (range(self.num_layers),)
        if self.pipeline_body is None:
            body = max(self.segments, key=_length)
            edges = {0, self.num_layers, *self.free_cuts}
            why = (
                f"is only {_length(body)} of {self.num_layers} layers"
                if {body.start, body.stop} <= edges
                else "shares K/V with other layers"
            )
            raise ValueError(
                f"{num_stages} pipeline stages: every stage runs the same layers, and the longest "
                f"repeated stretch of this map, layers {body.start} to {body.stop - 1}, {why}; "
                f"patterns of {self.num_layers} layers that work: "
                f"{_pipelined_patterns(self.num_layers, num_stages)}"
            )
        body = self.segments[self.pipeline_body]
        if num_stages not in self.pipeline_stages:
            layers = _length(body)
            why = (
                f"layers {body.start} to {body.stop - 1}, {layers} of {self.num_layers}, do not "
                "divide into so many equal stages"
                if num_stages < 1 or layers % num_stages
                else "a cut would separate layers that share K/V"
            )
            raise ValueError(
                f"{num_stages} pipeline stages: {why}; "
                f"{_counts_that_work(self.pipeline_stages, num_stages)}"
            )
        return tuple(
            range(body.start + s.start, body.start + s.stop)
            for s in self.part(range(body.start, body.stop)).stages(num_stages)
        )

    def diagram(self) -> str:
        """A drawing of the map in text, last layer on top as in the papers' figures.

        Examples:
            >>> print(KVSharing.cla(4, factor=2).diagram())
            layer 3   Q      <-+
            layer 2   Q  KV  --+  KV cache 1
            layer 1   Q      <-+
            layer 0   Q  KV  --+  KV cache 0
        """
        lanes = _bracket_lanes(self.owners)
        width = len(str(self.num_layers - 1))
        rows: list[str] = []
        for layer in reversed(range(self.num_layers)):
            owns = self.owns(layer)
            row = f"layer {layer:>{width}}   Q  {'KV' if owns else '  '}  "
            row += _bracket_row(self.owners, lanes, layer)
            if owns:
                row += f"  KV cache {self.cache_slots[layer]}"
            rows.append(row.rstrip())
        return "\n".join(rows)


def _length(segment: Segment) -> int:
    return segment.stop - segment.start


def _counts_that_work(counts: tuple[int, ...], wanted: int) -> str:
    if counts == (1,):
        return "stage counts that work: 1, no pipeline"
    nearest = min(counts, key=lambda n: (abs(n - wanted), -n))  # 1 is no pipeline
    return f"stage counts that work: {', '.join(map(str, counts))} (the nearest is {nearest})"


def _pipelined_patterns(num_layers: int, num_stages: int) -> str:
    """The named patterns that have so many stages, or where none has, all with what they have."""
    names = [f"CLA{factor}{ends}" for ends in ("", "-KeepEnds") for factor in (2, 3, 4)
             if factor <= num_layers - 2 * bool(ends)]  # fmt: skip
    counts = {name: KVSharing.from_name(name, num_layers).pipeline_stages[1:]
              for name in ("none", *names)}  # fmt: skip
    if fitting := [name for name, found in counts.items() if num_stages in found]:
        return ", ".join(fitting)
    return ", ".join(
        f"{name} ({', '.join(map(str, found))} stages)" for name, found in counts.items() if found
    )


def _check_depth(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: expected at least 1")


def _check_factor(factor: int, largest: int) -> None:
    if not 1 <= factor <= largest:
        nearest = min(max(factor, 1), largest)
        raise ValueError(
            f"sharing factor {factor}: expected 1 to {largest} (the layers there are to share "
            f"among), the nearest is {nearest}"
        )


def _groups(num_layers: int, factor: int) -> tuple[int, ...]:
    short = num_layers % factor
    return tuple(0 if i < short else i - (i - short) % factor for i in range(num_layers))


def _mlkv_layers(total_kv_heads: int, num_layers: int, kv_heads: int) -> int:
    if kv_heads < 1:
        raise ValueError(f"kv_heads={kv_heads}: expected at least 1")
    if total_kv_heads % kv_heads or not kv_heads <= total_kv_heads <= num_layers * kv_heads:
        valid = range(kv_heads, num_layers * kv_heads + 1, kv_heads)
        nearest = min(valid, key=lambda n: abs(n - total_kv_heads))
        raise ValueError(
            f"MLKV-{total_kv_heads}: the number counts KV heads over all layers, so with "
            f"{kv_heads} per layer and {num_layers} layers it is a multiple of {kv_heads} up to "
            f"{num_layers * kv_heads}; the nearest is MLKV-{nearest}"
        )
    return total_kv_heads // kv_heads


def _nearest_owner(owners: Sequence[int], layer: int, wanted: int) -> int:
    valid = [i for i in range(layer) if owners[i] == i] + [layer]
    return min(valid, key=lambda i: abs(i - wanted))


def _bracket_lanes(owners: Sequence[int]) -> dict[int, int]:
    """A column for the bracket of each owner that is read, so that no two overlap in one column."""
    last = {owner: layer for layer, owner in enumerate(owners)}
    lanes: dict[int, int] = {}
    for owner, end in sorted(last.items(), key=lambda item: item[1] - item[0]):
        if end > owner:
            taken = {lane for o, lane in lanes.items() if o <= end and owner <= last[o]}
            lanes[owner] = next(lane for lane in range(len(owners)) if lane not in taken)
    return lanes


def _bracket_row(owners: Sequence[int], lanes: dict[int, int], layer: int) -> str:
    last = {owner: i for i, owner in enumerate(owners)}
    mine = lanes.get(owners[layer])
    if mine is None and not lanes:
        return ""
    row = ""
    for lane in range(max(lanes.values(), default=-1) + 1):
        here = next((o for o, la in lanes.items() if la == lane and o <= layer <= last[o]), None)
        if mine is not None and lane <= mine:
            head = "--" if layer == owners[layer] else "<-"
            left = head if lane == 0 else "--"
            row += left + ("+" if lane == mine else "|" if here is not None else "-")
        else:
            row += "  " + ("|" if here is not None else " ")
    return row
