"""Decoders whose layers share keys and values."""

from cla_jax.models.attention import (
    KV,
    Attend,
    KVProjection,
    LayerContext,
    QueryAttention,
    attend,
    attend_behind,
)
from cla_jax.models.decoder import Decoder, UnstackedDecoder
from cla_jax.models.layers import DecoderLayer
from cla_jax.models.pipeline import pipeline_layers
from cla_jax.models.stack import scan_layers, stack_layers, unstack_layer

__all__ = [
    "KV",
    "Attend",
    "Decoder",
    "DecoderLayer",
    "KVProjection",
    "LayerContext",
    "QueryAttention",
    "UnstackedDecoder",
    "attend",
    "attend_behind",
    "pipeline_layers",
    "scan_layers",
    "stack_layers",
    "unstack_layer",
]
