import sys

import jax
import pytest

from cla_jax import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; its exit code, standard output, and what it says of an error."""
    jax.devices()  # as many as all tests have: `plan-mesh --target cpu:2` would make them two

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cla-jax", *arguments])
        code, message = 0, ""
        try:
            cli.main()
        except SystemExit as exit_:
            # A string is printed to standard error and means exit code 1.
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
            message = exit_.code if isinstance(exit_.code, str) else ""
        captured = capsys.readouterr()
        return code, captured.out, message + captured.err

    return call
