"""What a `config.json` may say: both spellings, defaults, and all that is refused by name."""

import dataclasses
import json
from typing import Any

import pytest

from cla_jax.configs import ModelConfig, RopeScaling
from cla_jax.conversion.hf_config import from_hf_config, to_hf_config
from cla_jax.conversion.hf_keys import unknown_entries
from cla_jax.registry import model, model_names
from tests.conversion.checkpoints import NAMES, golden

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def llama(**changes: Any) -> dict[str, Any]:
    """As transformers 4 writes it."""
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 41, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "rope_scaling": None, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return {k: v for k, v in {**values, **changes}.items() if v != "absent"}


def neox(**changes: Any) -> dict[str, Any]:
    """As the Pythia models have it."""
    values = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 32,
        "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": 41, "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "hidden_act": "gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    return {k: v for k, v in {**values, **changes}.items() if v != "absent"}


def read(values: dict[str, Any]) -> ModelConfig:
    return from_hf_config(values, "some-model")


def test_both_spellings_of_the_rotary_settings():
    assert read(llama(rope_scaling=LLAMA3)).rope_scaling == SCALING
    new = {**LLAMA3, "rope_theta": 5e5}
    old = read(llama(rope_scaling=LLAMA3))
    assert read(llama(rope_theta="absent", rope_parameters=new)) == old
    older = {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"}
    assert read(llama(rope_scaling=older)) == old
    parameters = {"rope_theta": 777, "rope_type": "default", "partial_rotary_factor": 0.5}
    half = read(neox(rotary_pct="absent", rotary_emb_base="absent", rope_parameters=parameters))
    assert (half.rope_theta, half.rotary) == (777, 4)
    assert half == read(neox(rotary_pct=0.5, rotary_emb_base=777))
    # What the object says goes before what stands beside it, whatever the object is called.
    for key in ("rope_scaling", "rope_parameters"):
        assert read(llama(rope_theta=7.0, **{key: new})) == old
        assert read(llama(**{key: {"rope_type": "default", "rope_theta": 7.0}})).rope_theta == 7
        assert read(neox(**{key: parameters})) == half
        assert read(llama(**{key: {"rope_theta": None}})).rope_theta == 5e5
    assert read(llama(rope_scaling=new, rope_parameters=new)) == old


def test_what_is_not_said_is_what_transformers_assumes():
    config = read(llama(num_key_value_heads="absent", rms_norm_eps="absent", rope_theta="absent"))
    assert (config.kv_heads, config.head_dim, config.norm_epsilon) == (4, 8, 1e-6)
    assert (config.rope_theta, config.tied_embeddings, config.init_std) == (10_000, False, 0.02)
    config = read(neox(rotary_pct="absent", use_parallel_residual="absent", hidden_act="absent"))
    assert (config.rotary, config.parallel_residual) == (2, True)
    assert read(llama(sliding_window=4096, use_sliding_window=False)) == read(llama())


class Recorded(dict[str, Any]):
    """Which keys are asked for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize(("family", "values"), [("llama", llama()), ("gpt_neox", neox())])
def test_what_is_read_is_known_and_what_may_change_a_model_is_told(family, values):
    recorded = Recorded(values)
    from_hf_config(recorded, "some-model")
    assert len(recorded.read) > 20
    assert unknown_entries(dict.fromkeys(recorded.read, 1), family) == {}
    more = {"clip_qkv": 8.0, "alibi": False, "torch_dtype": "float32", "use_cache": True,
            "mystery": None, "pruned_heads": {}}  # fmt: skip
    assert unknown_entries({**values, **more}, family) == {"alibi": False, "clip_qkv": 8.0}
    # Each family's own: another's is not looked at.
    assert unknown_entries({"rotary_emb_base": 7, "rope_theta": 7}, family) == (
        {"rotary_emb_base": 7} if family == "llama" else {"rope_theta": 7}
    )


@pytest.mark.parametrize("name", NAMES)
def test_configs_of_transformers_hold_nothing_unknown(name: str):
    assert unknown_entries(golden(name)[0], name.partition("/")[0]) == {}


@pytest.mark.parametrize("name", ["llama/llama3-all", "llama/wide-heads", "gpt_neox/rotary-half"])
def test_a_config_comes_back(name: str):
    values, _, _ = golden(name)
    config = read(values)
    written = json.loads(json.dumps(to_hf_config(config, "float32", values)))
    assert read(written) == config
    assert "rope_parameters" not in written


@pytest.mark.parametrize("name", [n for n in model_names() if n.startswith(("1B", "pythia-160m"))])
def test_the_papers_models_come_back(name: str):
    config = model(name)
    again = from_hf_config(json.loads(json.dumps(to_hf_config(config, "float32"))), name)
    assert again == config


@pytest.mark.parametrize("head_dim", range(2, 130, 2))
def test_every_rotary_size_comes_back(head_dim: int):
    base = model("pythia-tiny/MLKV-6")
    for rotary in range(0, head_dim + 1, 2):
        config = dataclasses.replace(base, head_dim=head_dim, rotary_dim=rotary)
        assert from_hf_config(to_hf_config(config, "float32"), config.name).rotary == rotary


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (llama(architectures=["MistralForCausalLM"]), "'MistralForCausalLM' is not supported; .*"),
        (llama(architectures=["LlamaForSequenceClassification"]), "nearest is LlamaForCausalLM"),
        (llama(architectures="absent", model_type="mixtral"), "model_type='mixtral' is not"),
        (llama(model_type="absent"), r"config\.json has no model_type; expected llama or"),
        (llama(model_type=[]), r"model_type=\[\] is not supported"),
        (llama(layer_types=3), "layer_types=3 is not supported"),
        (llama(layer_types=[["a"]]), r"layer_types=\[\['a'\]\] is not supported"),
        (llama(sliding_window=4096), "sliding_window=4096 is not supported"),
        (llama(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (llama(use_qk_norm=True), "use_qk_norm=True is not supported"),
        (llama(num_local_experts=8), "num_local_experts=8 is not supported"),
        (llama(quantization_config={"bits": 4}), "quantization_config=.* is not supported"),
        (llama(attention_bias=True), "attention_bias=True .* biases on every projection"),
        (llama(mlp_bias=True), "mlp_bias=True is not supported"),
        (llama(hidden_act="gelu"), "hidden_act='gelu' .* llama model; expected 'silu'"),
        (llama(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn' is not"),
        (llama(rope_scaling={"type": "linear", "factor": 4.0}), "rope type 'linear' is not"),
        (llama(rope_scaling={**LLAMA3, "factor": None}), "factor=None in config.json"),
        (llama(rope_scaling={**LLAMA3, "high_freq_factor": 0.5}), "must be below"),
        (llama(rope_scaling="dynamic"), "rope_scaling='dynamic' is not supported"),
        (llama(rope_parameters=[1]), r"rope_parameters=\[1\] is not supported"),
        (
            llama(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default", "rope_theta": 7}),
            "rope_scaling=.* and rope_parameters=.* differ",
        ),
        (
            llama(rope_parameters={"full_attention": {"rope_theta": 7}}),
            r"rope_parameters is given by layer type \(full_attention\)",
        ),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (llama(rope_theta=float("nan")), "rope_theta=nan"),
        (llama(rope_theta=0), "rope_theta=0 in config.json"),
        (llama(hidden_size="absent"), "hidden_size=None .* expected a positive integer"),
        (llama(vocab_size=41.0), "vocab_size=41.0 in config.json"),
        (llama(num_key_value_heads=3), "kv_heads=3 does not divide query_heads=4"),
        (llama(num_attention_heads=5, num_key_value_heads=5), "does not divide hidden_size=32"),
        (llama(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
        (llama(sharing_pattern=[0, 0]), "sharing_pattern maps 2 layers; num_hidden_layers=3"),
        (llama(sharing_pattern=[0, 2, 2]), "layer 1 reads the K/V of layer 2"),
        (llama(sharing_pattern="CLA2"), "sharing_pattern='CLA2' is no list"),
        (neox(attention_bias=False), "attention_bias=False is not supported"),
        (neox(hidden_act="gelu_new"), "'gelu_new' .* expected 'gelu' .the exact GELU"),
        (neox(hidden_act="gelu_fast"), "hidden_act='gelu_fast'"),
        (llama(head_dim=5), "some-model: head_dim=5 makes 5 rotary dimensions: expected an even"),
        (neox(rotary_pct=0.375), "rotary_pct=0.375 of head_dim=8 makes 3 rotary dimensions"),
        (neox(rotary_pct=2), "rotary_pct=2.0 of head_dim=8 makes 16 rotary dimensions"),
        (neox(num_key_value_heads=2), "num_key_value_heads=2 is not supported in GPT-NeoX"),
        (neox(head_dim=16), "head_dim=16 is not supported in GPT-NeoX"),
    ],
)
def test_the_unsupported_is_refused_by_name(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read(values)
