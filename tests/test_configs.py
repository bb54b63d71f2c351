"""Configurations: figures against independent counts, round trips, refusals."""

import dataclasses
import json

import pytest

from cla_jax.configs import (
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)
from cla_jax.registry import model, model_names
from cla_jax.sharing import KVSharing


def small(**changes):
    sizes = dict(
        name="small",
        sharing=KVSharing((0, 0, 2)),
        d_model=8,
        ffn_dim=12,
        query_heads=6,
        kv_heads=3,
        head_dim=4,
        vocab_size=11,
    )
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def test_parameters_counted_by_hand():
    # D 8, F 12, N*H 24, K*H 12, V 11, 3 layers, 2 owners.
    layer = 8 * 24 + 24 * 8 + 3 * 8 * 12 + 2 * 8
    owner = 2 * 8 * 12
    assert small().parameters == 2 * 11 * 8 + 3 * layer + 2 * owner + 8
    assert small(tied_embeddings=True).parameters == small().parameters - 11 * 8
    assert small(separate_kv_norm=True).parameters == small().parameters + 2 * 8
    # LayerNorm has a bias: 2 a layer, the last, and an owner's own.
    layer_norm = small(separate_kv_norm=True, rms_norm=False)
    assert layer_norm.parameters == small(separate_kv_norm=True).parameters + (3 * 2 + 1 + 2) * 8
    # GELU has no gate.
    assert small(swiglu=False).parameters == small().parameters - 3 * 8 * 12
    # Biases: queries 24, output 8, gate and up 24, down 8; owners' keys and values 24.
    assert small(use_bias=True).parameters == small().parameters + 3 * (24 + 8 + 24 + 8) + 2 * 24
    assert small(rotary_dim=2).parameters == small().parameters


@pytest.mark.parametrize(
    "name",
    [
        "1B/H128-MHA",
        "1B/H128-MQA-CLA2",
        "1B/H46-MQA",
        "1B/H512-MQA-CLA2",
        "3B/H64-MQA-CLA2",
        "pythia-160m/MHA",
        "pythia-160m/MLKV-1",
    ],
)
@pytest.mark.parametrize("length", [None, 128])
def test_flops_per_token(name, length):
    """Every product of a forward pass, a multiply-add as two, and twice that for the backward."""
    c = model(name)
    context = length or c.sequence_length
    forward = 2 * c.d_model * c.vocab_size
    for layer, owner in enumerate(c.sharing.owners):
        width = c.query_heads * c.head_dim
        forward += 2 * c.d_model * width + 2 * width * c.d_model
        forward += (3 if c.swiglu else 2) * 2 * c.d_model * c.ffn_dim
        forward += 2 * (2 * width * context / 2)  # q k and p v, over half the positions on average
        if layer == owner:
            forward += 2 * 2 * c.d_model * c.kv_heads * c.head_dim
    assert c.flops_per_token(length) == pytest.approx(3 * forward, rel=2e-3)


def test_a_reader_saves_its_projection_alone():
    dense, shared = model("1B/H128-MQA"), model("1B/H128-MQA-CLA2")
    saved = dense.flops_per_token() - shared.flops_per_token()
    assert saved == pytest.approx(10 * 6 * 2 * 2048 * 128, rel=5e-3)


@pytest.mark.parametrize("name", model_names())
def test_dict_round_trip(name):
    config = model(name)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["sharing_pattern"] == list(config.sharing.owners)
    assert ModelConfig.from_dict(values) == config
    before = dict(values)
    ModelConfig.from_dict(values)
    assert values == before


LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def test_rope_scaling_round_trip_and_configs_saved_before_there_was_any():
    config = small(rope_scaling=LLAMA3)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    older = small().to_dict()
    del older["rope_scaling"]
    assert ModelConfig.from_dict(older) == small()
    with pytest.raises(ValueError, match="rope_scaling has the keys factor; expected"):
        ModelConfig.from_dict({**older, "rope_scaling": {"factor": 8.0}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"factor": 0.0}, "factor=0.0 must be positive"), ({"low_freq_factor": 4.0}, "must be below")],
)
def test_rope_scaling_that_makes_no_sense(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(LLAMA3, **changes)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("kv_head", "kv_heads"), ("ffn_dims", "ffn_dim"), ("rotary_pct", "rotary_dim")],
)
def test_unknown_key_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{wrong}'.*'{nearest}'"):
        ModelConfig.from_dict({**small().to_dict(), wrong: 1})


@pytest.mark.parametrize("missing", ["sharing_pattern", "d_model"])
def test_missing_or_misspelled_required_key_is_a_value_error(missing):
    values = small().to_dict()
    values[missing + "s"] = values.pop(missing)
    with pytest.raises(ValueError, match=missing):
        ModelConfig.from_dict(values)
    del values[missing + "s"]
    with pytest.raises(ValueError, match=missing):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 4}, ["kv_heads=4", "query_heads=6", "nearest"]),
        ({"kv_heads": 5}, ["nearest that does is 6"]),
        ({"d_model": 0}, ["d_model=0"]),
        ({"vocab_size": -3}, ["vocab_size=-3"]),
        ({"rotary_dim": 3}, ["rotary_dim=3", "even", "nearest is 2"]),
        ({"rotary_dim": 6}, ["rotary_dim=6", "head_dim=4", "nearest is 4"]),
        ({"head_dim": 5}, ["rotary_dim=5", "nearest is 4"]),
        ({"rotary_dim": -2}, ["rotary_dim=-2", "nearest is 0"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match="small: ") as error:
        small(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExecutionConfig(unroll=0), "unroll=0"),
        (lambda: ExecutionConfig(loss_chunk=-1), "loss_chunk=-1"),
        (lambda: DataConfig(sequence_length=0), "sequence_length=0"),
        (lambda: DataConfig(batch_size=0), "batch_size=0"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate=0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate=nan"),
        (lambda: OptimizerConfig(warmup_fraction=1.5), "warmup_fraction=1.5"),
        (lambda: TrainConfig(steps=0), "steps=0"),
        (
            lambda: TrainConfig(1, 3, data=DataConfig(8, 4)),
            "micro_batch_size=3 does not divide batch_size=4; the nearest that does is [24]",
        ),
        (lambda: TrainConfig(steps=1, keep_checkpoints=0), "keep_checkpoints=0"),
    ],
)
def test_run_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("most", "tokens", "chunk"),
    [(0, 100, 100), (4096, 100, 100), (4096, 8192, 4096), (4096, 6144, 3072), (4096, 4099, 2050)],
)
def test_chunks_of_the_loss_are_nearly_equal(most, tokens, chunk):
    assert ExecutionConfig(loss_chunk=most).loss_chunk_of(tokens) == chunk


def test_defaults_are_the_cla_recipe():
    """CLA section 3.1: 2048 sequences of 2048 tokens; AdamW, 5 % warm-up, cosine to 10 %."""
    train = TrainConfig(steps=10)
    assert (train.data.batch_size, train.data.sequence_length) == (2048, 2048)
    optimizer = train.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.warmup_fraction, optimizer.final_fraction) == (0.05, 0.1)
    assert (optimizer.clip_norm, optimizer.learning_rate) == (1.0, 3e-4)
    assert not train.data.document_mask


def test_configs_are_frozen_and_hashable():
    config = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 9  # type: ignore[misc]
    assert len({config, small(), ExecutionConfig(), DataConfig(), TrainConfig(steps=1)}) == 4
