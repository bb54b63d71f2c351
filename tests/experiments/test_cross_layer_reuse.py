"""Cross-layer reuse: the smoke form, what is refused, and the finding from known times."""

import csv
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.evaluation.rereads import Chain, Heads, apart, compile_chain, together
from cla_jax.registry import model
from cla_jax.reporting.csv_records import append_record, read_records
from cla_jax.reporting.rereads import Reread, rereads, verdict
from tests.experiments.processes import run
from tests.experiments.test_throughput import experiment

EXPERIMENT = "benchmarks/cross_layer_reuse"


@pytest.mark.slow
def test_smoke_measures_and_draws_again(tmp_path):
    code, out, err = run(EXPERIMENT, "--smoke", "--out", "a", cwd=tmp_path)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "a/results.csv").read_text().splitlines()))
    assert [row["part"] for row in rows] == ["reads"] * 4 + ["step"] * 2
    assert [bool(row["halves"]) for row in rows] == [False, True, False, True, False, False]
    assert [bool(row["unshared"]) for row in rows] == [False] * 4 + [True] * 2
    assert {row["readers"] for row in rows if row["part"] == "step"} == {"3"}
    code, again, err = run(EXPERIMENT, "--from", "a/results.csv", "--out", "b", cwd=tmp_path)
    assert code == 0, err
    table = (tmp_path / "b/results.md").read_text()
    assert table == (tmp_path / "a/results.md").read_text()
    assert table in out
    assert table in again
    for name in ("rereads.png", "rereads.svg"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    code, _, err = run(EXPERIMENT, "--smoke", "--out", "a", cwd=tmp_path)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "exists already" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "--rows 3: .* the nearest is 2"),
        ({"models": ("tiny/MQA",)}, "tiny/MQA shares no K/V"),
        ({"sizes": (0,)}, "a size of 0"),
        ({"source": Path("none.csv")}, "none.csv holds no measurements"),
        ({}, "--smoke runs here"),
    ],
)
def test_refuses_before_any_work(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    module = experiment(f"{EXPERIMENT}.py")
    with pytest.raises(ValueError, match=message):
        module.main(module.Options(out=tmp_path / "out", **changes))
    assert not any(tmp_path.iterdir())


def test_readers_far_from_their_owners():
    module = experiment(f"{EXPERIMENT}.py")
    far = module.far_apart(model("tiny/MQA-CLA2"))
    assert far.sharing.owners == (0, 1, 2, 0, 1, 2)
    assert far.parameters == model("tiny/MQA-CLA2").parameters
    assert module.noise([5, 1, 2, 4, 30]) == 1.5


def test_a_chain_is_long_enough_and_its_orders_read_the_same():
    small = Chain.of(Heads(), 8, 512, 0)
    assert small.kv_bytes == 2 * 2**20
    assert small.layers * small.kv_bytes >= 180e6
    large = Chain.of(Heads(), 8, 131072, 84_000_000)
    assert (large.kv_bytes, large.layers) == (512 * 2**20, 2)
    for chain in (small, large):
        first, second = apart(chain), together(chain)
        assert sorted(first) == sorted(second) == sorted(2 * list(range(chain.layers)))
        assert np.diff(np.flatnonzero(first == 1)).tolist() == [chain.layers]
        assert np.diff(np.flatnonzero(second == 1)).tolist() == [1]
    assert large.weights * large.weight_bytes >= 180e6
    assert 4 * 16 * 128 * large.width == pytest.approx(84e6, rel=3e-3)
    halves = dataclasses.replace(large, halves=True)
    assert halves.parts == (4, 4)
    # Owner and reader of a half, then of the other, with the same weights; then the next layer.
    assert [halves.weights_of(read) for read in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]
    with pytest.raises(ValueError, match="3 rows cannot be halved"):
        compile_chain(Chain.of(Heads(4, 1, 32), 3, 16, 0, halves=True, rotation=1e3))


def test_a_chain_computes_what_its_order_says():
    chain = Chain(Heads(2, 1, 8), rows=2, length=8, weight_bytes=0, layers=2)
    compiled = compile_chain(chain).compiled
    # Values of layer 0 are 1, of layer 1 are 2: the last read decides.
    k = jnp.ones((2, 2, 8, 1, 8), jnp.bfloat16)
    v = k * jnp.asarray([1, 2], jnp.bfloat16)[:, None, None, None, None]
    q, lengths = jnp.ones((2, 1, 2, 8), jnp.bfloat16), jnp.full((2,), 8, jnp.int32)
    for order in (together(chain), apart(chain), np.array([1, 1, 0, 0], np.int32)):
        found = compiled(q, k, v, lengths, (), order)
        assert np.asarray(found, np.float32) == pytest.approx(1.0 + order[-1])


def row(size, together, **changes):
    known = Reread("reads", "16/1x128", size, 0, 10.0, 20.0, together, 0.5, attention="mosaic_gpu")
    return dataclasses.replace(known, **changes)


def test_the_finding_from_known_times(tmp_path):
    rows = [
        row(2_000_000, 16.0),
        row(64_000_000, 19.8),
        row(2_000_000, 20.2, weight_bytes=84_000_000, halves=19.0),
        row(
            2_000_000, 960.0, part="step", name="tiny/MQA-CLA2", apart=1000.0, readers=10,
            traced_first=8.0, traced_second=6.0, noise=4.0,
        ),
        row(2_000_000, 20.0, weight_bytes=14_000_000, noise=9.0),
    ]  # fmt: skip
    assert [r.ratio for r in rows[:4]] == pytest.approx([0.6, 0.98, 1.02, 0.6])
    assert [r.ratio_noise for r in rows[:4]] == pytest.approx([0.05, 0.05, 0.05, 0.04])
    assert rows[3].traced_ratio == 0.75
    said = verdict(rows).splitlines()
    assert said[0].startswith("Reads alone: the second read takes 0.60 of the first's time")
    assert said[0].endswith("less than 0.9 of it up to 2.0 MB.")
    assert said[1].startswith("14 MB between: too noisy to tell")
    assert said[2].startswith("84 MB between: no reuse: the second read takes 1.02")
    assert said[3].startswith("Step of tiny/MQA-CLA2: the second read takes 0.75")
    assert said[4].startswith("One half of the batch after the other takes 0.94 of the time")
    for known in rows:
        append_record(tmp_path / "rows.csv", known)
    assert read_records(tmp_path / "rows.csv", Reread) == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="holds no measurements"):
        read_records(tmp_path / "other.csv", Reread, "measurements of rereads")
    assert rereads(rows).axes
    for empty in (verdict, rereads):
        with pytest.raises(ValueError, match="no measurement"):
            empty([])
