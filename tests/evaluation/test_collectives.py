"""What is read from a program's HLO: groups in every syntax, loops, and traffic that is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cla_jax.configs import MeshConfig
from cla_jax.evaluation.collectives import bytes_by_axis, collectives
from cla_jax.evaluation.mesh_plan import MeshWork, plan_mesh
from cla_jax.recipes import RECIPES
from cla_jax.registry import model

MESH = {"stage": 1, "data": 2, "fsdp": 2, "tensor": 2}
PROGRAM = """\
HloModule one

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {{
  %p = (s32[]{{:T(128)}}, f32[64]{{0:T(8,128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %two = s32[]{{:T(128)}} constant(2)
  %x = f32[64]{{0:T(8,128)}} get-tuple-element(%p), index=1
  %r = f32[64]{{0:T(8,128)}} {operation}(%x), channel_id=7, {groups}, to_apply=%sum
  %next = s32[]{{:T(128)}} add(%i, %two)
  ROOT %t = (s32[]{{:T(128)}}, f32[64]{{0:T(8,128)}}) tuple(%next, %r)
}}

%condition (p.1: (s32[], f32[64])) -> pred[] {{
  %p.1 = (s32[]{{:T(128)}}, f32[64]{{0:T(8,128)}}) parameter(0)
  %limit = s32[]{{:T(128)}} constant(10)
  %at = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%at, %limit), direction=LT
}}

ENTRY %main (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0:T(8,128)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant(0)
  %start = (s32[]{{:T(128)}}, /*index=1*/f32[64]{{0:T(8,128)}}) tuple(%zero, %a)
  %w = (s32[]{{:T(128)}}, f32[64]{{0:T(8,128)}}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[64]{{0:T(8,128)}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "tensor")),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", ("data", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}", None),
    ],
)  # fmt: skip
def test_groups_in_every_syntax_and_loops(groups, axes):
    (found,) = collectives(PROGRAM.format(operation="all-reduce", groups=groups), MESH)
    assert (found.kind, found.axes, found.bytes, found.times) == ("all-reduce", axes, 256, 5)
    if axes is not None:
        group = 2 ** len(axes)
        assert found.sent == 5 * 256 * 2 * (group - 1) // group


def test_an_all_reduce_that_is_fused_with_its_slice_is_a_reduce_scatter():
    hlo = PROGRAM.format(operation="all-reduce", groups="replica_groups=[2,4]<=[8]")
    (found,) = collectives(hlo.replace("%body", "%all-reduce-scatter.3"), MESH)
    assert (found.kind, found.bytes, found.sent) == ("reduce-scatter", 256, 5 * 256 * 3 // 4)


def test_permutations_across_axes():
    hlo = PROGRAM.format(operation="collective-permute",
                         groups="source_target_pairs={{0,4},{4,0}}")  # fmt: skip
    (found,) = collectives(hlo, MESH)
    assert (found.axes, found.sent) == (("data",), 5 * 256)


def test_what_shares_a_channel_is_one_where_the_groups_are_alike():
    """Asynchronous parts of one collective; not a permutation and its transpose."""
    line = (
        "  %{name} = f32[64]{{0}} collective-permute(%x), channel_id=1, source_target_pairs={pairs}"
    )
    pairs = ("{{0,4}}", "{{0,4}}", "{{4,0}}")
    lines = [line.format(name=f"p.{i}", pairs=pair) for i, pair in enumerate(pairs)]
    hlo = "\n".join(["ENTRY %main (x: f32[64]) -> f32[64] {", *lines, "}"])
    assert bytes_by_axis(collectives(hlo, MESH)) == {"data": 2 * 256}


def test_a_loop_whose_turns_cannot_be_told_is_counted_once_and_says_so():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def until(x):
        return jax.lax.while_loop(
            lambda x: x.sum() < 100.0, lambda x: x + x.mean(0, keepdims=True), x
        )

    rows = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    program = jax.jit(until, out_shardings=rows.sharding).lower(rows).compile()
    found = collectives(program.as_text() or "", {"data": 8})
    assert found
    assert not any(one.counted for one in found)


@pytest.mark.parametrize(
    ("old", "new", "times", "counted"),
    [
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(4)", 3, True),
        ("tuple(%next, %r)", "tuple(%copy.1, %r)", 5, True),
        ("direction=LT", "direction=GT", 1, False),
        ("add(%i, %two)", "multiply(%i, %two)", 1, False),
        ("add(%i, %two)", "add(%i, %i)", 1, False),
        ("%limit = s32[]{:T(128)} constant(10)",
         "%limit = s32[]{:T(128)} get-tuple-element(%p.1), index=2", 1, False),
    ],
)  # fmt: skip
def test_turns_are_told_of_loops_that_count_up_alone(old, new, times, counted):
    hlo = PROGRAM.format(operation="all-reduce", groups="replica_groups=[4,2]<=[8]")
    copy = "  %copy.1 = s32[]{:T(128)} copy(%next)\n  ROOT %t"
    assert old in hlo
    (found,) = collectives(hlo.replace(old, new).replace("  ROOT %t", copy, 1), MESH)
    assert (found.times, found.counted) == (times, counted)


def test_traffic_of_a_program_that_is_known():
    """Seven products with a matrix that lies in eighths are seven all-gathers."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def shape(size, *spec):
        return jax.ShapeDtypeStruct(size, jnp.float32,
                                    sharding=NamedSharding(mesh, PartitionSpec(*spec)))  # fmt: skip

    def products(x, matrices):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, matrices)[0]

    rows, stack = shape((1024, 64), "fsdp"), shape((7, 64, 64), None, "fsdp")
    program = jax.jit(products, out_shardings=rows.sharding).lower(rows, stack).compile()
    found = collectives(program.as_text() or "", {"fsdp": 8})
    assert bytes_by_axis(found) == {"fsdp": 7 * 64 * 64 * 4 * 7 // 8}
    assert all(one.counted for one in found)


@pytest.mark.standard_dtype_promotion
def test_a_plan_of_data_parallel_training():
    """Every gradient is summed over the copies, once; and a device holds all of the state."""
    config = model("tiny/MQA-CLA2")
    work = MeshWork(batch=4, context=64)
    (plan,) = plan_mesh(config, MeshConfig(data=2), "cpu:2", ("train",), work)
    assert [*plan.sent] == ["data"]
    assert plan.sent["data"] == pytest.approx(4 * config.parameters, rel=1e-3)
    assert plan.arguments == pytest.approx(12 * config.parameters, rel=1e-2)
    assert plan.fits
    assert plan.total is not None
    assert plan.arguments is not None
    assert plan.total > plan.arguments


@pytest.mark.parametrize(
    ("target", "mesh", "part"),
    [
        ("cpu:64", {"data": 2}, "was started with 8 CPU devices; at most cpu:8"),
        ("cpu", {"data": 2}, "expected a number of devices, such as cpu:8"),
        ("v5", {"data": 2}, "the nearest is 'v5"),
        ("v5e:4", {"data": 2}, "expected a topology, such as v5e:4x4"),
        ("cpu:2", {"data": 4}, "what works: data=2"),
        ("cpu:8", {"tensor": 8}, "tensor sizes that work: 1, 2, 4"),
        ("cpu:8", {"data": 3}, "does not divide a batch of 4 rows"),
        ("cpu:8", {"stage": 3, "data": 2}, "fewer than its 3 stages"),
    ],
)
def test_what_cannot_be_planned(target, mesh, part):
    with pytest.raises(ValueError, match=part):
        plan_mesh(model("tiny/MQA-CLA2"), MeshConfig(**mesh), target, work=MeshWork(batch=4))


@pytest.mark.parametrize(
    ("mesh", "programs", "work", "part"),
    [
        ({"stage": 3}, ("train", "decode"), {}, "mesh stage=3: stages are for training"),
        ({"data": 2}, ("decode",), {"recipe": RECIPES["tiny"]}, "of training, not of decode"),
        ({"data": 2}, ("train",), {"context": 257}, "longer than the 256 tokens"),
        ({"stage": 3}, None, {"context": 257}, "longer than the 256 tokens"),
        ({"data": 2}, None, {"recipe": RECIPES["cla-1b"]}, "context=2048 is longer"),
        ({"data": 2}, None, {"context": 0}, "context=0: expected 1"),
        ({"data": 2}, ("train",), {"batch": 4, "micro_batch": 3}, "the nearest that does is [24]"),
    ],
)
def test_programs_that_a_mesh_or_a_context_is_not_for(mesh, programs, work, part):
    with pytest.raises(ValueError, match=part):
        plan_mesh(model("tiny/MQA-CLA2"), MeshConfig(**mesh), "cpu:8", programs, MeshWork(**work))


def test_a_second_process_that_compiles_for_tpus_is_told_to_wait(monkeypatch):
    def locked(**_):
        raise RuntimeError('ABORTED: multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".')

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", locked)
    with pytest.raises(ValueError, match="one at a time: wait until it is done"):
        plan_mesh(model("tiny/MQA-CLA2"), MeshConfig(data=4), "v5e:2x2", work=MeshWork(batch=4))
