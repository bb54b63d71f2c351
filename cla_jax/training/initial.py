"""Parameters that a run begins with instead of random ones, such as those of a converted model."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.training.step import Params

__all__ = ["InitialParams", "check_params", "params_fingerprint"]


@dataclasses.dataclass(frozen=True, eq=False)
class InitialParams:
    """Parameters to begin with. They are made when they are needed and not kept: a sweep has many.

    Attributes:
        make: gives the whole tree, arrays of any floating dtype; the same values at every call.
    """

    make: Callable[[], Params]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and float32 values; a run belongs to those it was begun with."""
        return params_fingerprint(self.make())

    def on_device(self, shapes: Params, name: str, shardings: Params | None = None) -> Params:
        """As float32 arrays of their own: a training step gives its state away.

        Args:
            shapes: of the model's parameters.
            name: of the model.
            shardings: where they lie on a mesh; default the first device.

        Raises:
            ValueError: they are not this model's; names the first that is not.
        """
        params = self.make()
        check_params(params, shapes, name)
        if shardings is not None:
            return jax.tree.map(
                lambda a, s: jax.device_put(np.asarray(a, np.float32), s, may_alias=False),
                params,
                shardings,
            )
        return jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), params)


def params_fingerprint(params: Params) -> str:
    """SHA-256 of a parameter tree: names, shapes, values as float32; whatever the dtype."""
    digest = hashlib.sha256()
    for name, leaf in sorted(_leaves(params).items()):
        values = np.ascontiguousarray(np.asarray(leaf, np.float32))
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def check_params(params: Params, shapes: Params, name: str) -> None:
    """Whether a parameter tree has a model's names and shapes.

    Args:
        params: the tree.
        shapes: the model's parameters, or anything with their shapes.
        name: of the model.

    Raises:
        ValueError: a parameter is missing, not expected, or of another shape; names it.
    """
    found, expected = _leaves(params), _leaves(shapes)
    for at in sorted(expected.keys() | found.keys()):
        if at not in found:
            raise ValueError(f"{name}: parameter {at} is missing")
        if at not in expected:
            raise ValueError(f"{name}: parameter {at} does not belong to the model")
        if found[at].shape != expected[at].shape:
            raise ValueError(
                f"{name}: parameter {at} has the shape {found[at].shape}; expected "
                f"{expected[at].shape}"
            )


def _leaves(tree: Params) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
