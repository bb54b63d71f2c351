"""Every figure that the papers print about their models, copied here, must come out."""

import dataclasses

import jax
import pytest
from flax import nnx

from cla_jax.models import Decoder
from cla_jax.registry import match_models, model, model_names

# CLA Table 1: name, d_head, query heads, KV heads, KV layers, KV bytes per token (16 bit).
CLA_TABLE_1 = [
    ("H128-MHA", 128, 16, 16, 20, 163840),
    ("H128-GQA4", 128, 16, 4, 20, 40960),
    ("H128-GQA2", 128, 16, 2, 20, 20480),
    ("H128-MQA", 128, 16, 1, 20, 10240),
    ("H64-MQA", 64, 32, 1, 20, 5120),
    ("H46-MQA", 46, 45, 1, 20, 3680),
    ("H32-MQA", 32, 64, 1, 20, 2560),
    ("H512-MQA-CLA2", 512, 4, 1, 10, 20480),
    ("H256-MQA-CLA2", 256, 8, 1, 10, 10240),
    ("H128-MQA-CLA2", 128, 16, 1, 10, 5120),
    ("H90-MQA-CLA2", 90, 22, 1, 10, 3600),
    ("H64-MQA-CLA2", 64, 32, 1, 10, 2560),
    ("H256-GQA4-CLA2", 256, 8, 4, 10, 40960),
    ("H128-GQA4-CLA2", 128, 16, 4, 10, 20480),
    ("H128-GQA2-CLA2", 128, 16, 2, 10, 10240),
    ("H128-MQA-CLA3", 128, 16, 1, 7, 3584),
    ("H128-MQA-CLA4", 128, 16, 1, 5, 2560),
    ("H128-MQA-CLA2-KeepEnds", 128, 16, 1, 11, 5632),
    ("H128-MQA-CLA2-DenseFront", 128, 16, 1, 11, 5632),
    ("H128-MQA-CLA2-DenseBack", 128, 16, 1, 11, 5632),
]
# CLA Tables 3 (1B), 5 and 7 (3B): KV bytes per token.
CLA_TABLES_3_5_7 = [
    ("1B/H128-MQA", 10240),
    ("1B/H128-MQA-CLA2", 5120),
    ("1B/H64-MQA", 5120),
    ("3B/H128-MQA", 16384),
    ("3B/H128-MQA-CLA2", 8192),
    ("3B/H64-MQA", 8192),
    ("3B/H64-MQA-CLA2", 4096),
    ("3B/H32-MQA", 4096),
]
# CLA Table 2: family, hidden size, FFN size, layers, sequence length.
CLA_TABLE_2 = [("1B", 2048, 5472, 20, 2048), ("3B", 3072, 8192, 32, 2048)]
# MLKV Table 2: name, l, h, m, g, total KV heads (mg), parameters; and the MLP widths that alone
# give those counts.
MLKV_TABLE_2 = [
    ("MHA", 12, 12, 12, 12, 144, 162_322_944, 3072),
    ("GQA-48", 12, 12, 12, 4, 48, 162_316_800, 3584),
    ("MLKV-48", 12, 12, 4, 12, 48, 162_316_800, 3584),
    ("MQA-12", 12, 12, 12, 1, 12, 162_332_940, 3777),
    ("MLKV-12", 12, 12, 4, 3, 12, 162_332_940, 3777),
    ("MLKV-6", 12, 12, 6, 1, 6, 162_332_556, 3809),
    ("MLKV-4", 12, 12, 4, 1, 4, 162_320_132, 3819),
    ("MLKV-2", 12, 12, 2, 1, 2, 162_326_152, 3830),
    ("MLKV-1", 12, 12, 1, 1, 1, 162_319_940, 3835),
]
# The models of MLKV Table 4: name, KV layers, KV heads a layer.
PYTHIA_410M = [("MHA", 24, 16), ("MQA-24", 24, 1), ("MLKV-12", 12, 1), ("MLKV-8", 8, 1)]
PYTHIA_410M_PARAMETERS = 405_334_016  # of the public checkpoint


@pytest.mark.parametrize("row", CLA_TABLE_1, ids=lambda row: row[0])
def test_cla_table_1(row):
    name, *heads, kv_layers, kv_bytes = row
    config = model(f"1B/{name}")
    assert config.name == f"1B/{name}"
    assert [config.head_dim, config.query_heads, config.kv_heads] == heads
    assert config.kv_layers == kv_layers
    assert config.kv_bytes_per_token == kv_bytes


def test_cla_table_1_has_twenty_rows_in_its_order():
    assert [n for n in model_names() if n.startswith("1B/")] == [f"1B/{r[0]}" for r in CLA_TABLE_1]
    assert len(CLA_TABLE_1) == 20


@pytest.mark.parametrize(("name", "kv_bytes"), CLA_TABLES_3_5_7)
def test_cla_tables_3_5_and_7(name, kv_bytes):
    assert model(name).kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(("family", "d_model", "ffn_dim", "layers", "length"), CLA_TABLE_2)
def test_cla_table_2_and_the_recipe(family, d_model, ffn_dim, layers, length):
    configs = [model(n) for n in model_names() if n.startswith(f"{family}/")]
    assert configs
    for config in configs:
        assert (config.d_model, config.ffn_dim) == (d_model, ffn_dim)
        assert (config.num_layers, config.sequence_length) == (layers, length)
        # Section 3.1: Llama-like; N * H is the hidden size except for H46 and H90.
        assert config.rms_norm
        assert config.swiglu
        assert not config.parallel_residual
        assert not config.use_bias
        assert config.rotary == config.head_dim
        assert config.init_std == 0.01275
        assert config.separate_kv_norm == ("CLA" in config.name)
        if config.head_dim not in (46, 90):
            assert config.query_heads * config.head_dim == d_model


@pytest.mark.parametrize("row", MLKV_TABLE_2, ids=lambda row: row[0])
def test_mlkv_table_2(row):
    name, layers, heads, kv_layers, kv_heads, total, parameters, width = row
    config = model(f"pythia-160m/{name}")
    assert (config.num_layers, config.query_heads) == (layers, heads)
    assert (config.kv_layers, config.kv_heads) == (kv_layers, kv_heads)
    assert config.kv_layers * config.kv_heads == total
    assert config.parameters == parameters
    assert config.ffn_dim == width


@pytest.mark.parametrize(("name", "kv_layers", "kv_heads"), PYTHIA_410M)
def test_pythia_410m(name, kv_layers, kv_heads):
    config = model(f"pythia-410m/{name}")
    assert (config.num_layers, config.query_heads, config.d_model) == (24, 16, 1024)
    assert (config.kv_layers, config.kv_heads) == (kv_layers, kv_heads)
    assert config.parameters == pytest.approx(PYTHIA_410M_PARAMETERS, rel=2e-4)
    # No other width comes nearer.
    gap = abs(config.parameters - PYTHIA_410M_PARAMETERS)
    for change in (-1, 1):
        other = dataclasses.replace(config, ffn_dim=config.ffn_dim + change)
        assert abs(other.parameters - PYTHIA_410M_PARAMETERS) >= gap


def test_pythia_baseline_is_the_public_checkpoint():
    assert model("pythia-410m/MHA").parameters == PYTHIA_410M_PARAMETERS
    assert model("pythia-410m/MHA").ffn_dim == 4096


@pytest.mark.parametrize("name", [n for n in model_names() if n.startswith("pythia-")])
def test_pythia_is_gpt_neox(name):
    config = model(name)
    assert not config.rms_norm
    assert not config.swiglu
    assert not config.tied_embeddings
    assert not config.separate_kv_norm
    assert config.parallel_residual
    assert config.use_bias
    assert config.rotary == config.head_dim // 4  # rotary_pct 0.25
    if name.startswith("pythia-mini/"):  # 512 does not divide by twelve heads
        assert (config.vocab_size, config.head_dim, config.query_heads) == (50304, 40, 12)
    else:
        assert config.query_heads * config.head_dim == config.d_model
    if name.startswith(("pythia-160m/", "pythia-410m/")):
        assert (config.vocab_size, config.head_dim) == (50304, 64)


def test_mini_is_the_1b_family_at_a_quarter_of_its_width():
    for name, head_dim, query_heads, kv_heads, kv_layers, kv_bytes in CLA_TABLE_1:
        config, large = model(f"mini/{name}"), model(f"1B/{name}")
        assert (config.d_model, config.ffn_dim, config.num_layers) == (512, 1368, 20)
        assert (config.query_heads, config.kv_heads) == (query_heads, kv_heads)
        assert config.kv_layers == kv_layers
        assert config.sharing == large.sharing
        assert config.vocab_size == large.vocab_size
        if head_dim in (46, 90):
            assert config.head_dim == {46: 12, 90: 22}[head_dim]
            assert config.kv_bytes_per_token == pytest.approx(kv_bytes / 4, rel=0.05)
        else:
            assert config.head_dim == head_dim // 4
            assert config.kv_bytes_per_token == kv_bytes // 4


def test_tiny_has_four_models_of_six_layers_over_bytes():
    names = [n for n in model_names() if n.startswith("tiny/")]
    assert names == ["tiny/MHA", "tiny/MQA", "tiny/MQA-CLA2", "tiny/MQA-CLA3"]
    for name in names:
        config = model(name)
        assert (config.num_layers, config.d_model, config.ffn_dim) == (6, 128, 344)
        assert config.vocab_size in (256, 257)
    assert [model(n).kv_layers for n in names] == [6, 6, 3, 2]
    assert model("tiny/MQA-CLA2").kv_bytes_per_token * 2 == model("tiny/MQA").kv_bytes_per_token


@pytest.mark.parametrize(("scale", "d_model"), [("pythia-mini", 512), ("pythia-tiny", 96)])
def test_small_pythias_keep_layers_and_heads(scale, d_model):
    source = model(f"{scale}/MHA").parameters
    for name, _, _, kv_layers, kv_heads, *_ in MLKV_TABLE_2:
        config = model(f"{scale}/{name}")
        assert (config.num_layers, config.query_heads, config.d_model) == (12, 12, d_model)
        assert (config.kv_layers, config.kv_heads) == (kv_layers, kv_heads)
        assert config.parameters == pytest.approx(source, rel=1e-2)


@pytest.mark.parametrize("name", model_names())
def test_parameters_are_those_of_the_built_model(name):
    config = model(name)
    built = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
    assert config.parameters == sum(leaf.size for leaf in leaves)
    assert {str(leaf.dtype) for leaf in leaves} == {"float32"}


def test_names_are_unique_and_say_what_they_are():
    names = model_names()
    assert len(set(names)) == len(names)
    assert all(model(name).name == name for name in names)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("1B/H128-MQA-CLA", "1B/H128-MQA-CLA2"),
        ("1B/H128-MQA-CLA2-KeepEnd", "1B/H128-MQA-CLA2-KeepEnds"),
        ("pythia-160m/MLKV6", "pythia-160m/MLKV-6"),
        ("pythia-160M/MLKV-6", "pythia-160m/MLKV-6"),
        ("3B/H64-MQA-CLA3", "3B/H64-MQA-CLA2"),
        ("mini/H128-MQA-CLA-4", "mini/H128-MQA-CLA4"),
    ],
)
def test_unknown_model_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match="unknown model") as error:
        model(wrong)
    assert repr(wrong) in str(error.value)
    assert repr(nearest) in str(error.value)


@pytest.mark.parametrize("wrong", ["", "/", "1B", "nonsense", "1B/H128-MQA/CLA2"])
def test_malformed_names_are_unknown_models(wrong):
    with pytest.raises(ValueError, match="unknown model"):
        model(wrong)


def test_other_tiny_models_are_refused_with_the_list():
    with pytest.raises(ValueError, match="tiny/MQA-CLA4") as error:
        model("tiny/MQA-CLA4")
    for name in ("tiny/MHA", "tiny/MQA", "tiny/MQA-CLA2", "tiny/MQA-CLA3"):
        assert name in str(error.value)
    assert "pythia-tiny" not in str(error.value)


@pytest.mark.parametrize(
    ("scale", "patterns", "expected"),
    [
        ("1B", ["H64-*", "1B/H32-MQA"], ["1B/H64-MQA", "1B/H32-MQA", "1B/H64-MQA-CLA2"]),
        ("tiny", ["MQA-CLA2", "*CLA2"], ["tiny/MQA-CLA2"]),
        ("3B", ["*"], [name for name in model_names() if name.startswith("3B/")]),
    ],
)
def test_match_models(scale, patterns, expected):
    assert list(match_models(scale, patterns)) == expected


def test_match_models_refuses():
    with pytest.raises(ValueError, match="'2B'"):
        match_models("2B", ["*"])
    with pytest.raises(ValueError, match=r"'H128-MQA-CLA5' names no model.*mini/H128-MQA-CLA"):
        match_models("mini", ["H128-MQA-CLA5"])
