"""Tiny models and meshes of eight devices, which the files of this folder share."""

import functools
from typing import Any

from cla_jax.configs import ExecutionConfig, MeshConfig, ModelConfig
from cla_jax.parallel import Layout, make_layout
from cla_jax.sharing import KVSharing
from cla_jax.training import Model

# Without stages, for which see PIPELINED.
MESHES = ("data=8", "fsdp=8", "tensor=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")
PATTERNS = {
    "MQA": (KVSharing.none(2), 1),
    "GQA4": (KVSharing.none(2), 4),
    "CLA2": (KVSharing.cla(2, 2), 1),
    "CLA4": (KVSharing.cla(4, 4), 2),
    "KeepEnds": (KVSharing.keep_ends(4), 1),
}
# Deep enough for two stages.
PIPELINED = {
    "deep MQA": (KVSharing.none(4), 1),
    "deep GQA4": (KVSharing.none(4), 4),
    "deep CLA2": (KVSharing.cla(4, 2), 1),
    "deep CLA4": (KVSharing.cla(8, 4), 2),
    "deep KeepEnds": (KVSharing.keep_ends(6), 1),
}
LONG = {
    # Three stages, which divide neither the usual batches nor vocabularies.
    "long KeepEnds": (KVSharing.keep_ends(8), 1),
    # Two sharing groups in each of two stages.
    "long CLA2": (KVSharing.cla(8, 2), 1),
}
FLOAT32 = ExecutionConfig(compute_dtype="float32")


def config_of(pattern: str, tied: bool = False) -> ModelConfig:
    sharing, kv_heads = (PATTERNS | PIPELINED | LONG)[pattern]
    return ModelConfig(
        name=pattern, sharing=sharing, d_model=32, ffn_dim=48, query_heads=8, kv_heads=kv_heads,
        head_dim=4, vocab_size=64, sequence_length=128, separate_kv_norm=True, init_std=0.2,
        tied_embeddings=tied,
    )  # fmt: skip


@functools.cache
def model_of(pattern: str, loss_chunk: int = 0, tied: bool = False) -> Model:
    return Model(
        config_of(pattern, tied), ExecutionConfig(compute_dtype="float32", loss_chunk=loss_chunk)
    )


@functools.cache
def params_of(config: ModelConfig) -> Any:
    """A model's first parameters, whose making is compiled once. They are not to be donated."""
    return Model(config, FLOAT32).init(0)


def layout_of(pattern: str, mesh: str, tied: bool = False) -> Layout | None:
    return make_layout(MeshConfig.parse(mesh), config_of(pattern, tied))
