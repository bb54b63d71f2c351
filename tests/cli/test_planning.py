"""`cla-jax plan`: what it prints and what it refuses."""

import importlib.util
import json

import pytest
import tyro

from cla_jax.cli.planning import Plan
from cla_jax.inference import planning
from cla_jax.registry import model


@pytest.fixture
def plan(capsys):
    """Runs the command; what it prints, without the line breaks of a narrow terminal."""

    def call(*arguments: str) -> str:
        tyro.cli(Plan, args=arguments).run()
        return " ".join(capsys.readouterr().out.split())

    return call


def test_prints_where_the_memory_goes_and_what_fits(plan, tmp_path):
    out = plan(
        "--model", "1B/H128-MQA-CLA2", "--memory", "141GB", "--context", "8192", "--batch", "64",
        "--bandwidth", "4.47TB/s", "--figure", str(tmp_path / "capacity"),
    )  # fmt: skip
    config, memory = model("1B/H128-MQA-CLA2"), 141 * 10**9
    batch = planning.largest_batch(config, 8192, memory)
    context = planning.longest_context(config, 64, memory)
    for part in ("weights 2.11 GB", "KV per token 5,120 B", "KV cache 2.68 GB 2,684,354,560 B",
                 "fits", f"largest batch {batch:,} at context 8,192",
                 f"longest context {context:,} at batch 64; trained on 2,048",
                 "decode floor 1.626 ms", "1.90 GB of weights and 5.37 GB of K/V",
                 "note: the model was trained on 2,048 tokens",
                 f"1B/H128-MQA-CLA2 10 5,120 {batch:,} {context:,}", "1B/H128-MQA 20 10,240",
                 "1B/H128-MQA-CLA3 7 3,584", "1B/H128-MQA-CLA4 5 2,560"):  # fmt: skip
        assert part in out, part
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capacity.png", "capacity.svg"]


def test_defaults_are_one_sequence_as_long_as_in_training(plan):
    out = plan("--model", "tiny/MQA", "--memory", "200MB", "--cache-dtype", "float32",
               "--patterns", "CLA6", "tiny/M?A")  # fmt: skip
    assert "tiny/MQA, batch 1, context 256, float32 cache, in 200.0 MB" in out
    assert "KV per token 1,536 B 6 of 6 layers own K/V" in out
    assert "decode floor" not in out
    assert "note:" not in out
    for part in ("tiny/MQA as CLA6 1 256", "tiny/MHA 6 6,144", "tiny/MQA 6 1,536"):
        assert part in out, part


def test_8_bit_caches_are_planned_with_their_scales(plan):
    out = plan("--model", "tiny/MQA", "--memory", "200MB", "--cache-dtype", "int8")
    assert "tiny/MQA, batch 1, context 256, int8 cache, in 200.0 MB" in out
    assert "KV per token 432 B 6 of 6 layers own K/V" in out


def test_says_when_the_batch_does_not_fit(plan):
    out = plan("--model", "1B/H128-MHA", "--memory", "3GB", "--context", "8192")
    assert "does not fit: " in out
    assert "largest batch 0 at context 8,192" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "1B/H128-MQX", "--memory", "1GB"], "unknown model.*1B/H128-MQA"),
        (["--model", "1B/H128-MQA", "--memory", "2GB"], "0 sequences fit into 2.00 GB.*2.12 GB"),
        (["--model", "1B/H128-MQA", "--memory", "lots"], "'lots' is no size"),
        (["--model", "1B/H128-MQA", "--memory", "9GB", "--batch", "0"], "batch=0"),
        (["--model", "1B/H128-MQA", "--memory", "9GB", "--context", "0"], "context=0"),
        (["--model", "1B/H128-MQA", "--memory", "9GB", "--patterns", "CLB2"], "'CLA2'"),
        (["--model", "1B/H128-MQA", "--memory", "9GB", "--bandwidth", "4Tb/s"], "unknown unit"),
        (["--model", "1B/H128-MQA", "--memory", "9GB", "--figure", "x.jpg"], "expected .png"),
    ],
)
def test_refuses(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


@pytest.mark.standard_dtype_promotion
def test_plan_mesh(run):
    arguments = ["plan-mesh", "--model", "tiny/MQA-CLA2", "--programs", "decode", "--mesh"]
    code, out, error = run(*arguments, "tensor=2", "--target", "cpu:2", "--json")
    assert code == 0, error
    (plan,) = json.loads(out)
    assert (plan["program"], plan["mesh"], plan["batch"]) == ("decode", "tensor=2", 2)
    assert plan["sent"]["tensor"] > 0
    code, out, _ = run(*arguments, "tensor=2", "--target", "cpu:2")
    assert code == 0
    assert "batch 2, context 256; of each device" in out
    code, out, error = run(*arguments, "tensor=2", "--target", "cpu:2", "--context", "300")
    assert code == 0, error
    assert "note: the model was trained on 256 tokens" in out
    if importlib.util.find_spec("libtpu") is None:
        code, _, error = run(*arguments, "fsdp=4", "--target", "v5e:2x2")
        assert code == 1
        assert "needs the libtpu package: pip install libtpu" in error


@pytest.mark.standard_dtype_promotion
def test_plan_mesh_of_a_presets_pipeline(run):
    """What `train` would run, but for what is named; of a pipeline nothing else is planned."""
    arguments = ["plan-mesh", "--model", "tiny/MQA-CLA3", "--mesh", "stage=2", "--target", "cpu:2",
                 "--preset", "tiny", "--context", "32"]  # fmt: skip
    code, out, error = run(*arguments, "--batch", "8", "--micro-batch", "4", "--json")
    assert code == 0, error
    (plan,) = json.loads(out)
    assert (plan["program"], plan["batch"], plan["context"]) == ("train", 8, 32)
    assert plan["schedule"] == {
        "rows": 4, "rows_per_device": 1, "stages": 2, "microbatches": 4, "bubble_percent": 25.0,
    }  # fmt: skip
    code, _, error = run(*arguments, "--microbatches", "3")
    assert code == 1
    assert "does not divide the 4 rows" in error
