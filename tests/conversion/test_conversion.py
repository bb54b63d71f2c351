"""Converted models: unchanged where nothing is shared, the paper's sizes, and what is refused."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from cla_jax.configs import ModelConfig
from cla_jax.conversion import (
    HuggingFaceCheckpoint,
    convert,
    converted_config,
    first,
    load_huggingface,
    mean,
    parse_sharing,
    save_huggingface,
)
from cla_jax.conversion.parameters import parameter_shapes
from cla_jax.registry import model
from cla_jax.sharing import KVSharing
from tests.conversion.checkpoints import logits, relative_error, written

# MLKV Table 2: model, KV heads a layer, parameters.
TABLE_2 = {
    "MHA": ("none", 12, 162_322_944),
    "GQA-48": ("none", 4, 162_316_800),
    "MLKV-48": ("MLKV-48", 12, 162_316_800),
    "MQA-12": ("none", 1, 162_332_940),
    "MLKV-12": ("MLKV-12", 3, 162_332_940),
    "MLKV-6": ("MLKV-6", 1, 162_332_556),
    "MLKV-4": ("MLKV-4", 1, 162_320_132),
    "MLKV-2": ("MLKV-2", 1, 162_326_152),
    "MLKV-1": ("MLKV-1", 1, 162_319_940),
}


def count(params: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def as_pythia(config: ModelConfig) -> ModelConfig:
    """The registry's model as it comes from a Hugging Face directory."""
    return dataclasses.replace(config, name="pythia", sequence_length=2048, norm_epsilon=1e-5)


def test_a_source_that_has_an_unwidened_twin_in_the_registry_is_matched_all_the_same():
    source = model("tiny/MHA")
    config = converted_config(source, KVSharing.none(6), 1, match_params=True)
    assert config.ffn_dim > model("tiny/MQA").ffn_dim
    step = dataclasses.replace(config, ffn_dim=config.ffn_dim + 1).parameters - config.parameters
    assert abs(config.parameters - source.parameters) <= step / 2


@pytest.mark.parametrize("variant", TABLE_2)
def test_matched_parameters_are_those_of_mlkv_table_2(variant: str):
    source = as_pythia(model("pythia-160m/MHA"))
    name, kv_heads, parameters = TABLE_2[variant]
    sharing, heads = parse_sharing(name, source, kv_heads)
    config = converted_config(source, sharing, heads, match_params=True)
    leaves = jax.tree.leaves(parameter_shapes(config))
    assert config.parameters == sum(math.prod(leaf.shape) for leaf in leaves) == parameters
    expected = model(f"pythia-160m/{variant}")
    assert dataclasses.replace(config, name=expected.name) == expected


@pytest.mark.slow
def test_a_converted_pythia_160m_holds_the_parameters_of_table_2():
    source = as_pythia(model("pythia-160m/MHA"))
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float16), parameter_shapes(source))
    for variant in ("GQA-48", "MLKV-1"):
        name, kv_heads, parameters = TABLE_2[variant]
        sharing, _ = parse_sharing(name, source, kv_heads)
        checkpoint = HuggingFaceCheckpoint(source, params)
        converted = convert(checkpoint, sharing, kv_heads, match_params=True)
        assert count(converted.params) == parameters


@pytest.mark.parametrize("name", ["llama/gqa", "gpt_neox/five-layers", "llama/five-layers"])
def test_other_models_get_the_width_nearest_in_parameters(name: str, tmp_path: Path):
    source = load_huggingface(written(tmp_path, name)).config
    config = converted_config(source, KVSharing.mlkv(source.num_layers, 1), 1, match_params=True)
    distance = abs(config.parameters - source.parameters)
    for width in (config.ffn_dim - 1, config.ffn_dim + 1):
        other = dataclasses.replace(config, ffn_dim=width)
        assert abs(other.parameters - source.parameters) >= distance
    assert config.ffn_dim > source.ffn_dim


@pytest.mark.parametrize("name", ["llama/gqa", "llama/wide-heads", "gpt_neox/sequential"])
def test_without_sharing_and_with_inert_units_the_logits_are_unchanged(name: str, tmp_path: Path):
    source = load_huggingface(written(tmp_path, name))
    same = convert(source, KVSharing.none(3))
    assert same.config == source.config
    jax.tree.map(np.testing.assert_array_equal, same.params, source.params)
    merged = convert(source, KVSharing((0, 0, 2)), 1)
    wider = convert(source, KVSharing((0, 0, 2)), 1, match_params=True)
    assert wider.config.ffn_dim > merged.config.ffn_dim
    assert count(wider.params) == wider.config.parameters
    assert relative_error(logits(wider), logits(merged)) < 1e-6
    new = wider.params["layers"][0][0]["ffn"]["up"]["kernel"][..., source.config.ffn_dim :]
    assert (new != 0).all(), "units without inputs would never learn"
    again = convert(source, KVSharing((0, 0, 2)), 1, match_params=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, wider.params)


@pytest.mark.parametrize("name", ["llama/gqa", "gpt_neox/plain"])
def test_equal_heads_may_be_merged_without_any_change(name: str, tmp_path: Path):
    """Layers and heads whose K/V and norms are the same: sharing them is no approximation."""
    source = load_huggingface(written(tmp_path, name))
    layers = source.params["layers"][0][0]
    projection = layers["kv_projection"]["projection"]
    for key, value in projection.items():
        value[...] = value[:1, ..., :1, :].copy()
        assert value.ndim == (5 if key == "kernel" else 4)
    # A reader attends to what its owner's input makes. Every layer sees the embedding here, through
    # the same norm, and the last one's attention decides the logits.
    for norm in jax.tree.leaves(layers["attention_norm"]):
        norm[1:] = norm[:1]
    for leaf in jax.tree.leaves([layers["attention"]["out"], layers["ffn"]["down"]]):
        leaf[:-1] = 0
    expected = logits(source)
    for merge_heads in (source.config.kv_heads, 1):
        converted = convert(source, KVSharing((0, 0, 0)), merge_heads)
        found = converted.params["layers"][0][0]["kv_projection"]["projection"]["kernel"]
        np.testing.assert_array_equal(found[0, ..., 0, :], projection["kernel"][0, ..., 0, :])
        assert relative_error(logits(converted), expected) < 1e-6
    for leaf in jax.tree.leaves(converted.params["layers"][0][0]["kv_projection"]):
        leaf[...] = leaf[..., ::-1]
    assert relative_error(logits(converted), expected) > 1e-2, "other K/V would not show"


def test_mqa_of_equal_heads_computes_what_mha_did(tmp_path: Path):
    """Query heads find their merged KV head: head `n` reads `n // (N / K)`."""
    source = load_huggingface(written(tmp_path, "gpt_neox/eight-heads"))
    projection = source.params["layers"][0][0]["kv_projection"]["projection"]
    for value in projection.values():  # eight heads in pairs of equal ones
        value[..., 1::2, :] = value[..., ::2, :]
    converted = convert(source, KVSharing.none(3), 4)
    assert converted.config.kv_heads == 4
    assert relative_error(logits(converted), logits(source)) < 1e-6


def test_biases_are_merged_and_the_norm_is_the_owners(tmp_path: Path):
    source = load_huggingface(written(tmp_path, "gpt_neox/plain"))
    before = source.params["layers"][0][0]
    bias = before["kv_projection"]["projection"]["bias"]
    for merge, expected in ((first, bias[1, :, 0]), (mean, bias[1:].mean((0, 2)))):
        converted = convert(source, KVSharing((0, 1, 1)), 1, merge)
        assert [s.start for s in converted.config.sharing.segments] == [0, 2]
        owner = converted.params["layers"][0][0]
        found = owner["kv_projection"]["projection"]["bias"][1, :, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        norm = owner["attention_norm"]["norm"]["scale"][1]
        np.testing.assert_array_equal(norm, before["attention_norm"]["norm"]["scale"][1])


def test_a_converted_model_comes_back_and_keeps_its_dtype(tmp_path: Path):
    source = load_huggingface(written(tmp_path / "source", "gpt_neox/plain", "bfloat16"))
    converted = convert(source, KVSharing((0, 0, 2)), 2, match_params=True)
    save_huggingface(converted, tmp_path / "out")
    again = load_huggingface(tmp_path / "out", name=converted.config.name)
    assert again.config == converted.config
    jax.tree.map(np.testing.assert_array_equal, again.params, converted.params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(again.params)} == {"bfloat16"}


def test_sources_that_share_keep_their_map(tmp_path: Path):
    source = load_huggingface(written(tmp_path))
    shared = convert(source, KVSharing((0, 0, 2)))
    with pytest.raises(ValueError, match=r"shares K/V across layers already: .* owners=0,0,2"):
        convert(shared, KVSharing((0, 0, 0)))
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        convert(shared, KVSharing((0, 0, 2)), seed=-1)
    once = convert(convert(source, KVSharing((0, 0, 2))), KVSharing((0, 0, 2)), 1)
    both = convert(source, KVSharing((0, 0, 2)), 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        once.params,
        both.params,
    )


def test_names_of_maps():
    config = model("pythia-tiny/MHA")
    assert parse_sharing("MLKV-6", config) == (KVSharing.mlkv(12, 6), 1)
    assert parse_sharing("MLKV-12", config, 3) == (KVSharing.mlkv(12, 4), 3)
    assert parse_sharing("CLA2", config) == (KVSharing.cla(12, 2), 12)
    assert parse_sharing("none", config, 4) == (KVSharing.none(12), 4)
    with pytest.raises(ValueError, match=r"MLKV-48: .* --kv-heads says how many"):
        parse_sharing("MLKV-48", config)
    with pytest.raises(ValueError, match="kv_heads=5 does not divide the 12 KV heads"):
        parse_sharing("CLA2", config, 5)
    with pytest.raises(ValueError, match="unknown KV sharing 'CAL2'"):
        parse_sharing("CAL2", config)
    with pytest.raises(ValueError, match=r"the sharing map has 3 layers; .* has 12"):
        converted_config(config, KVSharing.none(3))
