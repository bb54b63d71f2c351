"""`scan_layers`: any layer of the form `(x, kv) -> (x, kv)` becomes a stack that shares K/V.

One `jax.lax.scan` per segment of the sharing map, whose carry is `(x, K/V)`. Readers of an owner in
the same repeat read its K/V inside the body; the carry takes the last owner's K/V out of the scan;
a segment of readers alone closes over the K/V it reads, which are then saved once for the backward
pass instead of once a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cla_jax.configs import ExecutionConfig, Remat
from cla_jax.sharing import KVSharing, Segment

type Layers = Sequence[Sequence[Any]]
"""`[segment][position]`: pytrees of one layer's parameters, stacked over the segment's repeats."""

type LayerFn[X, P] = Callable[[P, X, Any], tuple[X, Any]]
"""`layer(parameters, x, kv) -> (x, kv)`; `kv` is None where the layer is an owner."""


def stack_layers(
    make_layer: Callable[[bool, nnx.Rngs], nnx.Module], sharing: KVSharing, *, rngs: nnx.Rngs
) -> nnx.List[nnx.List[nnx.Module]]:
    """Build every layer of a sharing map, stacked as `scan_layers` wants them.

    Args:
        make_layer: `make_layer(owns_kv, rngs)` builds one layer. It is called once for a segment's
            position, of all of whose repeats the shapes are then alike.
        sharing: the map.
        rngs: random streams; each layer gets its own.

    Returns:
        `[segment][position]`, every array with a leading axis of the segment's repeats, whose
        logical name is `layers`, or `layers_outside` beside a pipeline's body
        (`KVSharing.pipeline_body`).

    Examples:
        >>> sharing = KVSharing.cla(num_layers=6, factor=2)
        >>> make = lambda owns_kv, rngs: nnx.Linear(4, 8, rngs=rngs)
        >>> layers = stack_layers(make, sharing, rngs=nnx.Rngs(0))
        >>> [layer.kernel.shape for segment in layers for layer in segment]
        [(3, 4, 8), (3, 4, 8)]
    """
    body = sharing.pipeline_body

    def stack(owns_kv: bool, repeats: int, axis: str) -> nnx.Module:
        @jax.vmap
        @functools.partial(nnx.transform_metadata, in_axes=0, out_axes=0, partition=axis)
        def make(layer_rngs: nnx.Rngs) -> nnx.Module:
            return make_layer(owns_kv, layer_rngs)

        return make(rngs.split(repeats))

    return nnx.List(
        nnx.List(
            stack(
                source == position,
                segment.repeats,
                "layers" if body in (None, place) else "layers_outside",
            )
            for position, source in enumerate(segment.sources)
        )
        for place, segment in enumerate(sharing.segments)
    )


def unstack_layer(layers: Layers, sharing: KVSharing, layer: int) -> Any:
    """The parameters of one layer, by its index in the model, without the stacked axis.

    Raises:
        IndexError: no such layer.
    """
    if not 0 <= layer < sharing.num_layers:
        raise IndexError(f"layer {layer}: expected 0 to {sharing.num_layers - 1}")
    for segment, stacked in zip(sharing.segments, layers, strict=True):
        if layer < segment.stop:
            repeat, position = divmod(layer - segment.start, segment.period)
            return _at(stacked[position], repeat)
    raise AssertionError("the segments end before the last layer")


def scan_layers[X](
    layer: LayerFn[X, Any],
    sharing: KVSharing,
    layers: Layers,
    x: X,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
) -> X:
    """Run `x` through every layer, each with the K/V that the sharing map gives it.

    The compiler traces the layers of the segments' periods, not the depth (see `Segment`).

    Args:
        layer: `layer(parameters, x, kv) -> (x, kv)`. An owner is given None and returns its K/V,
            any pytree of arrays; a reader is given its owner's and what it returns is ignored.
        sharing: the map.
        layers: stacked parameters, as `stack_layers` makes them.
        x: any pytree whose shapes and dtypes every layer keeps.
        execution: `scan`, `unroll` and `remat` are used.

    Returns:
        `x` after the last layer.

    Examples:
        >>> def layer(scale, x, kv):
        ...     kv = scale * x if kv is None else kv  # an owner makes it, a reader is given it
        ...     return x + kv, kv
        >>> sharing = KVSharing.cla(num_layers=6, factor=2)
        >>> scales = [[jax.numpy.ones(3), jax.numpy.zeros(3)]]  # owners and readers, 3 of each
        >>> float(scan_layers(layer, sharing, scales, jax.numpy.float32(1.0)))
        27.0

    Raises:
        ValueError: an owner returned None, a layer changes the shape or dtype of `x`, `layers` was
            stacked for another map, or holds state that a scan cannot update (random streams, as
            of dropout; batch statistics; a cache).
    """
    check_layers(sharing, layers)
    return run_segments(layer, sharing, sharing.segments, layers, x, execution)


def run_segments[X](
    layer: LayerFn[X, Any],
    sharing: KVSharing,
    segments: Sequence[Segment],
    layers: Layers,
    x: X,
    execution: ExecutionConfig,
) -> X:
    """`scan_layers` over some adjacent segments, which no K/V enters or leaves.

    Args:
        layer: as in `scan_layers`.
        sharing: the whole map.
        segments: some of its segments.
        layers: the parameters of these.
        x: what goes into the first of them.
        execution: as in `scan_layers`.
    """
    last_read = {owner: reader for reader, owner in enumerate(sharing.owners)}
    available: dict[int, Any] = {}
    for segment, stacked in zip(segments, layers, strict=True):
        last_repeat = segment.stop - segment.period
        exports = tuple(
            position
            for position, source in enumerate(segment.sources)
            if source == position and last_read[last_repeat + position] >= segment.stop
        )
        body = segment_body(layer, segment, available, exports)
        with jax.named_scope(f"layers_{segment.start}_to_{segment.stop - 1}"):
            # Repeats that one scan step runs side by side are merged as those of no scan are.
            alone = execution.scan and segment.repeats > 1 and execution.unroll == 1
            body = rematerialised(body, execution.remat, inside_scan=alone)
            x, exported = segment_steps(body, segment.repeats, list(stacked), x, execution)
        available |= {
            last_repeat + position: kv for position, kv in zip(exports, exported, strict=True)
        }
    return x


def segment_body(
    layer: LayerFn[Any, Any], segment: Segment, outer: dict[int, Any], exports: tuple[int, ...]
) -> Callable[[Any, list[Any]], tuple[Any, tuple[Any, ...]]]:
    """One repeat of a segment: `(x, parameters) -> (x, K/V of the exported owners)`.

    Args:
        layer: as in `scan_layers`.
        segment: of the map.
        outer: K/V from before the segment, by absolute layer.
        exports: the positions whose K/V somebody reads after the segment.
    """
    closed_over = {~source: outer[~source] for source in segment.sources if source < 0}

    def body(x: Any, parameters: list[Any]) -> tuple[Any, tuple[Any, ...]]:
        own: dict[int, Any] = {}
        for position, source in enumerate(segment.sources):
            if source != position:
                kv = own[source] if source >= 0 else closed_over[~source]
                x, _ = layer(parameters[position], x, kv)
                continue
            x, kv = layer(parameters[position], x, None)
            if kv is None:
                raise ValueError(
                    f"layer {segment.start + position} is an owner but returned no K/V"
                )
            own[position] = kv
        return x, tuple(own[position] for position in exports)

    return body


def segment_steps(
    body: Callable[..., Any],
    repeats: int,
    stacked: list[Any],
    x: Any,
    execution: ExecutionConfig,
) -> tuple[Any, tuple[Any, ...]]:
    """Run a segment's body as often as it repeats; `scan` and `unroll` are used."""
    if not (execution.scan and repeats > 1):
        exported: tuple[Any, ...] = ()
        for repeat in range(repeats):
            before = x
            x, exported = body(before, _at(stacked, repeat))
            check_kept(before, x)
        return x, exported

    # The exported K/V ride in the carry; each step overwrites them before anything reads them, so
    # the compiler drops all but the last and the backward pass saves none.
    after, shapes = jax.eval_shape(body, x, _at(stacked, 0))
    check_kept(x, after)
    empty = jax.tree.map(_zeros, shapes)

    def step(carry: tuple[Any, Any], parameters: list[Any]) -> tuple[tuple[Any, Any], None]:
        return body(carry[0], parameters), None

    carry, _ = jax.lax.scan(
        step, (x, empty), stacked, length=repeats, unroll=min(execution.unroll, repeats)
    )
    return carry


def _zeros(like: Any) -> jax.Array:
    """Zeros of that shape, laid out alike; inside `shard_map` they vary over the same axes."""
    zeros = jnp.zeros(like.shape, like.dtype, device=like.sharding)
    varying = tuple(like.manual_axis_type.varying) if like.manual_axis_type else ()
    return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


def rematerialised(
    body: Callable[..., Any], remat: Remat, *, inside_scan: bool, batch_axes: int = 0
) -> Callable[..., Any]:
    """A function whose backward pass recomputes what `remat` says.

    Args:
        body: the function.
        remat: as in `ExecutionConfig`.
        inside_scan: whether it is all that a scan's step runs.
        batch_axes: that every matrix product has, because `jax.vmap` gave them to it.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    policy = {
        "full": policies.nothing_saveable,
        "dots": functools.partial(_saves_products, batch_axes=batch_axes),
    }[remat]
    # Inside a scan nothing can merge the recomputation with the original, so the barriers that
    # prevent it are only cost; outside one, without them XLA undoes the rematerialisation.
    return jax.checkpoint(body, policy=policy, prevent_cse=not inside_scan)


def _saves_products(primitive: Any, *_: Any, batch_axes: int, **parameters: Any) -> bool:
    """Matrix products without a batch dimension of their own, which are the layers' projections."""
    if primitive is not jax.lax.dot_general_p:
        return False
    _, (batch, _) = parameters["dimension_numbers"]
    return len(batch) <= batch_axes


def _at(stacked: Any, repeat: int) -> Any:
    return jax.tree.map(lambda a: a[repeat], stacked)


def check_layers(sharing: KVSharing, layers: Layers) -> None:
    """Whether `layers` are parameters of that map's layers, stacked.

    Raises:
        ValueError: they were stacked for another map, or hold state that a pure function of
            parameters cannot update: it would be lost without a word.
    """
    if not isinstance(sharing, KVSharing):
        raise ValueError(f"sharing={sharing!r}: expected a KVSharing, such as KVSharing.cla(6, 2)")
    advice = f"the sharing map {sharing.owners} needs other layers: build them with stack_layers"
    periods = [segment.period for segment in sharing.segments]
    try:
        found = [len(stacked) for stacked in layers]
    except TypeError:
        raise ValueError(f"layers are not stacked by segment and position; {advice}") from None
    if found != periods:
        raise ValueError(
            f"layers are {len(found)} segments of {found} positions, expected {periods}; {advice}"
        )
    for number, (segment, stacked) in enumerate(zip(sharing.segments, layers, strict=True)):
        for position, parameters in enumerate(stacked):
            shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(parameters)]
            if wrong := [shape for shape in shapes if shape[:1] != (segment.repeats,)]:
                raise ValueError(
                    f"segment {number}, position {position} holds a parameter {wrong[0]}, expected "
                    f"a leading axis of {segment.repeats} repeats; {advice}"
                )
    variables = jax.tree_util.tree_leaves_with_path(
        [list(stacked) for stacked in layers], is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    for path, variable in variables:
        if isinstance(variable, nnx.RngState | nnx.BatchStat | nnx.Cache):
            where = jax.tree_util.keystr(path[2:])
            raise ValueError(
                f"a layer holds {type(variable).__name__} at {where}, which changes from call to "
                "call and would be lost here: carry it in x (for dropout, a key that every layer "
                "splits)"
            )


def check_kept(before: Any, after: Any) -> None:
    """Whether a repeat of layers keeps the structure, shapes and dtypes of `x`."""

    def types(tree: Any) -> Any:
        def name(a: Any) -> str:
            return f"{getattr(a, 'dtype', type(a).__name__)}{list(jnp.shape(a))}"

        return jax.tree.map(name, tree)

    if (given := types(before)) != (returned := types(after)):
        raise ValueError(f"x goes into the layers as {given} and comes out as {returned}")
