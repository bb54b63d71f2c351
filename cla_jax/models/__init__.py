"""Decoders whose layers share keys and values."""

from cla_jax.models.attention import KV, KVProjection, LayerContext, QueryAttention, attend
from cla_jax.models.decoder import Decoder
from cla_jax.models.layers import DecoderLayer
from cla_jax.models.stack import scan_layers, stack_layers, unstack_layer

__all__ = [
    "KV",
    "Decoder",
    "DecoderLayer",
    "KVProjection",
    "LayerContext",
    "QueryAttention",
    "attend",
    "scan_layers",
    "stack_layers",
    "unstack_layer",
]
