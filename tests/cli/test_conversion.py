"""`cla-jax convert`: what it writes, what it prints, and what it refuses before it reads."""

import json
import os
import signal
from pathlib import Path

import pytest

from cla_jax.cli.conversion import Convert
from cla_jax.conversion import load_huggingface
from tests.conversion.checkpoints import written


def test_converts_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = written(tmp_path / "pythia", "gpt_neox/plain")
    (source / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    Convert(str(source), "owners=0,0,2", out, kv_heads=1, match_params=True).run()
    printed = capsys.readouterr().out
    assert "kv bytes per token" in printed
    assert "note" not in printed
    assert f"wrote {out}" in printed
    config = load_huggingface(out).config
    assert config.sharing.owners == (0, 0, 2)
    assert config.kv_heads == 1
    assert (out / "tokenizer.json").exists()
    assert json.loads((out / "config.json").read_text())["sharing_pattern"] == [0, 0, 2]


def test_entries_that_are_not_known_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = {"clip_qkv": 8.0, "scales": [1] * 99, "use_cache": True}
    source = written(tmp_path / "llama", **more)
    Convert(str(source), "CLA3", tmp_path / "out").run()
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert "clip_qkv=8.0, scales=[1, 1, 1" in note
    assert note.endswith("...")
    assert "use_cache" not in note


def test_mean_and_first_differ(tmp_path: Path):
    source = written(tmp_path / "llama")
    Convert(str(source), "MLKV-1", tmp_path / "mean").run()
    Convert(str(source), "MLKV-1", tmp_path / "first", merge="first").run()
    kernels = [
        load_huggingface(tmp_path / n).params["layers"][0][0]["kv_projection"]["projection"]
        for n in ("mean", "first")
    ]
    assert kernels[0]["kernel"].shape == kernels[1]["kernel"].shape
    assert (kernels[0]["kernel"] != kernels[1]["kernel"]).any()


def test_it_is_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = written(tmp_path / "llama")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    Convert(str(source), "owners=0,0,2", tmp_path / "link").run()
    assert load_huggingface(tmp_path / "real").config.sharing.owners == (0, 0, 2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the working directory"):
        Convert("../llama", "owners=0,0,2", Path()).run()


def test_sigterm_leaves_nothing_and_has_its_own_exit_code(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = written(tmp_path / "llama")
    monkeypatch.setattr(
        "cla_jax.conversion.safetensors_io.write_checksums",
        lambda _: os.kill(os.getpid(), signal.SIGTERM),
    )
    before = signal.getsignal(signal.SIGTERM)
    arguments = ("convert", str(source), "--sharing", "none", "--out", str(tmp_path / "out"))
    assert run(*arguments) == (143, "", "cla-jax: stopped by SIGTERM\n")
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_refuses_before_it_reads(tmp_path: Path):
    source = written(tmp_path / "llama")
    (source / "model.safetensors").unlink()  # reading would fail first
    cases = {
        "unknown KV sharing 'CLAX'": Convert(str(source), "CLAX", tmp_path / "out"),
        "maps 2 layers; the model has 3": Convert(str(source), "owners=0,0", tmp_path / "out"),
        "kv_heads=4 does not": Convert(str(source), "CLA2", tmp_path / "out", kv_heads=4),
        "exists already": Convert(str(source), "CLA2", source),
        "config.json is a file": Convert(str(source), "CLA2", source / "config.json" / "out"),
        "--seed -1: expected 0 or more": Convert(str(source), "CLA2", tmp_path / "out", seed=-1),
        "no directory .*the nearest is": Convert(str(tmp_path / "lama"), "CLA2", tmp_path / "out"),
    }
    for message, command in cases.items():
        with pytest.raises(ValueError, match=message):
            command.run()
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
