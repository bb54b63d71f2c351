"""Many devices: meshes, and the rules that lay logical axes out over them."""

from cla_jax._mesh import MeshConfig
from cla_jax.parallel.layout import (
    Layout,
    check_inference_mesh,
    check_mesh,
    in_force,
    make_layout,
)
from cla_jax.parallel.mesh import make_mesh
from cla_jax.parallel.pipeline import PipelineIdeal, Schedule, pipeline_ideal
from cla_jax.parallel.processes import ProcessConfig, join
from cla_jax.parallel.rules import Rules

__all__ = [
    "Layout",
    "MeshConfig",
    "PipelineIdeal",
    "ProcessConfig",
    "Rules",
    "Schedule",
    "check_inference_mesh",
    "check_mesh",
    "in_force",
    "join",
    "make_layout",
    "make_mesh",
    "pipeline_ideal",
]
