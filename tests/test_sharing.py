"""Sharing maps against maps written out by hand, segments and cuts against brute force."""

import functools
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cla_jax.sharing import KVSharing, Segment

# Written out by hand. CLA: 20 layers, sections 2.2, 3.2.1 and Table 1's KV layers; MLKV: 12 layers.
CLA2 = (0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14, 16, 16, 18, 18)
CLA3 = (0, 0, 2, 2, 2, 5, 5, 5, 8, 8, 8, 11, 11, 11, 14, 14, 14, 17, 17, 17)
CLA4 = (0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16)
KEEP_ENDS = (0, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15, 17, 17, 19)
DENSE_FRONT = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 19)
DENSE_BACK = (0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 11, 12, 13, 14, 15, 16, 17, 18, 19)

WRITTEN_OUT = [
    ("none", 4, (0, 1, 2, 3), 4),
    ("CLA2", 20, CLA2, 10),
    ("CLA3", 20, CLA3, 7),
    ("CLA4", 20, CLA4, 5),
    ("CLA2-KeepEnds", 20, KEEP_ENDS, 11),
    ("CLA2-DenseFront", 20, DENSE_FRONT, 11),
    ("CLA2-DenseBack", 20, DENSE_BACK, 11),
    ("CLA2", 10, (0, 0, 2, 2, 4, 4, 6, 6, 8, 8), 5),  # Figure 2
    ("CLA3", 10, (0, 1, 1, 1, 4, 4, 4, 7, 7, 7), 4),  # Figure 2: layer 0 stands alone
    ("CLA6", 6, (0,) * 6, 1),
    ("MLKV-6", 12, (0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10), 6),
    ("MLKV-4", 12, (0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9), 4),
    ("MLKV-1", 12, (0,) * 12, 1),
    ("SharedUpperHalf", 8, (0, 1, 2, 3, 4, 4, 4, 4), 5),
    ("SharedUpperHalf", 7, (0, 1, 2, 3, 3, 3, 3), 4),
    ("owners=[0, 1, 0]", 3, (0, 1, 0), 2),
]


@pytest.mark.parametrize(("name", "depth", "owners", "kv_layers"), WRITTEN_OUT)
def test_named_pattern_is_the_map_written_out(name, depth, owners, kv_layers):
    for spelling in (name, name.lower(), name.upper()):
        sharing = KVSharing.from_name(spelling, depth)
        assert sharing.owners == owners
    assert sharing.kv_layers == len(set(owners)) == kv_layers
    assert sharing.num_layers == depth


def test_constructors_agree_with_the_names():
    assert KVSharing.none(4).owners == (0, 1, 2, 3)
    assert KVSharing.cla(20, 3).owners == CLA3
    assert KVSharing.keep_ends(20).owners == KEEP_ENDS
    assert KVSharing.dense_front(20).owners == DENSE_FRONT
    assert KVSharing.dense_back(20).owners == DENSE_BACK
    assert KVSharing.shared_upper_half(8).owners == (0, 1, 2, 3, 4, 4, 4, 4)


def test_mlkv_name_counts_kv_heads_over_the_whole_model():
    # MLKV Table 2: MLKV-12 is 4 layers of 3 heads, MLKV-48 4 of 12.
    assert KVSharing.from_name("MLKV-12", 12, kv_heads=3) == KVSharing.mlkv(12, 4)
    assert KVSharing.from_name("MLKV-48", 12, kv_heads=12) == KVSharing.mlkv(12, 4)


@given(st.integers(1, 40), st.data())
def test_mlkv_is_equation_17(depth, data):
    """`k = floor((n - 1) / (l / m)) + 1`, layers and groups counted from 1, in exact integers."""
    m = data.draw(st.integers(1, depth))
    group = [next(k for k in range(1, m + 1) if (n - 1) * m < k * depth) for n in
             range(1, depth + 1)]  # fmt: skip
    first = {k: group.index(k) for k in reversed(range(1, m + 1))}
    assert KVSharing.mlkv(depth, m).owners == tuple(first[k] for k in group)
    assert KVSharing.mlkv(depth, m).kv_layers == m


def test_mlkv_when_kv_layers_do_not_divide_the_depth():
    assert KVSharing.mlkv(10, 4).owners == (0, 0, 0, 3, 3, 5, 5, 5, 8, 8)
    assert KVSharing.mlkv(7, 3).owners == (0, 0, 0, 3, 3, 5, 5)


@given(st.integers(1, 40), st.data())
def test_cla_groups_are_adjacent_and_only_the_first_is_short(depth, data):
    factor = data.draw(st.integers(1, depth))
    owners = KVSharing.cla(depth, factor).owners
    sizes = [owners.count(o) for o in sorted(set(owners))]
    assert owners == tuple(sorted(owners))
    assert all(size == factor for size in sizes[1:])
    assert sizes[0] == (depth % factor or factor)


# --- segments -------------------------------------------------------------------------------------


@st.composite
def owner_maps(draw, max_layers=14):
    """Any valid map; half of them with a repeated unit, so that scans exist."""
    depth = draw(st.integers(1, max_layers))
    owners: list[int] = []
    if draw(st.booleans()):
        unit = draw(st.integers(1, 4))
        while len(owners) < depth:
            at = len(owners)
            if at < unit or draw(st.integers(0, 9)) == 0:
                owners.append(draw(st.sampled_from([*sorted(set(owners)), at])))
            else:
                before = owners[at - unit]
                shifted = before + unit
                good = shifted == at or (shifted < at and owners[shifted] == shifted)
                owners.append(shifted if good else before)
    else:
        for at in range(depth):
            owners.append(draw(st.sampled_from([*sorted(set(owners)), at])))
    return tuple(owners)


def every_map(depth):
    """Every valid map of `depth` layers."""
    maps = [()]
    for at in range(depth):
        maps = [(*m, owner) for m in maps for owner in (*sorted(set(m)), at)]
    return maps


def is_legal(owners, start, period, repeats):
    """Whether a scan of `repeats` x `period` layers can run these layers.

    Every repeat does the same thing: a position owns, reads one position of its own repeat, or
    reads one fixed layer from before the scan. And what leaves a repeat is only what the carry
    takes out of the last one.
    """
    stop = start + period * repeats
    if stop > len(owners):
        return False
    for position in range(period):
        seen = set()
        for repeat in range(repeats):
            begin = start + repeat * period
            owner = owners[begin + position]
            if owner >= begin:
                seen.add(("own repeat", owner - begin))
            elif owner < start:
                seen.add(("before", owner))
            else:
                return False  # reads an earlier repeat of the same scan
        if len(seen) > 1:
            return False
    for repeat in range(repeats - 1):
        begin = start + repeat * period
        for owner in range(begin, begin + period):
            if owner in owners[begin + period :]:
                return False
    return True


def fewest_traced(owners):
    """(layers traced, segments) of the best of all cuts, by trying every one."""

    @functools.cache
    def best(start):
        if start == len(owners):
            return (0, 0)
        options = []
        for period in range(1, len(owners) - start + 1):
            for repeats in range(1, (len(owners) - start) // period + 1):
                if is_legal(owners, start, period, repeats):
                    traced, count = best(start + period * repeats)
                    options.append((traced + period, count + 1))
        return min(options)

    return best(0)


def check_segments(owners):
    segments = KVSharing(owners).segments
    assert sum((s.owners for s in segments), ()) == owners
    at = 0
    for segment in segments:
        assert segment.start == at
        assert len(segment.sources) == segment.period
        assert segment.stop == at + segment.period * segment.repeats
        assert is_legal(owners, segment.start, segment.period, segment.repeats), segment
        at = segment.stop
    assert at == len(owners)
    return sum(s.period for s in segments), len(segments)


@given(owner_maps())
@example((0, 1, 0, 1, 0, 1, 6, 7, 6, 7))
@example(DENSE_BACK)
@example(KEEP_ENDS)
def test_segments_expand_to_the_map_are_legal_and_minimal(owners):
    assert check_segments(owners) == fewest_traced(owners)


def test_segments_of_every_small_map():
    for depth in range(1, 7):
        for owners in every_map(depth):
            assert check_segments(owners) == fewest_traced(owners), owners


@pytest.mark.slow
def test_segments_of_every_map_of_seven_and_eight_layers():
    for depth in (7, 8):
        for owners in every_map(depth):
            assert check_segments(owners) == fewest_traced(owners), owners


def test_segments_of_the_named_patterns():
    def shapes(sharing):
        return [(s.period, s.repeats) for s in sharing.segments]

    assert KVSharing.cla(20, 2).segments == (Segment(0, 2, 10, (0, 0)),)
    assert shapes(KVSharing.none(20)) == [(1, 20)]
    assert shapes(KVSharing.cla(20, 4)) == [(4, 5)]
    assert shapes(KVSharing.keep_ends(20)) == [(1, 1), (2, 9), (1, 1)]
    assert KVSharing.dense_front(20).segments == (
        Segment(0, 1, 10, (0,)),
        Segment(10, 1, 9, (~9,)),
        Segment(19, 1, 1, (0,)),
    )
    assert shapes(KVSharing.dense_back(20)) == [(1, 2), (1, 9), (1, 9)]
    assert shapes(KVSharing.shared_upper_half(20)) == [(1, 11), (1, 9)]


def test_traced_layers_do_not_grow_with_depth():
    for depth in (20, 80):
        assert sum(s.period for s in KVSharing.cla(depth, 2).segments) == 2
        assert sum(s.period for s in KVSharing.keep_ends(depth).segments) == 4
        assert sum(s.period for s in KVSharing.dense_front(depth).segments) == 3
    assert [(s.period, s.repeats) for s in KVSharing.cla(320, 2).segments] == [(2, 160)]


# --- cuts -----------------------------------------------------------------------------------------


@given(owner_maps())
def test_cuts_and_stages_are_the_rule(owners):
    sharing, depth = KVSharing(owners), len(owners)
    free = [c for c in range(1, depth) if all(owners[i] >= c for i in range(c, depth))]
    assert list(sharing.free_cuts) == free
    counts = [
        n
        for n in range(1, depth + 1)
        if depth % n == 0 and all(c % (depth // n) or c in free for c in range(1, depth))
    ]
    assert list(sharing.stage_counts) == counts
    for n in range(-1, depth + 2):
        if n in counts:
            stages = sharing.stages(n)
            assert [len(stage) for stage in stages] == [depth // n] * n
            assert [layer for stage in stages for layer in stage] == list(range(depth))
            assert all(owners[i] in stage for stage in stages for i in stage)
        else:
            with pytest.raises(ValueError, match=rf"{n} pipeline stages"):
                sharing.stages(n)


@pytest.mark.parametrize(
    ("owners", "counts"),
    [
        (CLA2, (1, 2, 5, 10)),
        (CLA3, (1,)),
        (CLA4, (1, 5)),
        (DENSE_FRONT, (1,)),
        (DENSE_BACK, (1,)),
        (tuple(range(20)), (1, 2, 4, 5, 10, 20)),
    ],
)
def test_stage_counts_of_the_papers_patterns(owners, counts):
    assert KVSharing(owners).stage_counts == counts


def test_refused_stages_name_the_counts_that_work():
    with pytest.raises(ValueError, match=r"4 .*separate layers.*1, 2, 5, 10 .*nearest is 5"):
        KVSharing(CLA2).stages(4)
    with pytest.raises(ValueError, match=r"3 .*do not divide.*1, 2, 5, 10 .*nearest is 2"):
        KVSharing(CLA2).stages(3)


@given(owner_maps())
@example(KEEP_ENDS)
@example(CLA3)
def test_a_pipeline_runs_the_same_layers_in_every_stage_and_no_kv_leaves_one(owners):
    sharing, depth = KVSharing(owners), len(owners)
    assert sharing.pipeline_stages[0] == 1
    for n in range(-1, depth + 2):
        if n == 1:
            assert sharing.pipeline(n) == (range(depth),)
            continue
        if n not in sharing.pipeline_stages:
            with pytest.raises(ValueError, match=rf"{n} pipeline stages.* that work"):
                sharing.pipeline(n)
            continue
        stages = sharing.pipeline(n)
        roles = {tuple(owners[i] - stage.start for i in stage) for stage in stages}
        assert len(stages) == n
        assert len(roles) == 1  # the owners are the stage's own, and alike
        assert min(roles.pop()) == 0
        inside = [layer for stage in stages for layer in stage]
        assert inside == list(range(inside[0], inside[-1] + 1))
        assert 2 * len(inside) > depth
        beside = set(range(depth)) - set(inside)
        assert {owners[i] for i in beside} <= beside


@pytest.mark.parametrize(
    ("owners", "counts", "outside"),
    [(CLA2, (1, 2, 5, 10), []), (CLA3, (1, 2, 3, 6), [0, 1]), (CLA4, (1, 5), []),
     (KEEP_ENDS, (1, 3, 9), [0, 19]), (tuple(range(20)), (1, 2, 4, 5, 10, 20), [])],
)  # fmt: skip
def test_pipelines_of_the_papers_patterns(owners, counts, outside):
    sharing = KVSharing(owners)
    assert sharing.pipeline_stages == counts
    inside = [layer for stage in sharing.pipeline(counts[-1]) for layer in stage]
    assert sorted(set(range(20)) - set(inside)) == outside


@pytest.mark.parametrize(
    ("owners", "stages", "why"),
    [(KEEP_ENDS, 2, r"separate layers that share K/V.* work: 1, 3, 9 \(the nearest is 3\)"),
     (CLA2, 3, "layers 0 to 19, 20 of 20, do not divide.* work: 1, 2, 5, 10 .*nearest is 2"),
     (DENSE_FRONT, 2, "layers 0 to 9, shares K/V with other.* 20 layers that work: none, CLA2, "),
     (DENSE_FRONT, 9, "patterns of 20 layers that work: CLA2-KeepEnds$"),
     (DENSE_BACK, 2, "layers 2 to 10, shares K/V with other layers.*none, CLA2"),
     (DENSE_BACK, 7, r"that work: none \(2, 4, 5, 10, 20 stages\), CLA2 \(2, 5, 10 stages\)"),
     ((0, 1, 2, 2, 2, 5), 3, "is only 2 of 6 layers|shares K/V")],
)  # fmt: skip
def test_refused_pipelines_say_why_and_what_works(owners, stages, why):
    with pytest.raises(ValueError, match=why):
        KVSharing(owners).pipeline(stages)


# --- what else follows from the map ---------------------------------------------------------------


@given(owner_maps())
def test_cache_slots_and_the_authors_name(owners):
    sharing = KVSharing(owners)
    own = sorted(set(owners))
    assert sharing.owner_layers == tuple(own)
    assert sharing.cache_slots == tuple(own.index(o) for o in owners)
    assert [sharing.owns(i) for i in range(len(owners))] == [i == o for i, o in enumerate(owners)]
    assert sharing.sharing_pattern == list(owners)
    assert KVSharing.from_sharing_pattern(sharing.sharing_pattern) == sharing
    assert hash(KVSharing(owners)) == hash(sharing)
    named = KVSharing.from_name("owners=" + ",".join(map(str, owners)), len(owners))
    assert named == sharing


def test_kv_bytes_per_token():
    # K and V, 10 layers, 1 head of 128, 16 bit; then 4 heads of 46 in 32 bit.
    assert KVSharing(CLA2).kv_bytes_per_token(kv_heads=1, head_dim=128) == 5120
    assert KVSharing(CLA2).kv_bytes_per_token(4, 46, bytes_per_element=4) == 14720
    # 8 bit: a scale for each of the 2 x 10 vectors.
    assert KVSharing(CLA2).kv_bytes_per_token(1, 128, 1, scale_bytes=4) == 20 * (128 + 4)


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        (
            KVSharing.cla(5, 3),
            """\
layer 4   Q      <-+
layer 3   Q      <-+
layer 2   Q  KV  --+  KV cache 1
layer 1   Q      <-+
layer 0   Q  KV  --+  KV cache 0""",
        ),
        (
            KVSharing((0, 1, 0, 3, 1)),  # brackets that cross
            """\
layer 4   Q      <----+
layer 3   Q  KV       |  KV cache 2
layer 2   Q      <-+  |
layer 1   Q  KV  --|--+  KV cache 1
layer 0   Q  KV  --+     KV cache 0""",
        ),
        (
            KVSharing.none(2),
            """\
layer 1   Q  KV    KV cache 1
layer 0   Q  KV    KV cache 0""",
        ),
    ],
)
def test_diagram_is_the_drawing_written_out(sharing, expected):
    assert sharing.diagram() == expected


@given(owner_maps())
def test_diagram_has_a_row_a_layer_and_names_every_cache(owners):
    rows = KVSharing(owners).diagram().split("\n")[::-1]
    assert len(rows) == len(owners)
    for layer, (row, owner) in enumerate(zip(rows, owners, strict=True)):
        assert row.split()[:2] == ["layer", str(layer)]
        assert ("KV cache" in row) == (owner == layer)
        assert ("<-" in row) == (owner != layer)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KVSharing.cla(6, 7), ["factor 7", "1 to 6", "nearest is 6"]),
        (lambda: KVSharing.cla(6, 0), ["factor 0", "nearest is 1"]),
        (lambda: KVSharing.from_name("CLA21", 20), ["factor 21", "nearest is 20"]),
        (lambda: KVSharing.keep_ends(6, 5), ["factor 5", "1 to 4"]),
        (lambda: KVSharing.dense_front(6, 7), ["factor 7"]),
        (lambda: KVSharing.dense_back(6, 7), ["factor 7"]),
        (lambda: KVSharing((0, 2, 2)), ["layer 1", "layer 2", "LCKV", "nearest is 1"]),
        (lambda: KVSharing((0, 0, 1)), ["layer 2", "layer 1", "reads layer 0", "nearest"]),
        (lambda: KVSharing((0, -1)), ["layer 1", "layer -1", "nearest is layer 0"]),
        (lambda: KVSharing.from_name("owners=0,0,1", 3), ["layer 2", "reads layer 0"]),
        (lambda: KVSharing.from_name("owners=0,0", 3), ["2 layers", "3"]),
        (lambda: KVSharing(()), ["empty"]),
        (lambda: KVSharing.none(0), ["num_layers=0"]),
        (lambda: KVSharing.mlkv(12, 13), ["kv_layers=13", "1 to 12", "nearest is 12"]),
        (lambda: KVSharing.mlkv(12, 0), ["kv_layers=0", "nearest is 1"]),
        (lambda: KVSharing.from_name("MLKV-7", 12, 3), ["MLKV-7", "MLKV-6"]),
        (lambda: KVSharing.from_name("MLKV-13", 12), ["MLKV-13", "MLKV-12"]),
        (lambda: KVSharing.from_name("CLA2-KeepEnd", 6), ["CLA2-KeepEnd", "'CLA2-KeepEnds'"]),
        (lambda: KVSharing.from_name("CLA2-DenseFrnt", 6), ["nearest is 'CLA2-DenseFront'"]),
        (lambda: KVSharing.from_name("MLVK-6", 12), ["nearest is 'MLKV-6'"]),
        (lambda: KVSharing.from_name("SharedUperHalf", 6), ["nearest is 'SharedUpperHalf'"]),
        (lambda: KVSharing.from_name("", 6), ["unknown", "nearest"]),
    ],
)
def test_refusals_name_the_value_and_the_nearest_choice(make, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words below are the match)
        make()
    for word in words:
        assert word in str(error.value)


def test_a_fractional_owner_is_refused_not_truncated():
    # In the tests beartype looks at one element of a tuple, drawn at random, and may be first.
    for _ in range(20):
        with pytest.raises((ValueError, TypeError)):
            KVSharing((0, 0.9))  # type: ignore[arg-type]


def test_sharing_imports_without_jax():
    code = (
        "import sys, cla_jax.sharing; "
        "print(sorted(m for m in ('jax', 'jaxlib', 'flax', 'numpy') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"


def test_a_part_is_the_map_of_its_layers_alone():
    sharing = KVSharing.from_name("CLA2-KeepEnds", 6)
    assert sharing.owners == (0, 1, 1, 3, 3, 5)
    assert sharing.part(range(1, 5)).owners == (0, 0, 2, 2)
    with pytest.raises(ValueError, match="layer 0"):
        sharing.part(range(2, 5))
