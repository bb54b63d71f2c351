"""The experiments' recipes, the ladder of learning rates, and what shared options refuse."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cla_jax.experiment import ExperimentOptions, check_seeds, open_data
from cla_jax.recipes import MLKV_SCALES, SCALES, climb, mlkv, next_rate, recipe


def test_1b_is_the_papers_recipe():
    training = recipe(SCALES["1B"])
    assert (training.data.sequence_length, training.data.batch_size) == (2048, 2048)
    assert training.steps * 2048 * 2048 == pytest.approx(30e9, rel=1e-4)
    assert training.optimizer.learning_rate == 3e-4
    assert recipe(SCALES["3B"]).steps * 2048 * 2048 == pytest.approx(100e9, rel=1e-4)


def test_seeds_share_the_data_order():
    one, two = (recipe(SCALES["tiny"], seed=seed) for seed in (0, 5))
    assert one.data == two.data
    assert two.seed == 5


def test_tokens_become_steps():
    training = recipe(SCALES["mini"], tokens=20e6, batch_size=3)
    assert training.steps == round(20e6 / (3 * 2048))
    with pytest.raises(ValueError, match=r"tokens=100 .*16 x 2048.*least is 32768"):
        recipe(SCALES["mini"], tokens=100.0)
    with pytest.raises(ValueError, match="tokens=nan"):
        recipe(SCALES["mini"], tokens=math.nan)
    with pytest.raises(ValueError, match="batch_size=0"):
        recipe(SCALES["mini"], batch_size=0)


def test_micro_batches():
    training = recipe(SCALES["1B"])
    assert (training.micro_batch_size, training.data.batch_size) == (16, 2048)
    assert training.eval_tokens == pytest.approx(4e6, rel=0.01)
    assert recipe(SCALES["1B"], batch_size=24).micro_batch_size == 8  # the nearest that divides
    assert recipe(SCALES["1B"], micro_batch=0).micro_batch_size == 0
    assert recipe(SCALES["mini"]).micro_batch_size == 0


def test_mlkv_is_the_papers_recipe():
    training = mlkv()
    assert training.steps * training.data.batch_size == pytest.approx(2.46e6)
    assert (training.data.packing, training.data.sequence_length) == ("first_fit", 2048)
    optimizer = training.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_fraction) == (6e-4, 0.2)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.01)


def test_mlkv_is_the_same_at_both_papers_scales_and_packs_nothing_at_tiny():
    assert MLKV_SCALES["160m"] == MLKV_SCALES["410m"]
    tiny, source = (recipe(MLKV_SCALES[name]) for name in ("tiny", "tiny-source"))
    assert tiny.optimizer == source.optimizer
    assert tiny.data == source.data  # one order of one set of rows
    assert tiny.data.packing == "concat"
    assert tiny.steps / source.steps < 0.15
    assert mlkv().checkpoint_every < 2500


def test_mini_uptrains_on_five_per_cent_of_its_sources_tokens():
    mini, source = MLKV_SCALES["mini"], MLKV_SCALES["mini-source"]
    assert mini.tokens / source.tokens == 0.05
    assert (mini.batch_size, mini.sequence_length) == (source.batch_size, source.sequence_length)
    assert (mini.optimizer, mini.packing) == (MLKV_SCALES["160m"].optimizer, "first_fit")
    assert mini.learning_rate == MLKV_SCALES["160m"].learning_rate
    assert (source.packing, source.optimizer.weight_decay) == ("concat", 0.01)
    # Both are validated on the same text.
    assert mini.validation_tokens == source.validation_tokens


def test_the_ladder_is_the_papers():
    ladder = [3e-4]
    while len(ladder) < 8:
        ladder.append(next_rate(ladder[-1]))
    assert ladder == [3e-4, 4.5e-4, 6.75e-4, 1e-3, 1.5e-3, 2.25e-3, 3.38e-3, 5.07e-3]
    assert next_rate(2e-3) == 3e-3


@given(st.lists(st.integers(1, 9).map(float) | st.just(math.inf), min_size=1))
def test_a_climb_ends_at_the_first_that_is_no_better(perplexities):
    answers = iter(perplexities)
    seen = climb(lambda rate: next(answers, None), 3e-4)
    found = [perplexity for _, perplexity in seen]
    assert found == perplexities[: len(found)]
    assert all(a > b for a, b in itertools.pairwise(found[:-1]))
    if len(found) < len(perplexities):
        assert found[-1] == math.inf or found[-1] >= found[-2]
    assert [rate for rate, _ in seen] == sorted({rate for rate, _ in seen})


def test_open_data_refuses(tmp_path):
    with pytest.raises(ValueError, match="either --data"):
        open_data(tmp_path, "my.txt", "tiny", tmp_path)
    for text in (None, "my.txt"):
        with pytest.raises(ValueError, match=r"scale mini.*prepare-data"):
            open_data(None, text, "mini", tmp_path)
    with pytest.raises(ValueError, match="not a prepared directory"):
        open_data(tmp_path, None, "mini", tmp_path)


def test_seeds_are_some_and_different():
    check_seeds((0, 1))
    with pytest.raises(ValueError, match="no seeds"):
        check_seeds(())
    with pytest.raises(ValueError, match=r"--seeds 0 1 0 names a seed twice.*--seeds 0 1$"):
        check_seeds((0, 1, 0))


def test_names_and_directory():
    options = ExperimentOptions(models=("MQA*",))
    assert options.names() == ("tiny/MQA", "tiny/MQA-CLA2", "tiny/MQA-CLA3")
    assert len(ExperimentOptions(scale="1B").names()) == 20
    assert options.directory("x") == Path("runs/x-tiny")
    smoke = dataclasses.replace(options, smoke=True)
    assert smoke.directory("x") == Path("runs/x-tiny-smoke")
    assert smoke.recipe().steps <= 10
    with pytest.raises(ValueError, match=r"'H64-MQA'.*MHA, MQA, MQA-CLA2, MQA-CLA3"):
        ExperimentOptions(models=("H64-MQA",)).names()
