"""Meshes and rules: what is parsed, what fits, and what is said of the rest."""

import dataclasses
import math
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from cla_jax.configs import DataConfig, ExecutionConfig, MeshConfig, TrainConfig
from cla_jax.models.pipeline import microbatches
from cla_jax.parallel import Rules, Schedule, check_mesh, make_layout, make_mesh
from cla_jax.parallel.mesh import one_device_note
from cla_jax.recipes import RECIPES
from cla_jax.registry import model as registered
from cla_jax.sharing import KVSharing
from tests.parallel.models import config_of


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("", {}), (" none ", {}), ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}), ("data", {"data": 8}),
     ("fsdp", {"fsdp": 8}), ("tensor", {"tensor": 8}), (" data = 2 , fsdp", {"data": 2, "fsdp": 4}),
     ("tensor=auto,data=4", {"tensor": 2, "data": 4}), ("fsdp=-1", {"fsdp": 8})],
)  # fmt: skip
def test_meshes_are_read_and_filled_up(text, sizes):
    resolved = MeshConfig.parse(text).resolved(8)
    assert resolved == MeshConfig(**sizes)
    assert MeshConfig.parse(str(resolved)) == resolved


@pytest.mark.parametrize(
    ("text", "parts"),
    [("fdsp=4", ["fdsp", "nearest is 'fsdp'"]), ("data=2,data=4", ["data twice"]),
     ("tensor=two", ["tensor='two'", "fsdp=4,tensor=2"]), ("data,fsdp", ["data and fsdp", "auto"]),
     ("data=0", ["data=0", "1 or more", "nearest is data=1"]),
     (",", ["',' names no axis", "fsdp=4,tensor=2", "none"]), ("data=2,", ["names no axis"]),
     ("data=2,none", ["no mesh and one at once"]), ("nome", ["stage, none", "is 'none'"]),
     ("fsdp=4,tensor=4", ["16 devices", "there are 8", "fsdp=2,tensor=4", "fsdp=4,tensor=2"]),
     ("data=3,tensor", ["data=3,tensor=auto", "8 devices", "data=2,tensor=4"])],
)  # fmt: skip
def test_meshes_that_are_refused(text, parts):
    with pytest.raises(ValueError, match="mesh") as error:
        MeshConfig.parse(text).resolved(8)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_size_is_a_whole_number():
    with pytest.raises(ValueError, match="mesh: fsdp=True: expected a number of devices"):
        MeshConfig(fsdp=True)


def test_a_mesh_of_one_device_is_remarked_on():
    one = jax.devices()[:1]
    assert one_device_note(MeshConfig.parse("fsdp"), one) == (
        "mesh fsdp=auto is one device here: nothing is split, as without a mesh"
    )
    assert not one_device_note(MeshConfig.parse("fsdp"))
    assert not one_device_note(MeshConfig(), one)


@given(st.integers(1, 64), st.lists(st.integers(1, 9), min_size=4, max_size=4), st.booleans())
def test_what_is_proposed_fits(devices, sizes, free):
    sizes = [-1 if free and i == 0 else size for i, size in enumerate(sizes)]
    config = MeshConfig(**dict(zip(("data", "fsdp", "tensor", "stage"), sizes, strict=True)))
    try:
        resolved = config.resolved(devices)
    except ValueError as error:
        for text in str(error).split("what works: ")[1].split(", or "):
            assert MeshConfig.parse(text).resolved(devices).devices == devices
    else:
        assert resolved.devices <= devices
        assert not free or resolved.devices == devices
        assert math.prod(n for n in sizes if n > 0) <= devices


def test_a_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"stage": 1, "data": 1, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert make_layout(MeshConfig(), config_of("MQA")) is None
    assert make_layout(MeshConfig.parse("data"), config_of("MQA"), jax.devices()[:1]) is None


def test_rules_of_few_kv_heads_and_odd_vocabularies():
    few = Rules.of(config_of("CLA4"), MeshConfig(fsdp=2, tensor=4))  # 2 KV heads
    assert few.spec("embed", "heads", "head_dim") == PartitionSpec("fsdp", "tensor", None)
    assert few.spec("embed", "pair", "kv_heads") == PartitionSpec("fsdp", None, None)
    cache = (None, "cache_batch", None, "cache_heads", None)
    rows = ("data", "fsdp", "tensor")
    assert few.spec(*cache) == PartitionSpec(None, rows, None, None, None)
    many = Rules.of(config_of("GQA4"), MeshConfig(fsdp=2, tensor=4))
    assert many.spec(*cache) == PartitionSpec(None, ("data", "fsdp"), None, "tensor", None)
    assert many.vocab == ("tensor", "stage")
    bytes_and_end = dataclasses.replace(config_of("MQA"), vocab_size=257)
    odd = Rules.of(bytes_and_end, MeshConfig(tensor=2))
    assert (odd.vocab, odd.batch_loss) == ((), ("data", "fsdp", "stage"))
    thirds = Rules.of(
        dataclasses.replace(bytes_and_end, vocab_size=258), MeshConfig(tensor=4, stage=2)
    )
    assert (thirds.vocab, thirds.batch_loss) == (("stage",), ("data", "fsdp"))


@pytest.mark.parametrize(
    ("mesh", "pattern", "parts"),
    [("tensor=3", "MQA", ["tensor=3", "8 query heads", "1, 2, 4, 8"]),
     ("tensor=5", "GQA4", ["tensor=5", "sizes that work: 1, 2, 4, 8"]),
     ("fsdp=3", "MQA", ["fsdp=3", "d_model=32", "nearest size that does is 2"]),
     ("stage=2", "CLA2", ["2 pipeline stages", "separate layers", "work: 1, no pipeline"]),
     ("stage=4", "MQA", ["4 pipeline stages", "stage counts that work: 1, 2"])],
)  # fmt: skip
def test_models_that_do_not_divide(mesh, pattern, parts):
    with pytest.raises(ValueError, match=f"{pattern}: ") as error:
        make_layout(MeshConfig.parse(mesh), config_of(pattern))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("batch", "micro", "part"),
    [(6, 0, "does not divide a batch of 6 rows; the nearest that works is 8"),
     (16, 2, "does not divide a micro-batch of 2 rows; the nearest that works is 4"),
     (18, 6, "does not divide a micro-batch of 6 rows; the nearest that works is 4, of a batch of "
      "16")],
)  # fmt: skip
def test_batches_that_do_not_divide(batch, micro, part):
    training = TrainConfig(1, micro, data=DataConfig(16, batch), mesh=MeshConfig(fsdp=2, data=2))
    with pytest.raises(ValueError, match=re.escape(part)):
        check_mesh(config_of("MQA"), training)


@pytest.mark.parametrize(
    ("pattern", "mesh", "batch", "microbatches", "part"),
    [("MQA", "stage=2,data=2", 16, 16,
      "pipeline_microbatches=16 does not divide the 8 rows of a forward and backward pass on each "
      "of 2 data and fsdp shards; the nearest that does is 8"),
     ("MQA", "stage=2", 16, 5, "the 16 rows of a forward and backward pass; the nearest that does "
      "is 4"),
     ("MQA", "data=2", 16, 4, "pipeline_microbatches=4, but mesh data=2 has no stages"),
     ("KeepEnds8", "stage=2", 16, 4, "stage counts that work: 1, 3"),
     ("MQA", "stage=2,data=4", 4, 0, "mesh data=4,stage=2 leaves its pipeline 1 microbatch, fewer "
      "than its 2 stages (bubble 100%): a pass has 4 rows, 1 on each of 4 data and fsdp shards. "
      "What works: a batch of 8, micro-batches of 8 rows (2 microbatches, bubble 50%); or "
      "pipeline_microbatches=1 (--microbatches 1), if that is meant"),
     ("KeepEnds8", "stage=3,data=2", 2, 0, "What works: a batch of 6,")],
)  # fmt: skip
def test_pipelines_that_do_not_divide(pattern, mesh, batch, microbatches, part):
    sharing = KVSharing.keep_ends(8) if pattern == "KeepEnds8" else KVSharing.none(10)
    training = TrainConfig(
        1, data=DataConfig(16, batch), mesh=MeshConfig.parse(mesh),
        execution=ExecutionConfig(pipeline_microbatches=microbatches),
    )  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(part)):
        check_mesh(dataclasses.replace(config_of("MQA"), sharing=sharing), training)


def proposals(text, batch, micro, count):
    """What a refused schedule's message says will work: batch, micro-batch, microbatches."""
    if near := re.search(r"the nearest that does is (\d+)$", text):
        return [(batch, micro, int(near[1]))]
    whole = re.search(r"of a batch of (\d+)$|What works: a batch of (\d+),", text)
    whole = int(whole[1] or whole[2]) if whole else batch
    if near := re.search(r"the nearest that works is (\d+)", text):
        return [(whole, int(near[1]), count) if micro else (int(near[1]), 0, count)]
    meant = int(text.partition("; or pipeline_microbatches=")[2].partition(" ")[0])
    passes = re.findall(r"of (\d+) rows \(", text)
    return [(batch, micro, meant), *((whole, int(rows), count) for rows in passes)]


@given(
    st.integers(1, 64), st.integers(0, 9), st.integers(0, 6),
    *[st.sampled_from([1, 2, 3, 4, 6, 8])] * 2,
)  # fmt: skip
def test_what_a_refused_schedule_proposes_works(batch, passes, count, stages, shards):
    mesh = MeshConfig(stage=stages, data=shards)

    def schedule(batch, micro, count):
        execution = ExecutionConfig(pipeline_microbatches=count)
        data = DataConfig(16, batch)
        return Schedule.of(TrainConfig(1, micro, data=data, execution=execution), mesh)

    given = batch, batch // passes if passes and batch % passes == 0 else 0, count
    if stages == 1 and count:
        with pytest.raises(ValueError, match="has no stages"):
            schedule(*given)
        return
    try:
        found = [schedule(*given)]
    except ValueError as error:
        found = [schedule(*works) for works in proposals(str(error), *given)]
    for one in found:
        assert one.rows == one.rows_per_device * one.shards * one.microbatches
    assert all(one.microbatches >= stages for one in found[1:])


def test_a_schedule_says_what_a_pipeline_does():
    training = dataclasses.replace(RECIPES["cla-1b"], micro_batch_size=64)
    schedule = Schedule.of(training, MeshConfig(stage=2, fsdp=8))
    assert str(schedule) == (
        "passes of 64 rows in 8 microbatches, 1 on a device at a time; bubble 12.5% of a stage's "
        "work"
    )
    assert schedule.record["bubble_percent"] == 12.5
    alone = Schedule.of(training, MeshConfig(fsdp=8))
    assert str(alone) == "passes of 64 rows, 8 on a device"
    assert (alone.microbatches, alone.bubble) == (1, 0)


def test_the_papers_batch_goes_through_the_stages_of_every_pattern():
    """KeepEnds has 3 or 9 stages, which do not divide 2,048 rows or 50,432 words."""
    for name in ("1B/H128-MQA-CLA2-KeepEnds", "1B/H128-MQA-CLA2"):
        config = registered(name)
        for stages in config.sharing.pipeline_stages[1:]:
            mesh = MeshConfig(stage=stages, data=2)
            training = dataclasses.replace(RECIPES["cla-1b"], micro_batch_size=64, mesh=mesh)
            assert check_mesh(config, training, jax.devices() * 3).microbatches >= stages


@pytest.mark.parametrize(
    ("rows", "shards", "count"), [(64, 1, 8), (12, 1, 6), (64, 16, 4), (7, 7, 1)]
)
def test_microbatches_that_nobody_named_divide(rows, shards, count):
    assert microbatches(ExecutionConfig(), rows, 2, shards) == count
