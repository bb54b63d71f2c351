"""The chart and the table of what memory holds."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from cla_jax.configs import ModelConfig
from cla_jax.inference.planning import MemoryPlan, largest_batch
from cla_jax.registry import model
from cla_jax.reporting.figures import save
from cla_jax.reporting.planning import capacity, columns, variants
from cla_jax.sharing import KVSharing

GB = 10**9
TOY = ModelConfig(
    name="toy", sharing=KVSharing.cla(6, 2), d_model=16, ffn_dim=24, query_heads=4, kv_heads=2,
    head_dim=10, vocab_size=60, separate_kv_norm=True,
)  # fmt: skip


def plans(name: str, memory: int, context: int) -> list[MemoryPlan]:
    return [MemoryPlan(config, 1, context, memory) for config in variants(model(name))]


def test_a_line_for_each_pattern_with_its_largest_batch(tmp_path):
    drawn = plans("1B/H128-MQA-CLA2-KeepEnds", 141 * GB, 8192)
    figure = capacity(drawn)
    lines = [line for line in figure.axes[0].lines if len(np.asarray(line.get_xydata())) > 2]
    assert len(lines) == len(drawn) == 5
    for line, plan in zip(lines, drawn, strict=True):
        for context, batch in np.asarray(line.get_xydata())[::40].tolist():
            assert batch == largest_batch(plan.config, int(context), 141 * GB)
    _, svg = save(figure, tmp_path / "capacity")
    text = " ".join(" ".join(ElementTree.parse(svg).getroot().itertext()).split())
    for plan in drawn:
        assert f"{plan.config.name.removeprefix('1B/')} {plan.largest_batch:,}" in text


@pytest.mark.parametrize(
    ("memory", "context"),
    [(4 * GB, 1), (40 * GB, 300_000), (2_900_000_000, 128), (10**15, 10**6)],
)
def test_little_and_much_memory(tmp_path, memory, context):
    figure = capacity(plans("1B/H128-MQA", memory, context))
    save(figure, tmp_path / "capacity")
    low, high = figure.axes[0].get_xlim()
    assert low < high
    assert sum(low <= tick <= high for tick in figure.axes[0].get_xticks()) >= 3


def test_nothing_fits():
    with pytest.raises(ValueError, match="no model fits"):
        capacity(plans("1B/H128-MQA", 2 * GB, 8192))
    with pytest.raises(ValueError, match="no model fits"):
        capacity([])


def test_the_floor_is_that_of_the_largest_batch():
    plan, *_ = plans("1B/H128-MQA", 20 * GB, 2048)
    cells = {c.key: c.value(plan) for c in columns(1, 2048, 4 * 10**12)}
    seconds = plan.reads(plan.largest_batch).seconds(4 * 10**12)
    assert cells["step_ms"] == 1e3 * seconds
    assert cells["tokens_per_second"] == plan.largest_batch / seconds
    assert not {"step_ms", "tokens_per_second"} & {c.key for c in columns(1, 2048, None)}
    none = MemoryPlan(plan.config, 1, 2048, GB)
    assert {c.value(none) for c in columns(1, 2048, 4 * 10**12)} >= {0, None}


# --- patterns ----------------------------------------------------------------------------------


def test_variants_are_the_registrys_where_it_has_them():
    for name in ("1B/H128-MQA", "1B/H128-MQA-CLA3", "1B/H128-MQA-CLA2-KeepEnds"):
        found = variants(model(name))
        names = ["1B/H128-MQA", "1B/H128-MQA-CLA2", "1B/H128-MQA-CLA3", "1B/H128-MQA-CLA4"]
        assert [v.name for v in found] == names + ([] if name in names else [name])
        assert all(v == model(v.name) for v in found)
    cla5, globbed, own = variants(TOY, ["CLA5", "tiny/MQA-CLA2"])
    assert (cla5.name, cla5.kv_layers, cla5.separate_kv_norm) == ("toy as CLA5", 2, True)
    assert (globbed, own) == (model("tiny/MQA-CLA2"), TOY)
    unshared = variants(TOY, ["none"])[0]
    assert (unshared.kv_layers, unshared.separate_kv_norm) == (6, False)
    shallow = dataclasses.replace(TOY, sharing=KVSharing.cla(2, 2))
    assert [v.kv_layers for v in variants(shallow)] == [2, 1]
    mlkv = variants(model("pythia-160m/MLKV-12"), ["MLKV-6"])[0]
    assert mlkv.kv_layers == 2  # 3 KV heads a layer


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("CLB2", "nearest is 'CLA2'"), ("CLA30", "1 to 20"), ("1B/H128-MQX", "'1B/H128-MQA'")],
)
def test_variants_refuse(pattern, message):
    with pytest.raises(ValueError, match=message):
        variants(model("1B/H128-MQA"), [pattern])
