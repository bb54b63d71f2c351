"""The papers' models, by the papers' names.

`model("1B/H128-MQA-CLA2")` is a row of CLA Table 1, `model("pythia-160m/MLKV-6")` one of MLKV
Table 2. A name is `scale/variant`. Beside the papers' own scales there are two for small machines:
`mini`, the 1B family at a quarter of its width, and `tiny`, six layers over bytes; `pythia-mini`
and `pythia-tiny` are Pythia-160M with its layers and heads at less width.
"""

import dataclasses
import difflib
import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

from cla_jax.configs import ModelConfig
from cla_jax.sharing import KVSharing

__all__ = ["match_models", "match_parameters", "model", "model_names"]

# The GPT-NeoX tokenizer's 50,277 ids, padded as GPT-NeoX-20B pads them. The CLA paper names the
# tokenizer, not the padded size.
_CLA_VOCAB = 50_432
_PYTHIA_VOCAB = 50_304
_BYTE_VOCAB = 257  # 256 bytes and the token that ends a document

# CLA Table 1, then the models of Tables 5 and 7: (head dim, KV heads or None for MHA, sharing).
_DESIGN_SPACE: dict[str, tuple[int, int | None, str]] = {
    "H128-MHA": (128, None, "none"),
    "H128-GQA4": (128, 4, "none"),
    "H128-GQA2": (128, 2, "none"),
    "H128-MQA": (128, 1, "none"),
    "H64-MQA": (64, 1, "none"),
    "H46-MQA": (46, 1, "none"),
    "H32-MQA": (32, 1, "none"),
    "H512-MQA-CLA2": (512, 1, "CLA2"),
    "H256-MQA-CLA2": (256, 1, "CLA2"),
    "H128-MQA-CLA2": (128, 1, "CLA2"),
    "H90-MQA-CLA2": (90, 1, "CLA2"),
    "H64-MQA-CLA2": (64, 1, "CLA2"),
    "H256-GQA4-CLA2": (256, 4, "CLA2"),
    "H128-GQA4-CLA2": (128, 4, "CLA2"),
    "H128-GQA2-CLA2": (128, 2, "CLA2"),
    "H128-MQA-CLA3": (128, 1, "CLA3"),
    "H128-MQA-CLA4": (128, 1, "CLA4"),
    "H128-MQA-CLA2-KeepEnds": (128, 1, "CLA2-KeepEnds"),
    "H128-MQA-CLA2-DenseFront": (128, 1, "CLA2-DenseFront"),
    "H128-MQA-CLA2-DenseBack": (128, 1, "CLA2-DenseBack"),
}
_CLA_3B = ("H128-MQA", "H128-MQA-CLA2", "H64-MQA", "H64-MQA-CLA2", "H32-MQA")
# Query heads are d_model / head dim (CLA section 3.1), except where Table 1 prints another number.
_QUERY_HEADS_1B = {46: 45, 90: 22}
# `mini` divides head sizes by four; rotary sizes are even, so H46 and H90 are rounded.
_HEAD_DIM_MINI = {46: 12, 90: 22}

_TINY: dict[str, tuple[int, str]] = {
    "MHA": (4, "none"),
    "MQA": (1, "none"),
    "MQA-CLA2": (1, "CLA2"),
    "MQA-CLA3": (1, "CLA3"),
}

# MLKV Table 2: (KV layers, KV heads per layer, MLP width). The paper does not print the widths;
# these alone give its parameter counts.
_PYTHIA_160M: dict[str, tuple[int, int, int]] = {
    "MHA": (12, 12, 3072),
    "GQA-48": (12, 4, 3584),
    "MLKV-48": (4, 12, 3584),
    "MQA-12": (12, 1, 3777),
    "MLKV-12": (4, 3, 3777),
    "MLKV-6": (6, 1, 3809),
    "MLKV-4": (4, 1, 3819),
    "MLKV-2": (2, 1, 3830),
    "MLKV-1": (1, 1, 3835),
}
# MLKV Table 4: (KV layers, KV heads per layer). No widths and no counts are printed: ours are the
# widths whose counts come nearest to the baseline's.
_PYTHIA_410M: dict[str, tuple[int, int]] = {
    "MHA": (24, 16),
    "MQA-24": (24, 1),
    "MLKV-12": (12, 1),
    "MLKV-8": (8, 1),
}


def model_names() -> tuple[str, ...]:
    """Every name that `model` takes: papers' scales first, in the papers' order."""
    return (
        *(f"1B/{v}" for v in _DESIGN_SPACE),
        *(f"3B/{v}" for v in _CLA_3B),
        *(f"pythia-160m/{v}" for v in _PYTHIA_160M),
        *(f"pythia-410m/{v}" for v in _PYTHIA_410M),
        *(f"mini/{v}" for v in _DESIGN_SPACE),
        *(f"pythia-mini/{v}" for v in _PYTHIA_160M),
        *(f"tiny/{v}" for v in _TINY),
        *(f"pythia-tiny/{v}" for v in _PYTHIA_160M),
    )


@functools.cache
def model(name: str) -> ModelConfig:
    """The configuration of a model by its name.

    Raises:
        ValueError: unknown name; names the nearest, and for `tiny` its whole short list.

    Examples:
        >>> model("1B/H128-MQA-CLA2").kv_bytes_per_token
        5120
    """
    if name not in model_names():
        raise ValueError(_unknown(name))
    scale, variant = name.split("/")
    if scale == "1B":
        return _cla(name, d_model=2048, ffn_dim=5472, num_layers=20)
    if scale == "3B":
        return _cla(name, d_model=3072, ffn_dim=8192, num_layers=32)
    if scale == "mini":
        return _cla(name, d_model=512, ffn_dim=1368, num_layers=20)
    if scale == "tiny":
        kv_heads, sharing = _TINY[variant]
        return _llama(
            name, d_model=128, ffn_dim=344, query_heads=4, kv_heads=kv_heads, head_dim=32,
            vocab_size=_BYTE_VOCAB, sequence_length=256, sharing=KVSharing.from_name(sharing, 6),
        )  # fmt: skip
    if scale == "pythia-160m":
        kv_layers, kv_heads, width = _PYTHIA_160M[variant]
        return _gpt_neox(name, 768, 12, 12, kv_layers, kv_heads, width)
    if scale == "pythia-mini":
        kv_layers, kv_heads, _ = _PYTHIA_160M[variant]
        return _same_size(_gpt_neox(name, 512, 12, 12, kv_layers, kv_heads, 2048))
    if scale == "pythia-tiny":
        kv_layers, kv_heads, _ = _PYTHIA_160M[variant]
        return _same_size(_gpt_neox(name, 96, 12, 12, kv_layers, kv_heads, 384, _BYTE_VOCAB))
    kv_layers, kv_heads = _PYTHIA_410M[variant]
    return _same_size(_gpt_neox(name, 1024, 24, 16, kv_layers, kv_heads, 4096))


def match_models(scale: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """The models of a scale that any of some names or globs names, in the registry's order.

    The scale may be left out or not: `H128-*`, `1B/H128-*`.

    Raises:
        ValueError: an unknown scale, or a pattern that names no model; names the nearest.

    Examples:
        >>> match_models("tiny", ["MQA-CLA?"])
        ('tiny/MQA-CLA2', 'tiny/MQA-CLA3')
    """
    scales = dict.fromkeys(name.partition("/")[0] for name in model_names())
    if scale not in scales:
        near = difflib.get_close_matches(scale, scales, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown scale {scale!r}; the nearest is {near!r}")
    names = [name for name in model_names() if name.startswith(scale + "/")]
    found = set[str]()
    for pattern in patterns:
        full = pattern if "/" in pattern else f"{scale}/{pattern}"
        matches = [name for name in names if fnmatch.fnmatchcase(name, full)]
        if not matches:
            near = difflib.get_close_matches(full, names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{pattern!r} names no model at scale {scale}; nearest: {near!r}. The models at "
                f"this scale are {', '.join(name.partition('/')[2] for name in names)}"
            )
        found.update(matches)
    return tuple(name for name in names if name in found)


def _cla(name: str, d_model: int, ffn_dim: int, num_layers: int) -> ModelConfig:
    scale, variant = name.split("/")
    head_dim, kv_heads, pattern = _DESIGN_SPACE[variant]
    if scale == "3B":
        query_heads = d_model // head_dim
    else:
        query_heads = _QUERY_HEADS_1B.get(head_dim, 2048 // head_dim)
    if scale == "mini":
        head_dim = _HEAD_DIM_MINI.get(head_dim, head_dim // 4)
    return _llama(
        name, d_model=d_model, ffn_dim=ffn_dim, query_heads=query_heads,
        kv_heads=kv_heads or query_heads, head_dim=head_dim, vocab_size=_CLA_VOCAB,
        sequence_length=2048, sharing=KVSharing.from_name(pattern, num_layers),
    )  # fmt: skip


def _llama(name: str, *, sharing: KVSharing, **sizes: Any) -> ModelConfig:
    shared = sharing.kv_layers < sharing.num_layers
    return ModelConfig(name=name, sharing=sharing, separate_kv_norm=shared, **sizes)


def _gpt_neox(
    name: str,
    d_model: int,
    num_layers: int,
    heads: int,
    kv_layers: int,
    kv_heads: int,
    ffn_dim: int,
    vocab_size: int = _PYTHIA_VOCAB,
) -> ModelConfig:
    head_dim = d_model // heads // 8 * 8  # a multiple of what fused attention takes
    return ModelConfig(
        name=name,
        sharing=KVSharing.mlkv(num_layers, kv_layers),
        d_model=d_model,
        ffn_dim=ffn_dim,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        sequence_length=2048 if vocab_size == _PYTHIA_VOCAB else 256,
        rms_norm=False,
        swiglu=False,
        parallel_residual=True,
        use_bias=True,
        rotary_dim=head_dim // 4 // 2 * 2,
        init_std=0.02,
    )


def _same_size(config: ModelConfig) -> ModelConfig:
    """Widen the MLPs until the parameter count is nearest the unshared model's (MLKV section 4.2).

    `config.ffn_dim` is the unshared model's width.
    """
    unshared = dataclasses.replace(
        config,
        sharing=KVSharing.none(config.num_layers),
        kv_heads=config.query_heads,
    )
    return match_parameters(config, unshared.parameters)


def match_parameters(config: ModelConfig, parameters: int) -> ModelConfig:
    """The configuration with the MLP width whose parameter count comes nearest to a given one.

    MLKV section 4.2 widens the MLPs of its variants so; it prints no widths (`_PYTHIA_160M` has
    those that give its counts).

    Raises:
        ValueError: `parameters` is so small that no MLP is left.
    """
    wider = dataclasses.replace(config, ffn_dim=config.ffn_dim + 1)
    extra = round((parameters - config.parameters) / (wider.parameters - config.parameters))
    return dataclasses.replace(config, ffn_dim=config.ffn_dim + extra)


def _unknown(name: str) -> str:
    names = model_names()
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    scale, _, _ = name.partition("/")
    if scale == "tiny":
        only = ", ".join(n for n in names if n.startswith("tiny/"))
        return f"unknown model {name!r}; the models at this scale are {only}; nearest: {near[0]!r}"
    return (
        f"unknown model {name!r}; nearest: {', '.join(map(repr, near))} "
        "(`cla-jax models` lists them all)"
    )
