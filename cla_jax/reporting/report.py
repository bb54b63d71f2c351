"""Reports: a directory's tables and figures, by what the directory holds.

The experiments call this when they are done, and `cla-jax report` calls it again: it reads results
and trains nothing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cla_jax.reporting import figures
from cla_jax.reporting._files import write_atomically
from cla_jax.reporting.design_space import write_design_space
from cla_jax.reporting.downstream import FILE as EVALUATION
from cla_jax.reporting.downstream import Evaluation, load_evaluation, write_evaluations
from cla_jax.reporting.inference_costs import write_inference_costs
from cla_jax.reporting.learning_rates import write_learning_rates
from cla_jax.reporting.runs import Run, load_run
from cla_jax.reporting.sweeps import SweepRecord, load_sweep, side_by_side
from cla_jax.reporting.system_costs import write_system_costs
from cla_jax.reporting.tables import (
    COLUMNS,
    Written,
    comparison,
    csv_text,
    markdown,
    terminal_table,
)
from cla_jax.reporting.uptraining import write_uptraining

__all__ = ["report", "show", "write_comparison"]

_SWEEPS: Mapping[str, Callable[[SweepRecord, Path], Written]] = {
    "cla-design-space": write_design_space,
    "cla-learning-rates": write_learning_rates,
    "mlkv-uptrain": write_uptraining,
}


def report(
    directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> list[Written]:
    """Writes the tables and figures of sweeps, of measured costs, of evaluations or of runs.

    Runs are set beside each other in one table, the first as the baseline; so are evaluations. With
    `out`, sweeps of one experiment are parts of one sweep, set side by side as one.

    Args:
        directories: sweeps' (`sweep.json`), measured costs' (`costs.json`, `inference.json`),
            evaluations' (`evaluation.json`) or finished runs' (`result.json`).
        out: where to write. Default: a sweep's own directory, or a single evaluation's; for runs
            `runs/report`, for evaluations its folder `evaluations`. Of several experiments each
            gets a directory there, named as its first.

    Returns:
        What was written: of sweeps, of measured costs, then the evaluations' tables, last the
        runs' comparison.

    Raises:
        ValueError: a directory that holds none of these, an experiment that is not known, or
            sweeps of one experiment that are not parts of one; all are read before anything is
            written.
    """
    if not directories:
        raise ValueError("no directories to report on: give a sweep's, or those of finished runs")
    jobs = list[tuple[Callable[[Path], Written], Path]]()
    sweeps = dict[str, list[SweepRecord]]()
    runs, evaluations = list[Run](), list[Evaluation]()
    for directory in map(Path, directories):
        if (directory / "sweep.json").exists():
            sweep = load_sweep(directory)
            if sweep.experiment not in _SWEEPS:
                raise ValueError(
                    f"{directory}: experiment {sweep.experiment!r} is unknown; known are "
                    f"{', '.join(_SWEEPS)}"
                )
            sweeps.setdefault(str(directory) if out is None else sweep.experiment, []).append(sweep)
        elif (directory / "costs.json").exists():
            jobs.append((lambda to, at=directory: write_system_costs(at, to), directory))
        elif (directory / "inference.json").exists():
            jobs.append((lambda to, at=directory: write_inference_costs(at, to), directory))
        elif (directory / EVALUATION).exists():
            evaluations.append(load_evaluation(directory))
        elif (directory / "result.json").exists():
            runs.append(load_run(directory))
        else:
            raise ValueError(_nothing(directory))
    jobs = [_sweep_job(side_by_side(parts)) for parts in sweeps.values()] + jobs
    places = [place if out is None else Path(out) / place.name for _, place in jobs]
    if out is not None and len(jobs) == 1 and not runs and not evaluations:
        places = [Path(out)]
    if len(set(places)) < len(places):
        raise ValueError(f"two sweeps of one name would write to the same directory in {out}")
    written = [write(to) for (write, _), to in zip(jobs, places, strict=True)]
    if evaluations:
        alone = len(directories) == len(evaluations)
        if out is not None:
            place = Path(out) if alone else Path(out) / "evaluations"
        else:
            place = Path(directories[0] if len(directories) == 1 else "runs/report/evaluations")
        written.append(write_evaluations(evaluations, place))
    if runs:
        written.append(write_comparison(runs, Path("runs/report" if out is None else out)))
    return written


def _sweep_job(sweep: SweepRecord) -> tuple[Callable[[Path], Written], Path]:
    """What writes its report, and where by default."""
    write = _SWEEPS[sweep.experiment]
    return lambda to: write(sweep, to), sweep.directories[0]


def show(reports: Sequence[Written]) -> None:
    """Prints tables, and where the files are, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    for written in reports:
        console.print()
        console.print(written.table)
        for path in written.files:
            print(f"wrote {path}")


def write_comparison(runs: Sequence[Run], out: Path) -> Written:
    """Writes results.csv and .md, loss and pareto figures of runs; the first is the baseline."""
    rows = comparison(runs, baseline=runs[0])
    document = (
        f"# {len(runs)} runs\n\nRatios are to {runs[0].name} ({runs[0].directory.name}).\n\n"
        f"{markdown(rows, COLUMNS)}\n![loss](loss.png)\n\n![perplexity against the cache]"
        "(pareto.png)\n"
    )
    files = (
        write_atomically(out / "results.csv", csv_text(rows, COLUMNS).encode()),
        write_atomically(out / "results.md", document.encode()),
        *figures.save(figures.loss_curves(runs), out / "loss"),
        *figures.save(figures.pareto(runs), out / "pareto"),
    )
    return Written(files, terminal_table(rows, COLUMNS))


def _nothing(directory: Path) -> str:
    if not directory.is_dir():
        return f"no such directory: {directory}"
    below = sorted(path.parent for path in directory.glob("*/result.json"))
    hint = f"; give its runs instead: {directory}/*" if below else ""
    if (directory / "config.json").exists():
        hint = ": its run has not finished"
    return (
        f"{directory} holds neither a sweep (sweep.json) nor an evaluation ({EVALUATION}) nor a "
        f"finished run (result.json){hint}"
    )
