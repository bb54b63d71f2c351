"""`convert`: a trained model to any sharing map, to be trained a little more (MLKV section 4)."""

import dataclasses

import numpy as np

from cla_jax.configs import ModelConfig
from cla_jax.conversion.huggingface import HuggingFaceCheckpoint
from cla_jax.conversion.merging import Merge, check_kv_heads, mean, merge_kv_heads
from cla_jax.conversion.parameters import split_layers, stack_split_layers
from cla_jax.conversion.widening import matched_config, widen
from cla_jax.sharing import KVSharing
from cla_jax.training.step import Params

__all__ = ["convert", "converted_config", "parse_sharing"]


def parse_sharing(
    name: str, config: ModelConfig, kv_heads: int | None = None
) -> tuple[KVSharing, int]:
    """A sharing map by its name, and the KV heads of a layer, for a model to be converted.

    Args:
        name: as `KVSharing.from_name` takes it.
        config: of the source.
        kv_heads: of an owner. None: the source's; 1 for `MLKV-n`, which counts KV heads over all
            layers.

    Raises:
        ValueError: an unknown name, a map that does not fit the depth, or heads that do not divide.
    """
    per_layer = 1 if name.strip().lower().startswith("mlkv") else config.kv_heads
    heads = per_layer if kv_heads is None else kv_heads
    check_kv_heads(config.kv_heads, heads)
    try:
        return KVSharing.from_name(name, config.num_layers, heads), heads
    except ValueError as error:
        if kv_heads is None and per_layer != config.kv_heads:
            raise ValueError(f"{error}; --kv-heads says how many a layer has") from None
        raise


def converted_config(
    source: ModelConfig, sharing: KVSharing, kv_heads: int | None = None, match_params: bool = False
) -> ModelConfig:
    """The architecture that `convert` makes; arguments as there.

    Raises:
        ValueError: as `convert`.
    """
    if sharing.num_layers != source.num_layers:
        raise ValueError(
            f"the sharing map has {sharing.num_layers} layers; {source.name} has "
            f"{source.num_layers}"
        )
    if source.kv_layers < source.num_layers and sharing != source.sharing:
        raise ValueError(
            f"{source.name} shares K/V across layers already: expected a source that shares none, "
            f"or the same map, owners={','.join(map(str, source.sharing.owners))}"
        )
    heads = source.kv_heads if kv_heads is None else kv_heads
    check_kv_heads(source.kv_heads, heads)
    config = dataclasses.replace(source, sharing=sharing, kv_heads=heads)
    return matched_config(config, source) if match_params else config


def convert(
    checkpoint: HuggingFaceCheckpoint,
    sharing: KVSharing,
    kv_heads: int | None = None,
    merge: Merge = mean,
    match_params: bool = False,
    seed: int = 0,
) -> HuggingFaceCheckpoint:
    """Convert a model to a sharing map by merging its KV heads (MLKV section 4.2).

    Without a sharing map's effect (`KVSharing.none`, all KV heads) the logits are unchanged, and
    `match_params` alone leaves them unchanged too. Dtypes are kept.

    Args:
        checkpoint: the trained model.
        sharing: the new map.
        kv_heads: KV heads of an owner, a divisor of the source's; None: as many.
        merge: `mean` or `first`, of all heads that become one.
        match_params: widen the MLPs by inert units to the source's parameter count.
        seed: of the inert units' input weights; 0 or more.

    Returns:
        The converted model; `checkpoint` is not changed.

    Raises:
        ValueError: the map has another depth, the source shares K/V otherwise, `kv_heads` does not
            divide, or the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    source = checkpoint.config
    config = converted_config(source, sharing, kv_heads, match_params)
    layers = split_layers(checkpoint.params, source.sharing)
    # Of a source that shares, an owner's heads are merged within the layer alone.
    reads = KVSharing.none(source.num_layers) if source.sharing == sharing else sharing
    owners = source.sharing.owners
    merged = {
        name: merge_kv_heads(
            [np.asarray(layers[owner]["kv_projection"]["projection"][name]) for owner in owners],
            reads,
            config.kv_heads,
            merge,
        )
        for name in layers[0]["kv_projection"]["projection"]
    }
    random = np.random.default_rng(seed)
    new_layers = [
        _with_kv(layer, {name: heads[i] for name, heads in merged.items()})
        if sharing.owns(i)
        else _without_kv(layer)
        for i, layer in enumerate(layers)
    ]
    if config.ffn_dim != source.ffn_dim:
        new_layers = [widen(layer, source, config.ffn_dim, random) for layer in new_layers]
    params: Params = {**checkpoint.params, "layers": stack_split_layers(new_layers, sharing)}
    buffers = checkpoint.buffers if config == source else {}
    return dataclasses.replace(checkpoint, config=config, params=params, buffers=buffers)


def _with_kv(layer: Params, projection: dict[str, np.ndarray]) -> Params:
    return {**layer, "kv_projection": {"projection": projection}}


def _without_kv(layer: Params) -> Params:
    return {k: v for k, v in layer.items() if k not in ("kv_projection", "kv_norm")}
