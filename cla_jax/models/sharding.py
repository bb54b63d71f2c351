"""Logical axis names on parameters and activations; meshes are somebody else's business.

Models only *name* axes, the letters of the axis legend spelled out. Which mesh axes, if any, a name
is laid out over is said by the rules in force (`use_rules`). They know every name: one that they do
not know is refused. Without a mesh or without rules every name is inert.

Parameter axes: `vocab`, `embed` (D), `norm` (D of a norm), `heads` (N), `kv_heads` (K), `head_dim`
(H), `mlp` (F), `layers` (the stacked axis of a segment), `layers_outside` (of one beside a
pipeline's body), `pair` (gate/up or key/value).
Activation axes: `batch` (B), `batch_outside` (B where a layer runs beside a pipeline's stages),
`batch_loss` (devices' parts of the loss's tokens), `length` (T or S), `model` (D), `heads`,
`kv_heads`, `head_dim`, `mlp`, `vocab`. Axes of a cache: `cache_batch` (B) and `cache_heads` (K); in
inference the rows of attention and of the residual stream, and the query heads of activations and
parameters, lie where those do.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from cla_kernels import target_device
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec

from cla_jax._choices import check_choice

Axes = tuple[Any, ...]
"""A name for each dimension; None: copied; `PartitionSpec.UNCONSTRAINED`: as it comes."""


def named(*axes: str) -> dict[str, Any]:
    """Flax variable metadata that names a parameter's axes and lays nothing out yet."""
    return {"out_sharding": axes, "eager_sharding": False}


@functools.cache
def _traced_rules() -> Any:
    # Made when it is first needed: nothing of JAX is touched by an import.
    return jax.make_user_context(None)


@contextlib.contextmanager
def use_rules(pairs: tuple[tuple[str, Any], ...]) -> Iterator[None]:
    """These rules are in force inside.

    `flax.nnx.logical_axis_rules`, which `jax.jit` also looks at: with those alone, a function that
    was traced under other rules on the same mesh would run as it was traced then.

    Args:
        pairs: logical axis, and the mesh axis or axes that it is laid out over.
    """
    with nnx.logical_axis_rules(pairs), _traced_rules()(pairs):
        yield


def partition_spec(axes: Axes) -> PartitionSpec:
    """The mesh axes that the rules in force give these logical axes.

    Inside `jax.shard_map`, where a device sees its own shard, the axes that are mapped there are
    left out.
    """
    keep = PartitionSpec.UNCONSTRAINED
    return PartitionSpec(*(keep if axis is keep else mesh_axes(axis) or None for axis in axes))


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """Those that the rules in force lay a logical axis out over, but for axes mapped already.

    Raises:
        ValueError: the rules do not know the axis; names the nearest that they do.
    """
    given = None
    if axis is not None and (rules := dict(get_logical_axis_rules())):
        check_choice("logical axis", axis, rules)
        given = rules[axis]
    names = (given,) if isinstance(given, str) else tuple(given or ())
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in names if name not in manual)


def shards(axis: str) -> int:
    """Parts that a logical axis is split into; 1 without a mesh or rules."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def platform() -> str:
    """What code is traced for: the mesh's devices, which may be of another machine; else ours."""
    return target_device().platform


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Ask for an activation to be laid out by its logical axes; nothing without a mesh.

    Args:
        x: the activation.
        axes: as in `Axes`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual or not get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


@contextlib.contextmanager
def laid_out_as(**axes: str) -> Iterator[None]:
    """Inside, logical axes are laid out as others are; nothing without rules.

    Args:
        axes: by name, the other: `batch="batch_outside"`.

    Raises:
        ValueError: the rules do not know an axis; names the nearest that they do.
    """
    rules = dict(get_logical_axis_rules())
    if not rules:
        yield
        return
    for axis in (*axes, *axes.values()):
        check_choice("logical axis", axis, rules)
    changed = {axis: rules[other] for axis, other in axes.items()}
    with use_rules(tuple({**rules, **changed}.items())):
        yield


def on_shards(
    f: Callable[..., jax.Array], in_axes: tuple[Axes | None, ...], out_axes: Axes
) -> Callable[..., jax.Array]:
    """`f` on every device's own shards (`jax.shard_map`); without a mesh, `f` itself.

    For what XLA cannot split, such as a custom kernel.

    Args:
        f: of arrays, to one array.
        in_axes: the logical axes of its arguments; None for an argument that is None.
        out_axes: of its result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual or not get_logical_axis_rules():
        return f
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(
        f,
        in_specs=tuple(None if axes is None else partition_spec(axes) for axes in in_axes),
        out_specs=partition_spec(out_axes),
        check_vma=False,
    )


def logical_axes(variable: nnx.Variable[jax.Array]) -> Axes:
    """The axis names of a parameter, one for each of its dimensions."""
    return tuple(variable.get_metadata()["out_sharding"])


def laid_out[M](module: M) -> M:
    """A module with its parameters laid out by their logical axes; itself without a mesh.

    One layer of a stack, taken out of it, has the axes of the stack but for `layers`.
    """
    if jax.sharding.get_abstract_mesh().empty or not get_logical_axis_rules():
        return module

    def lay(variable: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        value = variable.get_value()
        axes = logical_axes(variable)
        return variable.replace(constrain(value, *axes[len(axes) - value.ndim :]))

    return jax.tree.map(lay, module, is_leaf=lambda v: isinstance(v, nnx.Variable))
