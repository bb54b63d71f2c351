"""`config.json` to `ModelConfig` and back, for Llama and GPT-NeoX; the unsupported is refused.

Both spellings of the rotary settings are read, as transformers 5 reads them: `rope_theta` and
`rope_scaling`, `rotary_emb_base` and `rotary_pct`, and the `rope_parameters` that replaced them.
The older ones are written.
"""

import difflib
import math
from typing import Any, cast

from cla_jax.configs import ModelConfig, RopeScaling
from cla_jax.conversion.hf_keys import WHY, off_values
from cla_jax.conversion.layouts import GPT_NEOX, LLAMA, family, is_native
from cla_jax.sharing import KVSharing

__all__ = ["from_hf_config", "to_hf_config"]

# Ours are the model types of what `transformers` cannot express; its Auto classes refuse them by
# name.
_MODEL_TYPES = {LLAMA: LLAMA, GPT_NEOX: GPT_NEOX, "cla_llama": LLAMA, "cla_gpt_neox": GPT_NEOX}
_ARCHITECTURES = {LLAMA: "LlamaForCausalLM", GPT_NEOX: "GPTNeoXForCausalLM"}
_OURS = {LLAMA: "ClaLlamaForCausalLM", GPT_NEOX: "ClaGPTNeoXForCausalLM"}
_ACTIVATION = {LLAMA: "silu", GPT_NEOX: "gelu"}

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def from_hf_config(values: dict[str, Any], name: str) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Args:
        values: the file's.
        name: of the model.

    Raises:
        ValueError: another architecture, a setting that is not supported (by its name and value), a
            size that is missing or no number.
    """
    kind = _family_of(values, name)
    for key, off in off_values(kind).items():
        unused = key == "sliding_window" and values.get("use_sliding_window") is False
        if not any(values.get(key) is v or values.get(key) == v for v in off) and not unused:
            why = f": {WHY[key]}" if key in WHY else ""
            raise ValueError(
                f"{name}: {key}={values[key]!r} is not supported{why}; expected {off[-1]!r}"
            )
    layer_types = values.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(
            f"{name}: layer_types={layer_types!r} is not supported; expected 'full_attention' alone"
        )
    activation = values.get("hidden_act", _ACTIVATION[kind])
    if activation != _ACTIVATION[kind]:
        raise ValueError(
            f"{name}: hidden_act={activation!r} is not supported in a {kind} model; expected "
            f"{_ACTIVATION[kind]!r}" + (" (the exact GELU)" if kind == GPT_NEOX else "")
        )
    D = _size(values, "hidden_size", name)
    heads = _size(values, "num_attention_heads", name)
    layers = _size(values, "num_hidden_layers", name)
    if values.get("head_dim") is None and D % heads:
        raise ValueError(
            f"{name}: num_attention_heads={heads} does not divide hidden_size={D}, and head_dim is "
            "not given"
        )
    head_dim = _size(values, "head_dim", name, D // heads)
    if kind == GPT_NEOX and values["model_type"] == GPT_NEOX and head_dim * heads != D:
        raise ValueError(f"{name}: head_dim={head_dim} is not supported in GPT-NeoX: it is implied")
    kv_heads = _size(values, "num_key_value_heads", name, heads)
    if values["model_type"] == GPT_NEOX and kv_heads != heads:
        raise ValueError(
            f"{name}: num_key_value_heads={kv_heads} is not supported in GPT-NeoX: each of its "
            f"{heads} query heads has a KV head"
        )
    scaling, theta, fraction = _rope(values, kind, name)
    rotary = _rotary(head_dim, fraction, kind, name)
    return ModelConfig(
        name=name,
        sharing=_sharing(values, layers, name),
        d_model=D,
        ffn_dim=_size(values, "intermediate_size", name),
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_size(values, "vocab_size", name),
        sequence_length=_size(values, "max_position_embeddings", name, 2048),
        rms_norm=kind == LLAMA,
        separate_kv_norm=_flag(values, "separate_kv_norm", name, False),
        swiglu=kind == LLAMA,
        parallel_residual=kind == GPT_NEOX and _flag(values, "use_parallel_residual", name, True),
        use_bias=kind == GPT_NEOX,
        rotary_dim=rotary,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=_number(values, "rms_norm_eps" if kind == LLAMA else "layer_norm_eps", name,
                             1e-6 if kind == LLAMA else 1e-5),
        tied_embeddings=_flag(values, "tie_word_embeddings", name, False),
        init_std=_number(values, "initializer_range", name, 0.02),
    )  # fmt: skip


def to_hf_config(
    config: ModelConfig, dtype: str, source: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        config: the architecture.
        dtype: of its parameters, as torch calls it: `float32`, `bfloat16`, `float16`.
        source: a `config.json` whose other entries (token ids and the like) are kept.

    Raises:
        ValueError: the architecture is of neither family.
    """
    kind, native = family(config), is_native(config)
    replaced = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base",
                "partial_rotary_factor", "torch_dtype", "dtype", "sharing_pattern",
                "separate_kv_norm", "head_dim", "num_key_value_heads", "auto_map")  # fmt: skip
    # transformers would put ids of its own where none are given.
    nothing: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    values = {k: v for k, v in (source or nothing).items() if k not in replaced}
    values |= {
        "architectures": [(_ARCHITECTURES if native else _OURS)[kind]],
        "model_type": kind if native else f"cla_{kind}",
        "hidden_act": _ACTIVATION[kind],
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.sequence_length,
        "num_attention_heads": config.query_heads,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }
    if kind == LLAMA or not native:
        values |= {"head_dim": config.head_dim, "num_key_value_heads": config.kv_heads}
    if kind == LLAMA:
        values |= {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": config.norm_epsilon}
        values["rope_theta"] = config.rope_theta
    else:
        values |= {"attention_bias": True, "layer_norm_eps": config.norm_epsilon}
        values["use_parallel_residual"] = config.parallel_residual
        values["rotary_pct"] = _fraction(config.rotary, config.head_dim)
        values["rotary_emb_base"] = config.rope_theta
    scaling = config.rope_scaling
    values["rope_scaling"] = None
    if scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3", **{key: getattr(scaling, key) for key in _LLAMA3}
        }  # fmt: skip
    if not native:
        values["sharing_pattern"] = config.sharing.sharing_pattern
        values["separate_kv_norm"] = config.separate_kv_norm
    return dict(sorted(values.items()))


def _family_of(values: dict[str, Any], name: str) -> str:
    kind = values.get("model_type")
    architectures = values.get("architectures")
    known = [*_ARCHITECTURES.values(), *_OURS.values()]
    for architecture in architectures if isinstance(architectures, list) else ():
        if architecture not in known:
            near = difflib.get_close_matches(str(architecture), known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{name}: the architecture {architecture!r} is not supported; supported are "
                f"{', '.join(known)}, the nearest is {near}"
            )
    if kind is None:
        raise ValueError(
            f"{name}: config.json has no model_type; expected {' or '.join(_MODEL_TYPES)}"
        )
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        near = difflib.get_close_matches(str(kind), _MODEL_TYPES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}: model_type={kind!r} is not supported; supported are "
            f"{', '.join(_MODEL_TYPES)}, the nearest is {near!r}"
        )
    return _MODEL_TYPES[kind]


def _sharing(values: dict[str, Any], layers: int, name: str) -> KVSharing:
    pattern = values.get("sharing_pattern")
    if pattern is None:
        return KVSharing.none(layers)
    if not isinstance(pattern, list) or not all(type(owner) is int for owner in pattern):
        raise ValueError(f"{name}: sharing_pattern={pattern!r} is no list of layers")
    sharing = KVSharing.from_sharing_pattern(pattern)
    if sharing.num_layers != layers:
        raise ValueError(
            f"{name}: sharing_pattern maps {sharing.num_layers} layers; num_hidden_layers={layers}"
        )
    return sharing


def _rope(values: dict[str, Any], kind: str, name: str) -> tuple[RopeScaling | None, float, float]:
    """Scaling, theta, and the fraction of a head's dimensions that rotate."""
    scaling = _rope_object(values, name)
    legacy = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if kind == GPT_NEOX:
        legacy = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    given = {
        key: values.get(old) if scaling.get(key) is None else scaling[key]
        for key, old in legacy.items()
    }
    theta = _number(given, "rope_theta", name, 10_000.0)
    fraction = _number(given, "partial_rotary_factor", name, 0.25 if kind == GPT_NEOX else 1.0)
    if theta == 0:
        raise ValueError(f"{name}: {legacy['rope_theta']}=0 in config.json: expected above 0")
    if kind == LLAMA and fraction != 1:
        raise ValueError(
            f"{name}: partial_rotary_factor={fraction} is not supported in a Llama model; expected "
            "1.0"
        )
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return None, theta, fraction
    if rope_type != "llama3":
        raise ValueError(
            f"{name}: the rope type {rope_type!r} is not supported; expected 'default' or 'llama3'"
        )
    numbers = {key: _number(scaling, key, name) for key in _LLAMA3}
    length = int(numbers.pop("original_max_position_embeddings"))
    return RopeScaling(original_max_position_embeddings=length, **numbers), theta, fraction


def _rope_object(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The one of `rope_scaling` and `rope_parameters` that is given; both, if they are equal."""
    keys = [key for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    for key in keys:
        value = values[key]
        if not isinstance(value, dict):
            raise ValueError(f"{name}: {key}={value!r} is not supported; expected an object")
        nested = [k for k, v in value.items() if isinstance(v, dict)]
        if nested:
            raise ValueError(
                f"{name}: {key} is given by layer type ({', '.join(nested)}), which is not "
                "supported; expected one for all layers"
            )
    if len(keys) == 2 and values[keys[0]] != values[keys[1]]:
        raise ValueError(
            f"{name}: rope_scaling={values[keys[0]]!r} and rope_parameters={values[keys[1]]!r} "
            "differ: expected one of them"
        )
    return values[keys[0]] if keys else {}


def _rotary(head_dim: int, fraction: float, kind: str, name: str) -> int:
    """Dimensions of a head that rotate."""
    rotary = int(head_dim * fraction)
    if rotary % 2 or rotary > head_dim:
        what = "" if kind == LLAMA else f"rotary_pct={fraction} of "
        raise ValueError(
            f"{name}: {what}head_dim={head_dim} makes {rotary} rotary dimensions: expected an even "
            "number, at most head_dim"
        )
    return rotary


def _fraction(part: int, whole: int) -> float:
    """A fraction whose product with `whole`, cut to an integer as it will be, is `part`."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1.0)


def _size(values: dict[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: {key}={value!r} in config.json: expected a positive integer")
    return value


def _number(values: dict[str, Any], key: str, name: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 <= cast(float, value) < math.inf:
        raise ValueError(f"{name}: {key}={value!r} in config.json: expected a number")
    return float(cast(float, value))


def _flag(values: dict[str, Any], key: str, name: str, default: bool) -> bool:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise ValueError(f"{name}: {key}={value!r} in config.json: expected true or false")
    return value
