"""Serving: one cache, forward passes over it, generation, and what fits into memory."""

from cla_jax.inference.cache import KVCache
from cla_jax.inference.entries import CacheEntry, extend_layers
from cla_jax.inference.forward import extend, prefill
from cla_jax.inference.generation import Continuation, GenerateConfig, check_prompts, generate
from cla_jax.inference.inspection import attention_weights
from cla_jax.inference.sampling import Sampling

__all__ = [
    "CacheEntry",
    "Continuation",
    "GenerateConfig",
    "KVCache",
    "Sampling",
    "attention_weights",
    "check_prompts",
    "extend",
    "extend_layers",
    "generate",
    "prefill",
]
