"""`cla-jax train`: a short run, and what it refuses."""

import json

import pytest


def short_run(folder, *, steps, rows):
    """Arguments that train a model on a text, which is written into the folder."""
    (folder / "my.txt").write_text("the cat sat on the mat.\n" * 100)
    return [
        "train", "tiny/MQA-CLA2", "--out", "runs/mine", "--text", "my.txt",
        "--training.steps", str(steps), "--training.data.sequence-length", "32",
        "--training.data.batch-size", str(rows), "--training.eval-tokens", "64",
        "--training.execution.compute-dtype", "float32",
    ]  # fmt: skip


def test_train_end_to_end(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = short_run(tmp_path, steps=3, rows=2)
    code, out, error = run(*arguments)
    assert code == 0, error
    result = json.loads((tmp_path / "runs/mine/result.json").read_text())
    assert (result["model"], result["steps"]) == ("tiny/MQA-CLA2", 3)
    assert f"{result['validation_perplexity']:.3f}" in out
    assert "step 3/3" in error  # progress, on standard error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.txt", "runs"]

    code, text, error = run("generate", "runs/mine", "--prompt", "the cat", "--max-new-tokens", "4")
    assert code == 0, error
    assert text.startswith("the cat")
    code, _, error = run("generate", "runs", "--prompt", "a", "b" * 500, "--out", "written.jsonl")
    assert code == 1
    assert "prompt 2 of 2 has 500 tokens; tiny/MQA-CLA2's sequence length is 256" in error

    code, _, error = run(*arguments)
    assert code == 1
    assert "--resume" in error
    code, again, error = run(*arguments, "--resume")
    assert code == 0, error
    assert again == out
    code, _, error = run(*arguments, "--resume", "--training.seed", "7")
    assert code == 1
    assert "training.seed: 0 there, 7 here" in error


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such text file", "my.txt"]),
        (b"", ["no bytes of text"]),
        (b"caf\xe9 " * 1000, ["not UTF-8", "offset 3", "iconv"]),
    ],
)
def test_train_refuses_text(run, tmp_path, monkeypatch, content, parts):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    code, _, error = run("train", "tiny/MQA", "--out", "out", "--text", "my.txt",
                         "--training.steps", "3")  # fmt: skip
    assert code == 1
    assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()


def test_train_refuses_an_unknown_model_before_it_reads_anything(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("train", "tiny/MQA-CLA9", "--out", "out", "--training.steps", "3")
    assert code == 1
    assert "'tiny/MQA-CLA9'" in error
    assert "tiny/MHA, tiny/MQA, tiny/MQA-CLA2, tiny/MQA-CLA3" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_train_and_generate_on_meshes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = short_run(tmp_path, steps=2, rows=4)
    code, _, error = run(*arguments, "--mesh", "fsdp=2,tensor=2")
    assert code == 0, error
    assert "mesh fsdp=2,tensor=2, 4 of 8 devices" in error
    prompt = ["generate", "runs/mine", "--prompt", "the cat", "--max-new-tokens", "4"]
    texts = [run(*prompt, *more) for more in ((), ("--mesh", "tensor=4"))]
    assert [code for code, _, _ in texts] == [0, 0]
    assert texts[0][1] == texts[1][1]


def test_meshes_are_refused_before_text_or_model_is_read(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "tiny/MQA-CLA2", "--out", "runs/mine", "--text", "none.txt", "--mesh"]
    generate = ["generate", "nowhere", "--prompt", "a", "--mesh"]
    for arguments, part in [
        ([*train, "fdsp=2"], "the nearest is 'fsdp'"), ([*train, "fsdp=64"], "what works: fsdp=8"),
        ([*generate, "tensor=2,tensor=4"], "tensor twice"),
        ([*train, "stage=2"], "separate layers that share K/V; stage counts that work: 1, 3"),
        ([*train, "stage=3", "--microbatches", "7"], "pipeline_microbatches=7 does not divide"),
        ([*train, "data=2", "--microbatches", "4"], "mesh data=2 has no stages"),
    ]:  # fmt: skip
        code, _, error = run(*arguments)
        assert code == 1
        assert part in error


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            ("--mesh", "data=2", "--training.mesh.fsdp", "4"),
            ["--mesh data=2 and --training.mesh.* (fsdp=4) both"],
        ),
        (  # what is named is the default
            ("--mesh=data=2", "--training.mesh.data=1"),
            ["--mesh data=2 and --training.mesh.* (none) both"],
        ),
        (
            ("--mesh", "stage=2", "--microbatches", "4",
             "--training.execution.pipeline-microbatches", "2"),
            ["--microbatches 4", "pipeline-microbatches 2 both"],
        ),
        (
            ("--mesh", "stage=2", "--microbatches", "4",
             "--training.execution.pipeline_microbatches", "0"),
            ["--microbatches 4", "pipeline-microbatches 0 both"],
        ),
    ],
)  # fmt: skip
def test_what_is_named_in_two_ways_is_refused(run, tmp_path, given, parts):
    code, _, error = run("train", "tiny/MQA", "--out", str(tmp_path / "run"), *given)
    assert code == 1
    assert all(part in error for part in parts), error
    assert not (tmp_path / "run").exists()
