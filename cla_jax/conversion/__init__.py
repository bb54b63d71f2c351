"""Hugging Face checkpoints in and out, and conversion of trained models to any sharing map."""

from cla_jax.conversion.conversion import convert, converted_config, parse_sharing
from cla_jax.conversion.hub import huggingface_directory, source_name
from cla_jax.conversion.huggingface import (
    HuggingFaceCheckpoint,
    load_huggingface,
    save_huggingface,
)
from cla_jax.conversion.merging import first, mean, merge_kv_heads

__all__ = [
    "HuggingFaceCheckpoint",
    "convert",
    "converted_config",
    "first",
    "huggingface_directory",
    "load_huggingface",
    "mean",
    "merge_kv_heads",
    "parse_sharing",
    "save_huggingface",
    "source_name",
]
