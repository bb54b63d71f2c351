"""Cross-layer KV sharing in JAX: transformers whose layers share keys and values.

The reference implementation of Cross-Layer Attention (CLA, Brandon et al. 2024) and Multi-Layer
Key-Value sharing (MLKV, Zuhri et al. 2024).

Examples:
    >>> import cla_jax
    >>> cla_jax.KVSharing.cla(num_layers=4, factor=2).owners
    (0, 0, 2, 2)
    >>> cla_jax.model("1B/H128-MQA-CLA2").kv_bytes_per_token
    5120
"""

import importlib
from typing import TYPE_CHECKING, Any

from cla_jax.configs import AttentionConfig, ExecutionConfig, ModelConfig
from cla_jax.registry import model, model_names
from cla_jax.sharing import KVSharing

if TYPE_CHECKING:
    from cla_jax.inference import KVCache, extend_layers
    from cla_jax.loading import TextModel, load
    from cla_jax.models import (
        KV,
        Decoder,
        KVProjection,
        QueryAttention,
        scan_layers,
        stack_layers,
    )

__all__ = [
    "AttentionConfig",
    "Decoder",
    "ExecutionConfig",
    "KV",
    "KVCache",
    "KVProjection",
    "KVSharing",
    "ModelConfig",
    "QueryAttention",
    "TextModel",
    "extend_layers",
    "load",
    "model",
    "model_names",
    "scan_layers",
    "stack_layers",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Arrays only when asked for: the sharing maps and the papers' figures need no JAX.
    if name in __all__:
        rooms = {"TextModel": "loading", "load": "loading", "KVCache": "inference",
                 "extend_layers": "inference"}  # fmt: skip
        return getattr(importlib.import_module(f"cla_jax.{rooms.get(name, 'models')}"), name)
    raise AttributeError(f"module 'cla_jax' has no attribute {name!r}")
