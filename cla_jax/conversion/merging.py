"""Merging KV heads: those of a group within a layer and those of the layers that share.

MLKV section 4.2 averages the KV heads of a group within a layer and those of the layers after it
that have none of their own, as GQA (Ainslie et al. 2023) does within a layer. What is merged are
projections, so keys are merged before any rotation.

What happens to the rest of an owner's K/V path:

* its K and V **biases** are merged exactly as the kernels are: they are part of the projection;
* its **norm** stays the owner's. GPT-NeoX and Llama have one norm before Q, K and V, which the
  owner's queries still need. Folding each layer's norm scale into its kernel before averaging, and
  dividing the owner's out again, would merge maps from the normalised residual instead of weights;
  the paper averages weights, and a scale near zero makes that division ill-conditioned.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cla_jax.configs import nearest_divisor
from cla_jax.sharing import KVSharing

__all__ = ["Merge", "first", "mean", "merge_kv_heads"]

type Merge = Callable[[np.ndarray], np.ndarray]
"""`[M, ...] -> [...]`: makes one head of the `M` that are merged, the owner's own first."""


def mean(heads: np.ndarray) -> np.ndarray:
    """The true mean of all heads, summed in float64 and rounded once to their dtype."""
    return heads.mean(axis=0, dtype=np.float64).astype(heads.dtype)


def first(heads: np.ndarray) -> np.ndarray:
    """The first head of the owner's group, as it is: what GQA's authors compare the mean with."""
    return heads[0]


def merge_kv_heads(
    layers: Sequence[np.ndarray], sharing: KVSharing, kv_heads: int, merge: Merge = mean
) -> dict[int, np.ndarray]:
    """Merge the KV heads of unshared layers into those of a sharing map's owners.

    Merged head `k` of an owner is made from heads `k r` to `k r + r - 1`, `r = K / kv_heads`, of
    every layer that reads it: query head `n` reads KV head `n // (N / K)`, so the query heads of a
    merged head are those that read its parts.

    Args:
        layers: of each layer, an array `[..., K, H]`: kernels `[D, 2, K, H]`, biases `[2, K, H]`.
        sharing: who owns and who reads.
        kv_heads: KV heads of an owner; divides `K`.
        merge: makes one head of many.

    Returns:
        `[..., kv_heads, H]` by owner layer.

    Raises:
        ValueError: as many layers as the map has were not given, or `kv_heads` does not divide.

    Examples:
        >>> layers = [np.full((1, 2, 1), i) for i in (1.0, 4.0)]
        >>> merge_kv_heads(layers, KVSharing((0, 0)), kv_heads=1)[0].item()
        2.5
    """
    if len(layers) != sharing.num_layers:
        raise ValueError(f"{len(layers)} layers were given; the map has {sharing.num_layers}")
    heads = layers[0].shape[-2]
    check_kv_heads(heads, kv_heads)
    merged: dict[int, np.ndarray] = {}
    for owner in sharing.owner_layers:
        group = np.stack([a for a, o in zip(layers, sharing.owners, strict=True) if o == owner])
        # [layers, ..., K, H] -> [layers * r, ..., kv_heads, H], the owner's first head in front
        *lead, head_dim = group.shape[:-2] + group.shape[-1:]
        group = group.reshape(*lead, kv_heads, heads // kv_heads, head_dim)
        group = np.moveaxis(group, -2, 1)
        merged[owner] = merge(group.reshape(-1, *group.shape[2:]))
    return merged


def check_kv_heads(source: int, wanted: int) -> None:
    """Whether `source` KV heads can be merged into `wanted` equal groups.

    Raises:
        ValueError: they cannot; names the nearest number that works.
    """
    if wanted < 1 or source % wanted:
        raise ValueError(
            f"kv_heads={wanted} does not divide the {source} KV heads of the source: the nearest "
            f"that does is {nearest_divisor(source, wanted)}"
        )
