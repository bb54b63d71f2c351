"""What `diagnose` finds: packages against their requirements, devices, attention paths."""

import importlib.metadata
import json
from types import SimpleNamespace

import jax
import pytest

from cla_jax import environment
from cla_jax.environment import Device, Package, diagnose, packages

INSTALLED = {"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.11.0", "jax-cuda13-plugin": "0.11.2",
             "lm-eval": "0.4.13", "rich": "14.0.1.dev3"}  # fmt: skip
ASKED_BY_JAX = [
    "jaxlib<=0.11.2,>=0.11.2",
    "jax-cuda13-plugin<=0.11.2,>=0.11.2; extra == 'cuda13'",
    "jax-rocm7-plugin==0.11.2; extra == 'rocm7'",
]


@pytest.fixture
def installed(monkeypatch):
    """Only `INSTALLED` is there; a test may change it."""
    there = dict(INSTALLED)

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ASKED_BY_JAX if name == "jax" else None
    )
    return there


@pytest.mark.parametrize(
    ("version", "wanted", "state"),
    [
        (None, ">=1", "missing"),
        ("0.9", ">=1", "wrong version"),
        ("2.0", "<=1.5,>=1", "wrong version"),
        ("1.0", ">=1", "ok"),
        ("2.0rc1", ">=1", "ok"),
        ("5", "", "ok"),
    ],
)
def test_state_of_a_package(version, wanted, state):
    assert Package("x", version, wanted).state == state


def test_requirements_and_extras(installed):
    found = packages([
        "jax>=0.11.2", "flax>=0.12", "grain>=0.2", "rich>=13",
        "jax[cuda13]>=0.11.2; extra == 'cuda'", "lm-eval>=0.4.13; extra == 'eval'",
        "wandb>=0.19; extra == 'tracking'", "ruff>=1; extra == 'dev'",
        "winonly>=1; sys_platform == 'no-such-system'",
    ])  # fmt: skip
    states = {p.name: (p.extra, p.version, p.state) for p in found}
    assert states == {
        "flax": (None, "0.11.0", "wrong version"),
        "grain": (None, None, "missing"),
        "jax": (None, "0.11.2", "ok"),
        "jaxlib": (None, "0.11.2", "ok"),
        "rich": (None, "14.0.1.dev3", "ok"),
        "jax-cuda13-plugin": ("cuda", "0.11.2", "ok"),
        "lm-eval": ("eval", "0.4.13", "ok"),
        "wandb": ("tracking", None, "missing"),
    }


def test_only_what_is_needed_is_a_problem(installed, monkeypatch):
    declared = ["flax>=0.12", "grain>=0.2", "rich>=13", "wandb>=0.19; extra == 'tracking'"]
    monkeypatch.setattr(environment, "_declared", lambda: ("1.2", declared))
    assert diagnose().problems == (
        "flax is 0.11.0; >=0.12 is needed", "grain is missing; >=0.2 is needed"
    )  # fmt: skip


def test_this_machine():
    found = diagnose()
    assert found.problems == ()
    assert {"jax", "jaxlib", "flax"} <= {p.name for p in found.packages if p.state == "ok"}
    assert found.devices == (Device("cpu", "cpu", len(jax.devices())),)
    assert {c.operation for c in found.attention} == {"training, prefill", "decoding"}
    assert {c.taken for c in found.attention} == {"xla"}
    decoding = [c for c in found.attention if c.operation == "decoding"]
    for choice in decoding:
        assert "no NVIDIA GPU" in choice.reason
        assert "cannot run on cuDNN" in dict(choice.others)["cudnn"]
    assert json.loads(json.dumps(found.to_dict()))["packages"][0]["state"] == "ok"


def test_a_gpu(monkeypatch):
    """A fake one of compute capability 9.0: devices are grouped, and the paths are those of it."""
    gpu = SimpleNamespace(
        device_kind="NVIDIA H200", platform="gpu", compute_capability="9.0",
        memory_stats=lambda: {"bytes_limit": 10**11},
    )  # fmt: skip
    monkeypatch.setattr(jax, "devices", lambda: [gpu, gpu])
    found = diagnose()
    assert found.devices == (Device("NVIDIA H200", "gpu", 2, 10**11, "9.0"),)
    taken = {(c.operation, c.inputs): (c.taken, c.reason) for c in found.attention}
    assert taken["training, prefill", "bfloat16, head dim 128"] == ("cudnn", "fused")
    assert taken["training, prefill", "bfloat16, head dim 512"][0] == "xla"
    assert taken["decoding", "bfloat16, head dim 128, 1 query"][0] == "mosaic_gpu"
    assert taken["decoding", "bfloat16, head dim 128, 4 queries"][0] == "mosaic_gpu"
    assert "head dim 512" in taken["decoding", "bfloat16, head dim 512, 1 query"][1]
    others = {c.inputs: dict(c.others) for c in found.attention if c.operation == "decoding"}
    assert "mask" in others["bfloat16, head dim 128, 4 queries"]["cudnn"]


def test_jax_that_does_not_start(monkeypatch):
    def devices():
        raise RuntimeError("no backend\nand a long story")

    monkeypatch.setattr(jax, "devices", devices)
    found = diagnose()
    assert found.problems == ("JAX does not start: no backend",)
    assert found.devices == found.attention == ()
