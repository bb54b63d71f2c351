"""Which Hugging Face tensor holds which part of our parameters, for the two families.

A `TensorSpec` reads in both directions. Models that `transformers` can express have its names and
layouts. Others (K/V shared across layers, a K/V norm of its own, GPT-NeoX with fewer KV heads than
query heads) have ours: the same names, with tensors that only owners hold; GPT-NeoX's fused
`query_key_value` then falls apart into `query`, `key` and `value`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cla_jax.configs import ModelConfig

__all__ = ["Part", "TensorSpec", "family", "is_native", "tensor_specs"]

LLAMA, GPT_NEOX = "llama", "gpt_neox"

# The switches that make a ModelConfig one of a family.
_SWITCHES: dict[str, dict[str, bool]] = {
    LLAMA: {"rms_norm": True, "swiglu": True, "parallel_residual": False, "use_bias": False},
    GPT_NEOX: {"rms_norm": False, "swiglu": False, "use_bias": True},
}


class Part(NamedTuple):
    """A block of a stored tensor and the block of a parameter that it is.

    Attributes:
        path: of the parameter, in the tree (`layer` None) or in a layer's own tree.
        block: of the parameter, basic indexing.
        stored: block of the stored tensor, split into axes, basic indexing.
        axes: permutation from the stored block's axes to the parameter's.
    """

    path: tuple[str, ...]
    axes: tuple[int, ...]
    block: tuple[Any, ...] = ()
    stored: tuple[Any, ...] = ()


class TensorSpec(NamedTuple):
    """A tensor as Hugging Face stores it.

    Attributes:
        name: in the file.
        split: its axes, one by one: `(K, H, D)` for a tensor stored as `[K * H, D]`.
        shape: as stored.
        parts: what it holds.
        layer: whose parameters `parts` are; None: those outside the layers.
    """

    name: str
    split: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    layer: int | None = None

    def load(self, stored: np.ndarray, part: Part) -> np.ndarray:
        """The parameter's block: a view of the stored tensor."""
        return stored.reshape(self.split)[part.stored].transpose(part.axes)

    def store(self, blocks: list[np.ndarray]) -> np.ndarray:
        """The stored tensor, from the parameters' blocks, one for each part."""
        stored = np.empty(self.split, blocks[0].dtype)
        for part, block in zip(self.parts, blocks, strict=True):
            stored[part.stored] = block.transpose(np.argsort(part.axes))
        return stored.reshape(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def family(config: ModelConfig) -> str:
    """`llama` or `gpt_neox`.

    Raises:
        ValueError: the architecture is neither; names the switches that differ.
    """
    differing: list[str] = []
    for name, switches in _SWITCHES.items():
        found = {key: getattr(config, key) for key in switches}
        wrong = [f"{key}={value}" for key, value in found.items() if value != switches[key]]
        if name == LLAMA and config.rotary != config.head_dim:
            wrong.append(f"rotary_dim={config.rotary} of head_dim={config.head_dim}")
        if not wrong:
            return name
        differing.append(f"{', '.join(wrong)} is not {name}'s")
    raise ValueError(f"{config.name} is of no Hugging Face family: {'; '.join(differing)}")


def is_native(config: ModelConfig) -> bool:
    """Whether `transformers` can express the model.

    Raises:
        ValueError: as `family`.
    """
    native = config.kv_layers == config.num_layers and not config.separate_kv_norm
    if family(config) == GPT_NEOX:
        square = config.query_heads * config.head_dim == config.d_model
        return native and square and config.kv_heads == config.query_heads
    return native


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of a checkpoint, in the order in which it is written.

    Raises:
        ValueError: as `family`.
    """
    return list(_llama(config) if family(config) == LLAMA else _gpt_neox(config))


def _plain(name: str, shape: tuple[int, ...], layer: int | None, *path: str) -> TensorSpec:
    return TensorSpec(name, shape, shape, (Part(path, tuple(range(len(shape)))),), layer)


def _linear(
    name: str, out: tuple[int, ...], into: tuple[int, ...], layer: int | None, *path: str,
    block: tuple[Any, ...] = (),
) -> TensorSpec:  # fmt: skip
    """A matrix stored as `[out, in]`; ours is `[*in, *out]`."""
    axes = (*range(len(out), len(out) + len(into)), *range(len(out)))
    shape = (math.prod(out), math.prod(into))
    return TensorSpec(name, (*out, *into), shape, (Part(path, axes, block),), layer)


def _pair(index: int) -> tuple[Any, ...]:
    """The first or second of two matrices that share a kernel `[D, 2, ...]`."""
    return (slice(None), index)


def _head_axes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    return (config.query_heads, config.head_dim), (config.kv_heads, config.head_dim)


def _llama(config: ModelConfig) -> Iterator[TensorSpec]:
    D, F, V = (config.d_model,), (config.ffn_dim,), (config.vocab_size,)
    queries, keys = _head_axes(config)
    yield _plain("model.embed_tokens.weight", V + D, None, "embedding", "embedding")
    for i in range(config.num_layers):
        at, kv = f"model.layers.{i}.", ("kv_projection", "projection", "kernel")
        attention = at + "self_attn."
        yield _plain(at + "input_layernorm.weight", D, i, "attention_norm", "norm", "scale")
        yield _linear(attention + "q_proj.weight", queries, D, i, "attention", "query", "kernel")
        if config.sharing.owns(i):
            if config.separate_kv_norm:
                yield _plain(attention + "kv_layernorm.weight", D, i, "kv_norm", "norm", "scale")
            yield _linear(attention + "k_proj.weight", keys, D, i, *kv, block=_pair(0))
            yield _linear(attention + "v_proj.weight", keys, D, i, *kv, block=_pair(1))
        yield _linear(attention + "o_proj.weight", D, queries, i, "attention", "out", "kernel")
        yield _plain(at + "post_attention_layernorm.weight", D, i, "ffn_norm", "norm", "scale")
        for index, name in enumerate(("gate", "up")):
            yield _linear(
                f"{at}mlp.{name}_proj.weight", F, D, i, "ffn", "up", "kernel", block=_pair(index)
            )
        yield _linear(at + "mlp.down_proj.weight", D, F, i, "ffn", "down", "kernel")
    yield _plain("model.norm.weight", D, None, "final_norm", "norm", "scale")
    if not config.tied_embeddings:
        yield _linear("lm_head.weight", V, D, None, "head")


def _gpt_neox(config: ModelConfig) -> Iterator[TensorSpec]:
    D, F, V = (config.d_model,), (config.ffn_dim,), (config.vocab_size,)
    queries, _ = _head_axes(config)

    def norm(name: str, layer: int | None, ours: str) -> Iterator[TensorSpec]:
        yield _plain(name + ".weight", D, layer, ours, "norm", "scale")
        yield _plain(name + ".bias", D, layer, ours, "norm", "bias")

    yield _plain("gpt_neox.embed_in.weight", V + D, None, "embedding", "embedding")
    for i in range(config.num_layers):
        at = f"gpt_neox.layers.{i}."
        yield from norm(at + "input_layernorm", i, "attention_norm")
        yield from norm(at + "post_attention_layernorm", i, "ffn_norm")
        if is_native(config):
            yield from _fused(config, at + "attention.query_key_value", i)
        else:
            yield from _apart(config, at + "attention.", i)
        dense = at + "attention.dense"
        yield _linear(dense + ".weight", D, queries, i, "attention", "out", "kernel")
        yield _plain(dense + ".bias", D, i, "attention", "out", "bias")
        up, down = at + "mlp.dense_h_to_4h", at + "mlp.dense_4h_to_h"
        yield _linear(up + ".weight", F, D, i, "ffn", "up", "kernel", block=_pair(0))
        yield TensorSpec(up + ".bias", F, F, (Part(("ffn", "up", "bias"), (0,), (0,)),), i)
        yield _linear(down + ".weight", D, F, i, "ffn", "down", "kernel")
        yield _plain(down + ".bias", D, i, "ffn", "down", "bias")
    yield from norm("gpt_neox.final_layer_norm", None, "final_norm")
    if not config.tied_embeddings:
        yield _linear("embed_out.weight", V, D, None, "head")


def _fused(config: ModelConfig, name: str, layer: int) -> Iterator[TensorSpec]:
    """Query, key and value of one head after the other: `[N, 3, H, D]`."""
    N, H, D = config.query_heads, config.head_dim, config.d_model
    query, kv = ("attention", "query"), ("kv_projection", "projection")
    first, rest = (slice(None), 0), (slice(None), slice(1, 3))
    kernels = (
        Part((*query, "kernel"), (2, 0, 1), stored=first),
        Part((*kv, "kernel"), (3, 1, 0, 2), stored=rest),
    )
    yield TensorSpec(name + ".weight", (N, 3, H, D), (N * 3 * H, D), kernels, layer)
    biases = (
        Part((*query, "bias"), (0, 1), stored=first),
        Part((*kv, "bias"), (1, 0, 2), stored=rest),
    )
    yield TensorSpec(name + ".bias", (N, 3, H), (N * 3 * H,), biases, layer)


def _apart(config: ModelConfig, at: str, layer: int) -> Iterator[TensorSpec]:
    """Query, key and value each in a tensor of its own; key and value of owners alone."""
    D = (config.d_model,)
    queries, keys = _head_axes(config)
    yield _linear(at + "query.weight", queries, D, layer, "attention", "query", "kernel")
    yield _flat_bias(at + "query.bias", queries, layer, ("attention", "query", "bias"), ())
    if not config.sharing.owns(layer):
        return
    if config.separate_kv_norm:
        for name, ours in (("weight", "scale"), ("bias", "bias")):
            yield _plain(f"{at}kv_layernorm.{name}", D, layer, "kv_norm", "norm", ours)
    kv = ("kv_projection", "projection")
    for index, name in enumerate(("key", "value")):
        yield _linear(f"{at}{name}.weight", keys, D, layer, *kv, "kernel", block=_pair(index))
        yield _flat_bias(f"{at}{name}.bias", keys, layer, (*kv, "bias"), (index,))


def _flat_bias(
    name: str, heads: tuple[int, int], layer: int, path: tuple[str, ...], block: tuple[Any, ...]
) -> TensorSpec:
    return TensorSpec(name, heads, (math.prod(heads),), (Part(path, (0, 1), block),), layer)
