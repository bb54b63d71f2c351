"""`pipeline_layers`: `scan_layers` in stages, each on devices of its own.

GPipe (Huang et al. 2019). The stacked axis of the map's body (`KVSharing.pipeline_body`) is split
over the mesh axis that `layers` is laid out over, here called the stages. Rows are cut into
microbatches; at every tick each stage runs its layers on another microbatch and hands the
activations to the next by a collective permute. All stages' activations are one array
`[stages, microbatch, T, D]` that is split by stage, and a tick is a stage's program under
`jax.vmap`: K/V live inside that program alone, so there is nothing to carry them between stages.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cla_jax.configs import ExecutionConfig, nearest_divisor
from cla_jax.models.sharding import constrain, laid_out_as, mesh_axes, shards
from cla_jax.models.stack import (
    Layers,
    check_kept,
    check_layers,
    rematerialised,
    run_segments,
    segment_body,
    segment_steps,
)
from cla_jax.sharing import KVSharing, Segment

type ContextLayerFn[X, P, C] = Callable[[P, X, Any, C], tuple[X, Any]]
"""`layer(parameters, x, kv, context) -> (x, kv)`: a `LayerFn` that is handed what it reads beside
its input, since a stage reads only that of its microbatch."""

MICROBATCHES_PER_STAGE = 4  # from which on the bubble is small (GPipe, section 2.3)


def pipeline_layers[X, C](
    layer: ContextLayerFn[X, Any, C],
    sharing: KVSharing,
    layers: Layers,
    x: X,
    context: C,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    *,
    prepare: Callable[[Any], Any] | None = None,
) -> X:
    """Run `x` through every layer, as `scan_layers` does, in the stages of the mesh in force.

    Without a mesh, or with one stage, it is `scan_layers`. To be traced under `jax.jit`.

    Args:
        layer: `layer(parameters, x, kv, context) -> (x, kv)`; pure. It also runs on rows whose
            results nobody reads, while the pipeline fills and drains.
        sharing: the map.
        layers: stacked parameters, as `stack_layers` makes them.
        x: any pytree of arrays `[B, ...]` whose shapes and dtypes every layer keeps.
        context: any pytree of arrays whose first axis is `B`, or 1: for all rows.
        execution: as in `scan_layers`; `remat` is of a whole stage, which keeps its input of every
            microbatch. `pipeline_microbatches`: see `microbatches`.
        prepare: what `layer` makes of its parameters before it uses them, such as a rounding, and
            where it is given a second time changes nothing more. Stages are given parameters for
            which it was done, once for all microbatches, and keep both; gradients are summed over
            microbatches in the parameters' own dtypes.

    Returns:
        `x` after the last layer.

    Raises:
        ValueError: as `scan_layers`; an array of `x` without rows, or with other rows than the
            rest; one of `context` whose first axis is neither `B` nor 1; stages that the map cannot
            be cut into, rows that the mesh or the microbatches do not divide.
    """
    check_layers(sharing, layers)
    rows = _check_rows(x, context)
    stages = shards("layers")

    def run(segments: slice, x: X, context: C) -> X:
        return run_segments(
            lambda parameters, x, kv: layer(parameters, x, kv, context),
            sharing, sharing.segments[segments], layers[segments], x, execution,
        )  # fmt: skip

    if stages == 1:
        return run(slice(None), x, context)
    sharing.pipeline(stages)  # refuses
    place = sharing.pipeline_body
    assert place is not None
    count = microbatches(execution, rows, stages, shards("batch"))

    def outside(x: X, segments: slice) -> X:
        """Layers in no stage: every stage's devices run them on some of the rows."""
        if not sharing.segments[segments]:
            return x
        spread, read = _filled_up(x, rows), _filled_up(context, rows)
        with laid_out_as(batch="batch_outside"):
            spread = _rows(run(segments, _rows(spread), read))
        return _rows(_without_filling(_rows(spread), rows))

    x, context = jax.tree.map(jnp.asarray, (x, context))
    x = outside(x, slice(0, place))
    x = _body(
        layer, sharing.segments[place], layers[place], x, context, execution, stages, count, prepare
    )  # fmt: skip
    return outside(x, slice(place + 1, None))


def microbatches(execution: ExecutionConfig, rows: int, stages: int, shards: int = 1) -> int:
    """Parts that a batch is cut into for a pipeline.

    Args:
        execution: whose `pipeline_microbatches` is taken; 0: the most that divide the rows, up to
            four a stage.
        rows: of the batch.
        stages: of the pipeline.
        shards: parts that every microbatch's rows are split into.

    Raises:
        ValueError: they, or the shards, do not divide the rows; names the nearest number that does.
    """
    if rows % shards:
        raise ValueError(
            f"{rows} rows: the mesh splits them by {shards} (data and fsdp); the nearest number "
            f"that works is {max(round(rows / shards), 1) * shards}"
        )
    count, whole = execution.pipeline_microbatches, rows // shards
    if not count:
        most = min(MICROBATCHES_PER_STAGE * stages, whole)
        return max(n for n in range(1, most + 1) if whole % n == 0)
    if whole % count:
        over = f" on each of {shards} data and fsdp shards" if shards > 1 else ""
        raise ValueError(
            f"pipeline_microbatches={count} does not divide the {whole} rows of a forward and "
            f"backward pass{over}; the nearest that does is {nearest_divisor(whole, count)}"
        )
    return count


def _check_rows(x: Any, context: Any) -> int:
    """The number of rows, `B`, of a batch and of what is read beside it."""

    def shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]

    given = shapes(x)
    rows = next((shape[0] for _, shape in given if shape), 0)
    if wrong := next(((at, shape) for at, shape in given if shape[:1] != (rows,)), None):
        raise ValueError(
            f"x{wrong[0]} has shape {list(wrong[1])}: expected a first axis of "
            f"{rows or 'B, 1 or more,'} rows, as in all arrays of x"
        )
    if not rows:
        raise ValueError("x holds no rows: expected arrays [B, ...] with B of 1 or more")
    for at, shape in shapes(context):
        if shape[:1] not in ((rows,), (1,)):
            raise ValueError(
                f"context{at} has shape {list(shape)}: expected a first axis of {rows} rows, as x "
                "has, or of 1, for all rows"
            )
    return rows


def _body(
    layer: ContextLayerFn[Any, Any, Any],
    segment: Segment,
    stacked: Any,
    x: Any,
    context: Any,
    execution: ExecutionConfig,
    stages: int,
    count: int,
    prepare: Callable[[Any], Any] | None,
) -> Any:
    """The segment in stages. Axes: `C` microbatches, `P` stages, `ticks` = `C + P - 1`."""
    rows, ticks = len(jax.tree.leaves(x)[0]), count + stages - 1
    parameters = jax.tree.map(
        lambda a: _by_stage(jnp.asarray(a).reshape(stages, -1, *a.shape[1:]), 0), list(stacked)
    )
    # XLA does not hoist it out of the loop on GPUs: read and rounded at every tick, float32
    # parameters of 1B took 1 ms of it.
    prepared = jax.lax.stop_gradient(prepare(parameters)) if prepare else parameters
    leaves, structure = jax.tree.flatten(context)
    own = [len(leaf) == rows > 1 for leaf in leaves]
    leaves = [_cut(leaf, count) if mine else leaf for leaf, mine in zip(leaves, own, strict=True)]

    def stage(parameters: Any, x: Any, number: jax.Array, tick: jax.Array) -> Any:
        microbatch = jnp.clip(tick - number, 0, count - 1)
        here = [
            jax.lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False) if mine else leaf
            for leaf, mine in zip(leaves, own, strict=True)
        ]
        read = structure.unflatten(here)
        body = segment_body(lambda p, x, kv: layer(p, x, kv, read), segment, {}, ())
        return segment_steps(body, segment.repeats // stages, parameters, x, execution)[0]

    stage = rematerialised(stage, execution.remat, inside_scan=True, batch_axes=1)
    (axis,) = mesh_axes("layers")
    all_stages = jax.vmap(stage, in_axes=(0, 0, 0, None), spmd_axis_name=axis)
    numbers = jnp.arange(stages, dtype=jnp.int32)

    # What enters stage 0 at every tick. The ticks that drain the pipeline, and the other stages at
    # first, have rows of no account: real ones, so that no layer meets what it was not made for.
    cut = jax.tree.map(lambda a: _cut(a, count), x)
    first = jax.tree.map(
        lambda a: _by_stage(jnp.broadcast_to(a[:1], (stages, *a.shape[1:])), 0, "batch"),
        jax.lax.stop_gradient(cut),
    )
    entering = jax.tree.map(lambda a: _entering(a, numbers, ticks), cut)

    def tick(previous: Any, now: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        number, fresh = now
        x = jax.tree.map(
            lambda new, old: jnp.where(_against(numbers, 0, new) == 0, new, old), fresh, previous
        )
        given = _in_place_of(parameters, prepared) if prepare else parameters
        after = all_stages(given, x, numbers, number)
        check_kept(x, after)
        after = jax.tree.map(lambda a: _by_stage(a, 0, "batch"), after)
        return _to_next_stage(after, axis, stages), after

    _, left = jax.lax.scan(tick, first, (jnp.arange(ticks, dtype=jnp.int32), entering))
    return jax.tree.map(lambda a: _joined(_of_last_stage(a[stages - 1 :], numbers)), left)


@jax.custom_vjp
def _in_place_of(parameters: Any, prepared: Any) -> Any:
    """The prepared ones, whose gradients are those of the parameters."""
    del parameters
    return prepared


def _in_place_of_forward(parameters: Any, prepared: Any) -> tuple[Any, Any]:
    return prepared, jax.tree.map(lambda a: jnp.zeros((), a.dtype), parameters)


def _in_place_of_backward(like: Any, gradients: Any) -> tuple[Any, None]:
    return jax.tree.map(lambda g, a: g.astype(a.dtype), gradients, like), None


_in_place_of.defvjp(_in_place_of_forward, _in_place_of_backward)


def _to_next_stage(x: Any, axis: str, stages: int) -> Any:
    """`[P, ...]` with every stage's part at the next; stage 0 gets zeros."""
    pairs = [(stage, stage + 1) for stage in range(stages - 1)]
    spec = PartitionSpec(axis)

    def send(x: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.ppermute(a, axis, pairs), x)

    return jax.shard_map(send, in_specs=spec, out_specs=spec, axis_names={axis})(x)


def _entering(cut: jax.Array, numbers: jax.Array, ticks: int) -> jax.Array:
    """`[C, ...]` as `[ticks, P, ...]`: a tick's microbatch at stage 0, zeros at the others.

    Made before the loop: its gradients are then summed over stages once, and not at every tick.
    """
    last = jnp.broadcast_to(cut[-1:], (ticks - len(cut), *cut.shape[1:]))
    fresh = jnp.concatenate([cut, jax.lax.stop_gradient(last)])[:, None]
    at_first = jnp.where(_against(numbers, 1, fresh) == 0, fresh, jnp.zeros_like(fresh))
    return _by_stage(at_first, 1, "batch")


def _of_last_stage(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """`[C, P, ...]` of the last stage, for all: the others are zeros in a sum over stages."""
    last = jnp.where(_against(numbers, 1, x) == len(numbers) - 1, x, jnp.zeros_like(x))
    # Not jnp.sum, which would send 16-bit numbers as float32: all but one are zero.
    return jax.lax.reduce_sum(last, axes=[1])


def _cut(x: jax.Array, count: int) -> jax.Array:
    """`[B, ...]` as microbatches `[C, B / C, ...]`.

    Strided, not contiguous: every device keeps rows of its own in each.
    """
    cut = x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain(cut, None, "batch", *[None] * (cut.ndim - 2))


def _joined(cut: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    return _rows(cut.swapaxes(0, 1).reshape(-1, *cut.shape[2:]))


def _filled_up(tree: Any, rows: int) -> Any:
    """Arrays of so many rows with more of them, so that the stages divide a shard's; others as is.

    Stages share the rows of layers outside them. Every shard gets more of its own, so that no row
    moves: copies, so that no layer meets what it was not made for.
    """
    whole, more = _rows_of_a_shard(rows)

    def fill(a: jax.Array) -> jax.Array:
        if len(a) != rows or not more:
            return a
        cut = a.reshape(rows // whole, whole, *a.shape[1:])
        copies = jnp.broadcast_to(cut[:, :1], (len(cut), more, *a.shape[1:]))
        filled = jnp.concatenate([cut, jax.lax.stop_gradient(copies)], axis=1)
        return filled.reshape(-1, *a.shape[1:])

    return jax.tree.map(fill, tree)


def _without_filling(tree: Any, rows: int) -> Any:
    """The inverse of `_filled_up`, of arrays that have rows."""
    whole, more = _rows_of_a_shard(rows)
    return jax.tree.map(
        lambda a: a.reshape(rows // whole, whole + more, *a.shape[1:])[:, :whole].reshape(
            rows, *a.shape[1:]
        ),
        tree,
    )


def _rows_of_a_shard(rows: int) -> tuple[int, int]:
    """Rows that a part of the batch has, and those that it lacks for all stages to have as many."""
    parts = shards("batch")
    whole = rows // parts
    return whole, -whole % (shards("batch_outside") // parts)


def _rows(x: Any) -> Any:
    return jax.tree.map(lambda a: constrain(a, "batch", *[None] * (a.ndim - 1)), x)


def _by_stage(x: jax.Array, place: int, *after: str) -> jax.Array:
    """Split by stage along an axis; the other axes as they are, but for those named after it."""
    keep = PartitionSpec.UNCONSTRAINED
    axes = [*[keep] * place, "layers", *after]
    return constrain(x, *axes, *[keep] * (x.ndim - len(axes)))


def _against(numbers: jax.Array, place: int, like: jax.Array) -> jax.Array:
    """Stages' numbers along one axis of `like`."""
    return numbers.reshape([-1 if i == place else 1 for i in range(like.ndim)])
