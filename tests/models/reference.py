"""A naive decoder, written from the papers alone: a loop over layers, a loop over heads.

Nothing here is shared with the library. It runs in float64, op by op, so it is the truth that the
library's float32 is measured against. Parameters are plain dicts of arrays:

`{"embedding": [V, D], "head": [D, V], "final_norm": norm, "layers": [layer, ...]}`, where a `norm`
is `{"scale": [D]}` and perhaps a `"bias"`, and a layer holds `attention_norm`, `ffn_norm`, `query`
`[D, N, H]`, `out` `[N, H, D]`, `up` `[D, F]`, `down` `[F, D]`, perhaps `gate` `[D, F]`; owners also
hold `key` and `value` `[D, K, H]` and perhaps a `kv_norm`. Where the architecture has biases there
is `"query_bias"` and so on.

Sources: CLA (Brandon et al. 2024) sections 2.2 and 3.1; MLKV (Zuhri et al. 2024) section 3; Llama
(Touvron et al. 2023); GPT-NeoX-20B (Black et al. 2022), section 2.1; RoFormer (Su et al. 2021).
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cla_jax.configs import ExecutionConfig, ModelConfig
from cla_jax.models import Decoder

type Params = dict[str, Any]

# The tests' time is compilation: small models run once.
QUICK_COMPILE = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}


def double() -> contextlib.AbstractContextManager[Any]:
    """Float64, for as long as the reference runs."""
    return jax.enable_x64(True)


# --- the naive model ------------------------------------------------------------------------------


def positions_of(tokens: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """Each token's position: in its row, or in its document."""
    positions = np.zeros(tokens.shape, np.int64)
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            new = documents is not None and documents[row, t] != documents[row, t - 1]
            positions[row, t] = 0 if new else positions[row, t - 1] + 1
    return positions


def visible_keys(tokens: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """`[B, T, T]`: query t sees key s."""
    batch, length = tokens.shape
    visible = np.zeros((batch, length, length), bool)
    for row in range(batch):
        for t in range(length):
            for s in range(t + 1):
                visible[row, t, s] = documents is None or documents[row, t] == documents[row, s]
    return visible


def normalise(config: ModelConfig, norm: Params, x: jax.Array) -> jax.Array:
    if config.rms_norm:
        size = jnp.sqrt((x * x).sum(-1) / x.shape[-1] + config.norm_epsilon)
        return x / size[..., None] * norm["scale"][None, None]
    centred = x - x.mean(-1)[..., None]
    deviation = jnp.sqrt((centred * centred).mean(-1) + config.norm_epsilon)
    return centred / deviation[..., None] * norm["scale"][None, None] + norm["bias"][None, None]


def turn(x: jax.Array, positions: np.ndarray, rotary_dim: int, theta: float) -> jax.Array:
    """Rotate `[B, T, H]`: dimension i and i + R/2 are one complex number, turned by its angle."""
    half = rotary_dim // 2
    frequencies = np.array([theta ** (-2 * i / rotary_dim) for i in range(half)])
    turns = jnp.asarray(np.exp(1j * positions[:, :, None] * frequencies[None, None]))
    turned = jax.lax.complex(x[..., :half], x[..., half:rotary_dim]) * turns
    return jnp.concatenate([jnp.real(turned), jnp.imag(turned), x[..., rotary_dim:]], axis=-1)


def linear(layer: Params, name: str, x: jax.Array, head: int | None = None) -> jax.Array:
    kernel, bias = layer[name], layer.get(f"{name}_bias")
    if head is not None:
        kernel, bias = kernel[:, head], None if bias is None else bias[head]
    y = x @ kernel
    return y if bias is None else y + bias[None, None]


def feed_forward(config: ModelConfig, layer: Params, x: jax.Array) -> jax.Array:
    up = linear(layer, "up", x)
    if config.swiglu:
        gate = linear(layer, "gate", x)
        hidden = gate / (1 + jnp.exp(-gate)) * up
    else:
        hidden = up * 0.5 * (1 + jax.lax.erf(up / np.sqrt(2.0)))
    return linear(layer, "down", hidden)


def logits(
    config: ModelConfig, params: Params, tokens: np.ndarray, documents: np.ndarray | None = None
) -> jax.Array:
    """`[B, T, V]`."""
    tokens = np.asarray(tokens)
    positions, visible = positions_of(tokens, documents), visible_keys(tokens, documents)
    angles = (positions, config.rotary, config.rope_theta)
    x = params["embedding"][tokens]
    keys_of: dict[int, list[jax.Array]] = {}
    values_of: dict[int, list[jax.Array]] = {}
    for index, layer in enumerate(params["layers"]):
        owner = config.sharing.owners[index]
        h = normalise(config, layer["attention_norm"], x)
        if owner == index:
            source = normalise(config, layer["kv_norm"], x) if "kv_norm" in layer else h
            kv_heads = range(config.kv_heads)
            keys_of[index] = [turn(linear(layer, "key", source, j), *angles) for j in kv_heads]
            values_of[index] = [linear(layer, "value", source, j) for j in kv_heads]
        attended = jnp.zeros_like(x)
        for n in range(config.query_heads):
            j = n // (config.query_heads // config.kv_heads)
            q = turn(linear(layer, "query", h, n), *angles)
            k, v = keys_of[owner][j], values_of[owner][j]
            scores = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim)
            weights = jnp.where(visible, jnp.exp(scores - scores.max(-1)[..., None]), 0.0)
            attended = attended + weights / weights.sum(-1)[..., None] @ v @ layer["out"][n]
        if config.use_bias:
            attended = attended + layer["out_bias"][None, None]
        if config.parallel_residual:
            x = x + attended + feed_forward(config, layer, normalise(config, layer["ffn_norm"], x))
        else:
            x = x + attended
            x = x + feed_forward(config, layer, normalise(config, layer["ffn_norm"], x))
    x = normalise(config, params["final_norm"], x)
    return x @ (params["embedding"].T if config.tied_embeddings else params["head"])


def loss(values: jax.Array, tokens: np.ndarray) -> jax.Array:
    """Summed next-token cross-entropy of logits `[B, T, V]`: what is differentiated."""
    targets = np.roll(np.asarray(tokens), -1, axis=1)
    top = jax.lax.stop_gradient(values.max(-1))
    normaliser = jnp.log(jnp.exp(values - top[..., None]).sum(-1)) + top
    chosen = (values * np.eye(values.shape[-1], dtype=values.dtype)[targets]).sum(-1)
    return (normaliser - chosen).sum()


def loss_and_gradients(
    config: ModelConfig, params: Params, tokens: np.ndarray, documents: np.ndarray | None = None
) -> tuple[np.ndarray, Params]:
    """Logits, and the gradients of `loss` with respect to every parameter; float64."""

    def scalar(p: Params) -> tuple[jax.Array, jax.Array]:
        values = logits(config, p, tokens, documents)
        return loss(values, tokens), values

    with double():
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        gradients, values = jax.grad(scalar, has_aux=True)(wide)
        return np.asarray(values), jax.tree.map(np.asarray, gradients)


# --- the library's parameters as the naive model's ------------------------------------------------


def _norm(module: Any) -> Params:
    found = {"scale": module.norm.scale[...]}
    if getattr(module.norm, "bias", None) is not None:
        found["bias"] = module.norm.bias[...]
    return found


def _linear(name: str, module: Any, part: int | None = None) -> Params:
    """Kernel and bias; `part` picks one of a fused pair (gate and up, key and value)."""
    found = {name: module.kernel[...] if part is None else module.kernel[...][:, part]}
    if getattr(module, "bias", None) is not None:
        found[f"{name}_bias"] = module.bias[...] if part is None else module.bias[...][part]
    return found


def extract(decoder: Decoder) -> Params:
    """A Decoder's parameters, or a Decoder of gradients, as the naive model's; float32."""
    config = decoder.config
    layers: list[Params] = []
    for index, owner in enumerate(config.sharing.owners):
        module: Any = decoder.layer(index)
        layer: Params = {
            "attention_norm": _norm(module.attention_norm),
            "ffn_norm": _norm(module.ffn_norm),
        }
        layer |= _linear("query", module.attention.query) | _linear("out", module.attention.out)
        layer |= _linear("down", module.ffn.down)
        if config.swiglu:
            layer |= _linear("gate", module.ffn.up, 0) | _linear("up", module.ffn.up, 1)
        else:
            layer |= _linear("up", module.ffn.up, 0)
        if owner == index:
            fused = module.kv_projection.projection
            layer |= _linear("key", fused, 0) | _linear("value", fused, 1)
        if module.kv_norm is not None:
            layer["kv_norm"] = _norm(module.kv_norm)
        layers.append(layer)
    params: Params = {
        "embedding": decoder.embedding.embedding[...],
        "final_norm": _norm(decoder.final_norm),
        "layers": layers,
    }
    if decoder.head is not None:
        params["head"] = decoder.head[...]
    return jax.tree.map(np.asarray, params)


# --- models to compare ----------------------------------------------------------------------------


def decoder(
    config: ModelConfig,
    execution: ExecutionConfig | None = None,
    seed: int = 0,
    spread: float = 1.5,
) -> Decoder:
    """A float32 Decoder with large random parameters everywhere: deviation `spread / sqrt(D)`.

    As initialised, attention is almost uniform, biases are zero and scales one: an error in any of
    them would pass unseen.
    """
    execution = execution or ExecutionConfig(compute_dtype="float32")
    # Abstractly: to draw the initial values layer by layer only costs compilations.
    abstract = nnx.eval_shape(lambda: Decoder(config, execution, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    deviation = spread / np.sqrt(config.d_model)

    def large(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        assert leaf.dtype == jnp.float32
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + deviation * random.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(large, abstract)


def tokens_for(config: ModelConfig, batch: int = 2, length: int = 9, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), np.int32)


def library_loss_and_gradients(
    model: Decoder, tokens: np.ndarray, documents: np.ndarray | None = None
) -> tuple[np.ndarray, Params]:
    """What `loss_and_gradients` gives, from the library, jitted."""

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(m: Decoder) -> tuple[Decoder, jax.Array]:
        def scalar(m: Decoder) -> tuple[jax.Array, jax.Array]:
            values = m(jnp.asarray(tokens), None if documents is None else jnp.asarray(documents))
            return loss(values, tokens), values

        return jax.grad(scalar, has_aux=True)(m)

    gradients, values = run(model)
    return np.asarray(values), extract(gradients)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of the largest entry of the expected leaf.

    Or of a hundredth of the largest entry of all: some gradients are zero but for rounding, as that
    of a key's bias without rotary embeddings, which softmax takes away.
    """
    found_leaves, found_tree = jax.tree_util.tree_flatten_with_path(found)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert found_tree == expected_tree
    floor = 1e-2 * max(float(np.abs(np.asarray(b)).max()) for _, b in expected_leaves)
    for (path, a), (_, b) in zip(found_leaves, expected_leaves, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        error = np.abs(a - b).max() / max(np.abs(b).max(), floor)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e} > {tolerance:.1e}"
