"""Widening MLPs with inert units, so that a model with fewer K/V has its source's parameter count.

MLKV section 4.2 upsizes "the intermediate layer of the MLPs" for a fair comparison. New units have
random input weights and zero output rows: the model computes what it did, and their output rows
get gradients from the first step on. (Units whose inputs were zero too would never learn.)
"""

import dataclasses
from typing import Any

import numpy as np

from cla_jax.configs import ModelConfig
from cla_jax.registry import match_parameters, model, model_names

__all__ = ["matched_config", "widen"]

# What an imported model may have otherwise and still be the registry's architecture.
_NOT_SIZES = ("name", "sequence_length", "init_std", "norm_epsilon", "rope_theta", "rotary_dim")


def matched_config(config: ModelConfig, source: ModelConfig) -> ModelConfig:
    """`config` with the MLP width that gives it the parameter count of `source`.

    For the models of MLKV Table 2 that is the width that the paper's exact counts need; for all
    others the width whose count comes nearest.

    Args:
        config: the converted model, its MLPs still as wide as the source's.
        source: the model that it was converted from.
    """
    for name in model_names():
        scale, _, variant = name.partition("/")
        if not scale.startswith("pythia-"):
            continue  # CLA's models are not widened: their widths match nothing
        known = model(name)
        unshared = f"{scale}/MHA"
        if (
            variant != "MHA"
            and unshared in model_names()
            and _sizes(model(unshared)) == _sizes(source)
            and _sizes(known, ffn_dim=config.ffn_dim) == _sizes(config)
        ):
            return dataclasses.replace(config, ffn_dim=known.ffn_dim)
    return match_parameters(config, source.parameters)


def widen(
    layer: dict[str, Any], config: ModelConfig, ffn_dim: int, random: np.random.Generator
) -> dict[str, Any]:
    """One layer's parameters with MLPs of `ffn_dim` units; the function they compute is the same.

    Args:
        layer: parameters of a layer, `ffn.up` `[D, C, F]` and `ffn.down` `[F, D]`.
        config: of the layer as it is.
        ffn_dim: the new width.
        random: draws the new units' input weights, normal with `config.init_std`.

    Raises:
        ValueError: `ffn_dim` is below the layer's width.
    """
    extra = ffn_dim - config.ffn_dim
    if extra < 0:
        raise ValueError(f"ffn_dim={ffn_dim} is below the source's width {config.ffn_dim}")
    up, down = dict(layer["ffn"]["up"]), dict(layer["ffn"]["down"])
    kernel = np.asarray(up["kernel"])
    new = random.normal(0.0, config.init_std, (*kernel.shape[:-1], extra)).astype(kernel.dtype)
    up["kernel"] = np.concatenate((kernel, new), axis=-1)
    if config.use_bias:
        bias = np.asarray(up["bias"])
        up["bias"] = np.concatenate((bias, np.zeros((bias.shape[0], extra), bias.dtype)), axis=-1)
    rows = np.asarray(down["kernel"])
    down["kernel"] = np.concatenate((rows, np.zeros((extra, rows.shape[1]), rows.dtype)))
    return {**layer, "ffn": {"up": up, "down": down}}


def _sizes(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(config, **changes))
    return {k: v for k, v in values.items() if k not in _NOT_SIZES}
