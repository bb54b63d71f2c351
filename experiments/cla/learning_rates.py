"""CLA Tables 3, 5 and 7 and Figures 4 and 5: is the comparison fair at each model's best rate?

Paper: Brandon et al. 2024 (arXiv 2405.12981), sections 3.2.2 and 3.3 and appendix A. From 3e-4
the learning rate climbs by x 1.5 (3e-4, 4.5e-4, 6.75e-4, 1e-3, 1.5e-3, 2.25e-3, ...) until a
model's validation perplexity stops improving. Expected, best rate and validation perplexity:

    1B, 30 B tokens (Table 3)    H128-MQA       1.5e-3   12.39
                                 H128-MQA-CLA2  2.25e-3  12.43
                                 H64-MQA        2.25e-3  12.74
    3B, 100 B tokens (Table 5)   H128-MQA       6.75e-4   9.52
                                 H128-MQA-CLA2  2.25e-3   9.34
                                 H64-MQA        1e-3      9.48
    3B at 1e-3 (Table 7)         Wikitext: H64-MQA 12.94, H64-MQA-CLA2 12.99, H32-MQA 13.34

    python experiments/cla/learning_rates.py                          # tiny: under an hour of CPU
    python experiments/cla/learning_rates.py --smoke --fixed 1e-3     # seconds
    python experiments/cla/learning_rates.py --scale mini --data DIR --tokens 20e6 --seeds 0 1
    python experiments/cla/learning_rates.py --scale 1B --data DIR    # Table 3, Figure 5
    python experiments/cla/learning_rates.py --scale 3B --data DIR    # Table 5, Figure 4
    python experiments/cla/learning_rates.py --scale 3B --data DIR --fixed 1e-3    # Table 7

Budget: four to seven runs a model and seed, each of all the scale's tokens in the paper; it names
no end, and the ladder goes on while it helps. With two seeds there is a measure of noise, and a
verdict. The same command goes on where an interrupted one was.
"""

import dataclasses
import math
from typing import Literal

import tyro

from cla_jax.experiment import ExperimentOptions, check_seeds, run_experiment
from cla_jax.recipes import climb
from cla_jax.registry import model

TUNED = ("H128-MQA", "H128-MQA-CLA2", "H64-MQA")
FIXED_3B = ("H64-MQA", "H64-MQA-CLA2", "H32-MQA")
TINY = ("MQA", "MQA-CLA2")


@dataclasses.dataclass(frozen=True)
class LearningRates(ExperimentOptions):
    """Climb the paper's ladder of learning rates with each model, or train at given ones."""

    scale: Literal["tiny", "mini", "1B", "3B"] = "tiny"
    """tiny: minutes on a CPU; mini: one GPU; 1B and 3B: the paper's own recipe."""
    start: float | None = None
    """Where the climb begins. Default: 3e-4, the paper's (tiny: 1e-3)."""
    fixed: tuple[float, ...] = ()
    """Train at these rates alone; 1e-3 at scale 3B is Table 7."""
    seeds: tuple[int, ...] = (0,)
    """Of the parameters, at every rate; the climb goes by their mean. The data order is the same
    for all."""

    def table(self) -> int:
        """Of the paper, to stand beside ours."""
        if self.scale != "3B":
            return 3
        return 7 if self.fixed else 5


def main(options: LearningRates) -> int:
    """Climb, report; the number of runs that failed other than by diverging."""
    table = options.table()
    default = TINY if options.scale == "tiny" else FIXED_3B if table == 7 else TUNED
    names = options.names(default)
    start = options.preset().first_rate if options.start is None else options.start
    for rate in options.fixed or (start,):  # refuses a bad one before anything is prepared
        options.recipe(learning_rate=rate)
    check_seeds(options.seeds)
    streams = options.streams("cla-learning-rates")
    # JAX and Grain take seconds to import: not before the options are known to be good.
    from cla_jax.reporting.report import report, show
    from cla_jax.reporting.tuning import format_rate
    from cla_jax.training.sweep import Entry, Outcome, Sweep, failures

    directory = options.directory("cla-learning-rates")
    shared = options.shared(streams, table=table)
    sweep = Sweep(directory, "cla-learning-rates", shared, streams)
    outcomes = list[Outcome]()

    def entry(name: str, rate: float, seed: int) -> Entry:
        training = options.recipe(learning_rate=rate, seed=seed)
        place = f"{name.partition('/')[2]}/lr-{format_rate(rate)}-seed-{seed}"
        return Entry(model(name), training, place)

    for number, name in enumerate(names, start=1):
        what = f"model {number} of {len(names)}{', seed' if len(options.seeds) > 1 else ''}"

        def perplexity_at(rate: float, name: str = name, what: str = what) -> float | None:
            tried = sweep.run([entry(name, rate, seed) for seed in options.seeds], what=what)
            outcomes.extend(tried)
            if any(outcome.diverged for outcome in tried):
                return math.inf
            losses = [outcome.result["validation_loss"] for outcome in tried if outcome.result]
            return math.exp(math.fsum(losses) / len(tried)) if len(losses) == len(tried) else None

        if options.fixed:
            for rate in options.fixed:
                perplexity_at(rate)
        else:
            climb(perplexity_at, start)
    if any(outcome.result for outcome in outcomes):
        show(report([directory]))
    return failures([o for o in outcomes if not o.diverged or options.fixed])


if __name__ == "__main__":
    run_experiment("learning_rates", lambda: main(tyro.cli(LearningRates, description=__doc__)))
