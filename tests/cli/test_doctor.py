"""`cla-jax doctor`: what it prints, as a table and as JSON, and its exit codes."""

import json

import pytest

from cla_jax import environment
from cla_jax.environment import Choice, Device, Diagnosis, Package, Place

SOUND = Diagnosis(
    version="1.2.3",
    python="3.12.1",
    system="Linux 6, x86_64",
    packages=(Package("jax", "0.11.2", ">=0.11.2"), Package("wandb", None, ">=0.19", "tracking")),
    devices=(Device("NVIDIA H200", "gpu", 2, 10**11, "9.0"),),
    attention=(
        Choice("decoding", "bfloat16", "cudnn", "why [not]", (("xla", "slower"),)),
        Choice("decoding", "float32", "xla", "no 16-bit type"),
    ),
    places=(Place("runs", "/somewhere/[runs]", 5 * 10**9),),
    problems=(),
)


@pytest.fixture
def doctor(run, monkeypatch):
    """Runs the command on a machine as given."""

    def call(diagnosis: Diagnosis, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(environment, "diagnose", lambda: diagnosis)
        monkeypatch.setenv("COLUMNS", "200")
        return run("doctor", *arguments)

    return call


def test_a_sound_machine(doctor):
    code, out, error = doctor(SOUND)
    assert (code, error) == (0, "")
    for part in ("1.2.3", "Python 3.12.1", "0.11.2", "ok", "2 x NVIDIA H200",
                 "JAX may use 100.0 GB each", "capability 9.0", "why [not] (bfloat16)",
                 "not xla", "slower", "no 16-bit type (float32)", "/somewhere/[runs]",
                 "5.00 GB free", "wandb missing", "pip install 'cla-jax[tracking]'",
                 "Everything that is needed is here."):  # fmt: skip
        assert part in out, part


def test_a_machine_that_lacks_something(doctor):
    lame = environment.dataclasses.replace(
        SOUND, packages=(Package("jax", "0.4", ">=0.11.2"), Package("flax", None, "")),
        devices=(), attention=(), problems=("flax is missing; any version is needed",),
    )  # fmt: skip
    code, out, _ = doctor(lame)
    assert code == 1
    for part in ("wrong version", ">=0.11.2 is needed", "none: JAX does not start",
                 "problem: flax is missing"):  # fmt: skip
        assert part in out, part
    assert "Everything" not in out
    code, out, _ = doctor(lame, "--json")
    assert (code, json.loads(out)["problems"]) == (1, [*lame.problems])


def test_json(doctor):
    code, out, _ = doctor(SOUND, "--json")
    record = json.loads(out)
    assert code == 0
    assert [p["state"] for p in record["packages"]] == ["ok", "missing"]
    assert record["attention"][0]["others"] == {"xla": "slower"}
    assert record["devices"][0]["kind"] == "NVIDIA H200"
