"""`cla-jax generate`: prompts in, texts out, and what is refused before a model is loaded."""

import json

import pytest

from cla_jax import loading
from cla_jax.configs import MeshConfig
from cla_jax.loading import TextContinuation


class Shouting:
    """Stands in for a model: continues a prompt with itself in capitals, piece by piece."""

    def __init__(self):
        self.calls, self.loaded = [], []

    def check(self, prompts, max_new_tokens):
        if any(len(prompt) > 1000 for prompt in prompts):
            raise ValueError("a prompt is too long")
        return max(map(len, prompts)) + max_new_tokens

    def generate(self, prompts, *, on_text=None, **options):
        self.calls.append((list(prompts), options))
        if "fail" in prompts:
            raise ValueError("out of memory")
        for row, prompt in enumerate(prompts):
            for character in prompt.upper():
                if on_text:
                    on_text(row, character)
        return [TextContinuation(p, p.upper(), tuple(p.encode()), "length") for p in prompts]


@pytest.fixture
def model(monkeypatch):
    """What every run holds; `model.loaded` are the arguments it was loaded with."""
    shouting = Shouting()

    def load(path, **options):
        shouting.loaded.append((str(path), options))
        return shouting

    monkeypatch.setattr(loading, "load", load)
    return shouting


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_single_prompt_streams(run, model):
    code, out, error = run("generate", "runs/mine", "--prompt", "a\tb [red]é")
    assert (code, error) == (0, "")
    assert out == "a\tb [red]éA\tB [RED]É\n"
    assert model.loaded == [("runs/mine", {"tokenizer": None, "mesh": MeshConfig()})]
    assert model.calls[0][0] == ["a\tb [red]é"]


def test_options_reach_the_model(run, model):
    code, out, _ = run(
        "generate", "runs/mine", "--prompt", "one", "two", "--max-new-tokens", "7", "--temperature",
        "0.5", "--top-k", "3", "--top-p", "0.9", "--seed", "4", "--stop", "END", "\n",
        "--cache-dtype", "float32", "--tokenizer", "bytes", "--mesh", "tensor=4",
    )  # fmt: skip
    assert (code, out) == (0, "oneONE\n\ntwoTWO\n\n")
    assert model.loaded == [("runs/mine", {"tokenizer": "bytes", "mesh": MeshConfig(tensor=4)})]
    options = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4,
               "stop": ("END", "\n"), "cache_dtype": "float32", "first_row": 0,
               "room": 3 + 7}  # fmt: skip
    assert model.calls == [(["one", "two"], options)]


def test_a_model_cannot_steer_the_terminal(run, model):
    _, out, _ = run("generate", "runs/mine", "--prompt", "a\x1b[2J\x07b")
    assert out == "a\ufffd[2J\ufffdb" + "A\ufffd[2J\ufffdB\n"


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_files_of_prompts_in_batches(run, model, tmp_path, name):
    prompts = ["one", "é two", "three\u2028four", "{", "5"]
    lines = (
        prompts if name.endswith("txt") else [json.dumps({"id": 1, "prompt": p}) for p in prompts]
    )
    (tmp_path / name).write_bytes(("\r\n".join(lines) + "\n").encode())
    code, out, error = run("generate", "runs/mine", "--prompts", name, "--batch", "2",
                           "--out", "new/written.jsonl")  # fmt: skip
    assert (code, out) == (0, "")
    assert "wrote new/written.jsonl: 5 continuations" in error
    assert [(p, o["first_row"]) for p, o in model.calls] == [
        (prompts[:2], 0), (prompts[2:4], 2), (prompts[4:], 4),
    ]  # fmt: skip
    written = records(tmp_path / "new" / "written.jsonl")
    assert [r["prompt"] for r in written] == prompts
    assert written[1] == {
        "prompt": "é two", "text": "É TWO", "tokens": list("é two".encode()), "finished": "length",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["written.jsonl"]


def test_a_failure_leaves_what_was_written_and_says_where(run, model, tmp_path):
    code, _, error = run("generate", "runs/mine", "--prompt", "one", "two", "fail", "--batch", "2",
                         "--out", "out.jsonl")  # fmt: skip
    assert code == 1
    (partial,) = tmp_path.iterdir()
    assert f"2 of 3 continuations are in {partial.name}" in error
    assert [r["prompt"] for r in records(partial)] == ["one", "two"]
    code, _, error = run("generate", "runs/mine", "--prompt", "fail", "--out", "other.jsonl")
    assert (code, error) == (1, "cla-jax: out of memory")
    code, _, error = run("generate", "runs/mine", "--prompt", "one", "a" * 1001, "--batch", "1")
    assert (code, error) == (1, "cla-jax: a prompt is too long")
    assert list(tmp_path.iterdir()) == [partial]
    assert len(model.calls) == 3  # none for the prompts that were checked first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to continue: give --prompt"),
        (["--prompt", "a", "--prompts", "good.txt"], "give one of them"),
        (["--prompt", "a", ""], "--prompt: number 2 of 2 is empty"),
        (["--prompt", "a", "--batch", "0"], "--batch 0 must be at least 1"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens=-1"),
        (["--prompt", "a", "--stop", ""], "empty string"),
        (["--prompt", "a", "--out", "good.txt"], "good.txt exists already"),
        (["--prompts", "god.txt"], "there is no file god.txt; the nearest is good.txt"),
        (["--prompts", "prompts.csv"], "expected a .txt file"),
        (["--prompts", "empty.txt"], "empty.txt is empty"),
        (["--prompts", "gap.txt"], "gap.txt, line 2 is empty"),
        (["--prompts", "latin.txt"], "latin.txt is not UTF-8: byte 3"),
        (["--prompts", "key.jsonl"], 'key.jsonl, line 2 has no prompt: expected {"prompt"'),
        (["--prompts", "null.jsonl"], "null.jsonl, line 1: prompt is None"),
        (["--prompts", "cut.jsonl"], "cut.jsonl, line 2 is not JSON"),
    ],
)
def test_refuses_before_a_model_is_loaded(run, model, tmp_path, arguments, message):
    files = {
        "good.txt": b"a\n", "empty.txt": b"", "gap.txt": b"a\n\nb\n", "latin.txt": b"caf\xe9\n",
        "key.jsonl": b'{"prompt": "a"}\n{"promt": "b"}\n', "null.jsonl": b'{"prompt": null}\n',
        "cut.jsonl": b'{"prompt": "a"}\n{"prom',
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    code, out, error = run("generate", "runs/mine", *arguments)
    assert (code, out) == (1, "")
    assert error.startswith("cla-jax: ")
    assert message in error
    assert not model.loaded
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_refuses_a_place_without_a_run(run, tmp_path):
    (tmp_path / "runs").mkdir()
    code, _, error = run("generate", "rums", "--prompt", "a")
    assert code == 1
    assert "there is no rums; the nearest is" in error
    code, _, error = run("generate", "runs", "--prompt", "a", "--out", "out.jsonl")
    assert code == 1
    assert "there is no run in runs" in error
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
