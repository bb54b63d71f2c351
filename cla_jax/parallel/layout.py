"""A mesh with the rules of one model: where its arrays lie, and the context that its code runs in.

`None` stands for no mesh everywhere, and changes nothing.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cla_jax._mesh import MeshConfig
from cla_jax.configs import ModelConfig, TrainConfig
from cla_jax.models.sharding import use_rules
from cla_jax.parallel.mesh import make_mesh, resolve_mesh
from cla_jax.parallel.pipeline import Schedule
from cla_jax.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a model's arrays lie.

    Attributes:
        mesh: the devices.
        rules: of the model.
        mesh_config: the mesh's sizes.
    """

    mesh: Mesh
    rules: Rules
    mesh_config: MeshConfig

    @classmethod
    def on(
        cls, mesh: MeshConfig, model: ModelConfig, devices: Sequence[Any] | None = None
    ) -> "Layout":
        """A model's layout on a mesh of these devices (default all), of one device too.

        Raises:
            ValueError: sizes that do not fit the devices or the model; names those that do.
        """
        resolved = resolve_mesh(mesh, devices)
        return cls(make_mesh(resolved, devices), Rules.of(model, resolved), resolved)

    def shards(self, axis: str) -> int:
        """Parts that a logical axis is split into."""
        return math.prod(self.mesh_config.sizes[name] for name in self.rules.mesh_axes(axis))

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of(self, axes: Any) -> Any:
        """The shardings of arrays whose logical axes are given.

        Args:
            axes: a pytree of tuples of names, such as `Model.axes`.
        """
        return jax.tree.map(
            lambda names: NamedSharding(self.mesh, self.rules.spec(*names)),
            axes,
            is_leaf=_is_axes,
        )

    def rows(self, batch: int) -> list[int]:
        """Which rows of a batch of so many this process's devices hold: those that it reads."""
        parts = self.of(("batch",)).addressable_devices_indices_map((batch,))
        return sorted({row for (part,) in parts.values() for row in range(batch)[part]})

    def batch(self, arrays: dict[str, Any], batch: int | None = None) -> dict[str, jax.Array]:
        """A batch on the devices, split by rows.

        Args:
            arrays: `rows(batch)` of `[B, ...]`, on the host.
            batch: `B`; default: the arrays hold all rows.
        """
        split = self.of(("batch",))

        def place(array: Any) -> jax.Array:
            rows = len(array) if batch is None else batch
            held = range(rows) if batch is None else self.rows(rows)
            at = {row: position for position, row in enumerate(held)}

            def shard(index: Any) -> Any:
                return array[[at[row] for row in range(rows)[index[0]]]]

            return jax.make_array_from_callback((rows, *array.shape[1:]), split, shard)

        return {name: place(array) for name, array in arrays.items()}


def make_layout(
    mesh: MeshConfig, model: ModelConfig, devices: Sequence[Any] | None = None
) -> Layout | None:
    """The layout of a model on a mesh; None for a mesh of one device, which is none.

    Raises:
        ValueError: sizes that do not fit the devices or the model; names those that do.
    """
    layout = Layout.on(mesh, model, devices)
    return None if layout.mesh_config.devices == 1 else layout


def check_mesh(
    model: ModelConfig, training: TrainConfig, devices: Sequence[Any] | None = None
) -> Schedule:
    """Whether a model can be trained on the mesh that its recipe names, and how its rows go there.

    Args:
        model: its sizes.
        training: the recipe.
        devices: of the mesh; default all that there are.

    Raises:
        ValueError: sizes that do not fit devices, model or (micro-)batch, microbatches of a
            pipeline that do not divide a pass, that no stage is there for, or that nobody named and
            are fewer than the stages; names those that work.
    """
    layout = Layout.on(training.mesh, model, devices)
    return Schedule.of(training, layout.mesh_config)


def check_inference_mesh(mesh: MeshConfig) -> None:
    """Whether a model can be run on a mesh, whatever it was trained on.

    Raises:
        ValueError: it has stages, which nothing but training has a use for.
    """
    if mesh.stage != 1:
        raise ValueError(
            f"mesh {mesh}: stages are for training; a model is run on data, fsdp and tensor, "
            "whatever it was trained on"
        )


@contextlib.contextmanager
def in_force(layout: Layout | None) -> Iterator[None]:
    """Code that is traced inside is laid out so; nothing for None."""
    if layout is None:
        yield
        return
    with jax.set_mesh(layout.mesh), use_rules(layout.rules.pairs):
        yield


def _is_axes(tree: Any) -> bool:
    return isinstance(tree, tuple) and all(a is None or isinstance(a, str) for a in tree)
