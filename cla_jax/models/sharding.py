"""Logical axis names on parameters and activations; meshes are somebody else's business.

Models only *name* axes, the letters of the axis legend spelled out. Which mesh axis, if any, a name
is laid out over is said by the rules in force (`flax.nnx.logical_axis_rules`); without a mesh or
without rules every name is inert.

Parameter axes: `vocab`, `embed` (D), `heads` (N), `kv_heads` (K), `head_dim` (H), `mlp` (F),
`layers` (the stacked axis of a segment), `pair` (gate/up or key/value).
Activation axes: `batch` (B), `length` (T or S), `model` (D), `heads`, `kv_heads`, `head_dim`,
`mlp`, `vocab`.
"""

from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec

Axes = tuple[str | None, ...]


def named(*axes: str) -> dict[str, Any]:
    """Flax variable metadata that names a parameter's axes and lays nothing out yet."""
    return {"out_sharding": axes, "eager_sharding": False}


def partition_spec(axes: Axes) -> PartitionSpec:
    """The mesh axes that the rules in force give these logical axes."""
    rules = dict(get_logical_axis_rules())
    return PartitionSpec(*(rules.get(axis) if axis else None for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Ask for an activation to be laid out by its logical axes; nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty or not get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def logical_axes(variable: nnx.Variable[jax.Array]) -> Axes:
    """The axis names of a parameter, one for each of its dimensions."""
    return tuple(variable.get_metadata()["out_sharding"])
