"""`cla-jax models` and `diagram`: what they print and what they refuse."""

import csv

import pytest

from cla_jax.registry import model_names

HEADER = "name,parameters,kv_layers,kv_heads,head_dim,kv_bytes_per_token"


# --- models ---------------------------------------------------------------------------------------


def test_models_csv_prints_the_papers_figures(run):
    code, out, _ = run("models", "--csv")
    assert code == 0
    assert out.splitlines()[0] == HEADER
    rows = {row["name"]: row for row in csv.DictReader(out.splitlines())}
    assert tuple(rows) == model_names()
    # CLA Table 1 (bytes per token) and MLKV Table 2 (parameters).
    bytes_per_token = {"1B/H128-MHA": 163840, "1B/H128-MQA": 10240, "1B/H128-MQA-CLA2": 5120,
                       "1B/H512-MQA-CLA2": 20480, "1B/H46-MQA": 3680, "1B/H90-MQA-CLA2": 3600,
                       "1B/H128-MQA-CLA2-KeepEnds": 5632, "1B/H128-MQA-CLA3": 3584,
                       "1B/H128-MQA-CLA4": 2560, "3B/H64-MQA-CLA2": 4096}  # fmt: skip
    for name, figure in bytes_per_token.items():
        assert rows[name]["kv_bytes_per_token"] == str(figure), name
    for name, figure in {"MHA": 162322944, "MLKV-6": 162332556}.items():
        assert rows[f"pythia-160m/{name}"]["parameters"] == str(figure), name
    sizes = [rows["pythia-160m/MLKV-6"][key] for key in ("kv_layers", "kv_heads", "head_dim")]
    assert sizes == ["6", "1", "64"]


def test_models_filters_without_regard_to_case(run):
    _, out, _ = run("models", "H64-mqa-CLA", "--csv")
    names = [line.split(",")[0] for line in out.splitlines()[1:]]
    assert names == ["1B/H64-MQA-CLA2", "3B/H64-MQA-CLA2", "mini/H64-MQA-CLA2"]
    code, out, _ = run("models", "tiny/MQA-CLA2")
    assert code == 0
    assert "1,081,600" in out


def test_models_with_no_match(run):
    code, out, error = run("models", "zzz")
    assert (code, out) == (1, "")
    assert "'zzz'" in error
    assert any(name in error for name in model_names())


# --- diagram --------------------------------------------------------------------------------------


def drawn(out: str) -> list[str]:
    return [line.rstrip() for line in out.splitlines() if line.startswith("layer ")]


def test_diagram_of_a_pattern_puts_the_short_group_first(run):
    code, out, _ = run("diagram", "CLA3", "--layers", "10")
    assert code == 0
    lines = drawn(out)
    assert len(lines) == 10
    # Last layer on top: 9 = 1 + 3 + 3 + 3, owners 0, 1, 4, 7.
    assert ["KV  " in line for line in reversed(lines)] == [i in (0, 1, 4, 7) for i in range(10)]
    assert "4 KV layers" in out
    assert "6 readers" in out


def test_diagram_of_a_model(run):
    code, out, _ = run("diagram", "1B/H128-MQA-CLA2-KeepEnds")
    assert code == 0
    owners = ["KV  " in line for line in reversed(drawn(out))]
    assert owners == [i in (0, 19) or i % 2 == 1 for i in range(20)]


def test_diagram_of_explicit_owners_needs_no_depth(run):
    code, out, _ = run("diagram", "owners=0,0,0,3")
    assert code == 0
    assert ["KV  " in line for line in reversed(drawn(out))] == [True, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["1B/H128-MQA-CLA5"], ["'1B/H128-MQA-CLA5'", "1B/H128-MQA-CLA3"]),
        (["CLA9", "--layers", "4"], ["factor 9", "1 to 4", "nearest is 4"]),
        (["CLA0", "--layers", "4"], ["factor 0", "nearest is 1"]),
        (["CLB2", "--layers", "4"], ["'CLB2'", "nearest is 'CLA2'"]),
        (["owners=0,2,2"], ["layer 1", "layer 2", "nearest"]),
        (["owners=0,0,2", "--layers", "4"], ["maps 3 layers", "4"]),
        (["none", "--layers", "0"], ["num_layers=0"]),
        (["CLA2"], ["'CLA2'", "--layers"]),
    ],
)
def test_diagram_refuses(run, arguments, parts):
    code, out, error = run("diagram", *arguments)
    assert (code, out) == (1, "")
    assert error.startswith("cla-jax: ")
    assert all(part in error for part in parts), error
