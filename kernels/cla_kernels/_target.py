"""What device code is traced for."""

from typing import Any

import jax


def target_device() -> Any:
    """A device of the mesh in force, which may be of another machine; else the default device.

    That is `jax.config.jax_default_device` (`jax.default_device`) where it is set, else JAX's first
    device. Where arrays were put by hand is not seen: those on the processor of a machine with a
    GPU want `jax.default_device("cpu")`.

    Of a platform that this machine lacks, the mesh knows `platform` and `device_kind` alone.
    """
    here: Any = jax.config.jax_default_device
    if not hasattr(here, "platform"):  # none, or a platform's name
        here = jax.devices(here)[0] if here else jax.devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    there = None if mesh.empty else mesh.abstract_device
    if there is None or there.platform == here.platform:
        return here
    try:
        return jax.devices(there.platform)[0]
    except RuntimeError:  # this machine has none
        return there


def gpu_obstacle(device: Any) -> str:
    """Why a device cannot run a kernel for NVIDIA GPUs at all; empty if it may."""
    if device.platform not in ("gpu", "cuda"):
        return f"{device.platform} is no NVIDIA GPU"
    if not hasattr(device, "compute_capability"):
        return f"the compute capability of {device.device_kind} is not known here"
    return ""
