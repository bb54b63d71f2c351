"""A `MeshConfig` on the devices that there are."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from cla_jax._mesh import MESH_AXES, MeshConfig

# Neighbouring devices, which are linked best, get the axes that talk most: `tensor` the innermost.
_ORDER = ("stage", "data", "fsdp", "tensor")
assert set(_ORDER) == set(MESH_AXES)


def resolve_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> MeshConfig:
    """The sizes of a mesh on the devices that there are.

    Raises:
        ValueError: they do not fit; names sizes that do. Several processes must use every device.
    """
    found = jax.devices() if devices is None else devices
    resolved = config.resolved(len(found))
    if jax.process_count() > 1 and resolved.devices != len(found):
        works = ", ".join(f"{axis}={len(found)}" for axis in ("data", "fsdp"))
        raise ValueError(
            f"mesh {config} is {resolved.devices} device{'s' * (resolved.devices > 1)}, and "
            f"{jax.process_count()} processes have {len(found)}, all of which take part: give a "
            f"mesh of {len(found)}, such as {works}"
        )
    return resolved


def one_device_note(config: MeshConfig, devices: Sequence[Any] | None = None) -> str:
    """What to say where a mesh was asked for and is one device; empty for any other, and for none.

    Raises:
        ValueError: the sizes do not fit the devices; names sizes that do.
    """
    if config == MeshConfig() or resolve_mesh(config, devices).devices > 1:
        return ""
    return f"mesh {config} is one device here: nothing is split, as without a mesh"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the four axes, whose shardings XLA propagates (`AxisType.Auto`).

    Args:
        config: devices along each axis.
        devices: to make it of, the first ones if they are more than it takes; default all.

    Raises:
        ValueError: the sizes do not fit the devices; names sizes that do.
    """
    found = jax.devices() if devices is None else list(devices)
    resolved = resolve_mesh(config, found)
    shape, taken = tuple(resolved.sizes[axis] for axis in _ORDER), found[: resolved.devices]
    types = (AxisType.Auto,) * len(shape)
    if len(taken) < len(found):  # no torus of their own, which a TPU's mesh would be fitted to
        return Mesh(np.asarray(taken).reshape(shape), _ORDER, axis_types=types)
    try:
        return jax.make_mesh(shape, _ORDER, axis_types=types, devices=taken)
    except NotImplementedError:
        # No axes of a TPU's torus make these sizes: its axes are cut, which has slower rings.
        cut = create_device_mesh(shape, taken, allow_split_physical_axes=True)
        return Mesh(cut, _ORDER, axis_types=types)
