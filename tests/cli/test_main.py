"""The command itself: help, wrong arguments, interrupts."""

import pytest

from cla_jax import cli


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("models",),
        ("diagram",),
        ("train",),
        ("report",),
        ("generate",),
        ("plan",),
        ("convert",),
        ("doctor",),
    ],
)
def test_help_gives_an_example(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    words = out.replace("│", " ").split()
    examples = {"models": "1B/", "diagram": "cla-jax diagram", "train": "cla-jax train",
                "report": "cla-jax report runs/", "generate": "cla-jax generate runs/mine",
                "plan": "cla-jax plan --model",
                "convert": "cla-jax convert EleutherAI/pythia-160m",
                "doctor": "cla-jax doctor --json"}  # fmt: skip
    expected = examples[command[0]] if command else "cla-jax train tiny/MQA-CLA2"
    assert expected in " ".join(words)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["modelz"], ["models"]),
        (["train", "tiny/MQA"], ["--out"]),
        (["train", "tiny/MQA", "--out", "x", "--training.steps", "0"], ["steps=0", "at least 1"]),
        (["train", "tiny/MQA", "--out", "x", "--training.stepz", "3"], ["--training.stepz"]),
    ],
)
def test_wrong_arguments_exit_with_2(run, arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(*arguments)
    assert code == 2
    assert all(part in error for part in parts), error
    assert not any(tmp_path.iterdir())


def test_an_interrupt_is_one_line(run, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Models, "run", interrupted)
    assert run("models") == (130, "", "cla-jax: interrupted\n")
