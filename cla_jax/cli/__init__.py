"""The `cla-jax` command: a thin face over the library.

A command is a dataclass: its fields are the options, its docstring the help, `run` does it. What is
slow to import is imported there, so that `--help` and wrong arguments are answered at once.
"""

import sys
import traceback
from typing import NoReturn

import tyro

from cla_jax.cli.conversion import Convert
from cla_jax.cli.data import PrepareData, TrainTokenizer
from cla_jax.cli.doctor import Doctor
from cla_jax.cli.evaluation import Evaluate, PerplexityOf
from cla_jax.cli.inference import Generate
from cla_jax.cli.models import Diagram, Models
from cla_jax.cli.planning import Plan, PlanMesh
from cla_jax.cli.training import Report, Train

__all__ = [
    "Convert",
    "Diagram",
    "Doctor",
    "Evaluate",
    "Generate",
    "Models",
    "PerplexityOf",
    "Plan",
    "PlanMesh",
    "PrepareData",
    "Report",
    "Train",
    "TrainTokenizer",
    "main",
]


def main() -> None:
    """Entry point of `cla-jax`.

    Exit codes: 0 done, 1 refused or failed, 2 wrong arguments, 130 and 143 stopped by Ctrl-C or
    SIGTERM (a training run has saved first).
    """
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {
                "models": Models,
                "diagram": Diagram,
                "prepare-data": PrepareData,
                "train-tokenizer": TrainTokenizer,
                "train": Train,
                "generate": Generate,
                "evaluate": Evaluate,
                "perplexity": PerplexityOf,
                "convert": Convert,
                "plan": Plan,
                "plan-mesh": PlanMesh,
                "report": Report,
                "doctor": Doctor,
            },
            prog="cla-jax",
            description="Train and measure transformers whose layers share keys and values.",
        )
        command.run()
    except (ValueError, FloatingPointError, OSError) as error:
        if _others_wait(error):
            print(f"cla-jax: {error}", file=sys.stderr)
            _leave(1)
        sys.exit(f"cla-jax: {error}")
    except KeyboardInterrupt as error:  # a training run's says where it was saved
        print(f"cla-jax: {str(error) or 'interrupted'}", file=sys.stderr)
        code = getattr(error, "exit_code", 130)
        if _others_wait(error):
            _leave(code)
        sys.exit(code)
    except Exception as error:
        if not _others_wait(error):
            raise
        traceback.print_exc()
        _leave(1)


def _others_wait(error: BaseException) -> bool:
    """Whether this is one of several processes, and the others do not know of the error."""
    if "jax" not in sys.modules:
        return False
    import jax

    if not jax.distributed.is_initialized():
        return False
    from cla_jax.parallel.processes import AgreedError
    from cla_jax.training.interruption import Interrupted

    return not isinstance(error, AgreedError | Interrupted)


def _leave(code: int) -> NoReturn:
    """At once: an orderly exit of one process waits for the others, which wait for it."""
    from cla_jax.parallel.processes import leave

    leave(code)
