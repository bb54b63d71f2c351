"""CLA Table 1 and Figure 3: perplexity against KV bytes per token, over the design space.

Paper: Brandon et al. 2024 (arXiv 2405.12981), section 3.2.1. Twenty 1B models, 30 B tokens of
SlimPajama each in one order, learning rate 3e-4. Expected at 1B: H128-MQA 13.54 at 10,240 bytes
per token, H128-MQA-CLA2 13.60 at 5,120, H64-MQA 13.81 at 5,120; the table has all of them.

    python experiments/cla/design_space.py                            # tiny: minutes on two cores
    python experiments/cla/design_space.py --smoke --models MQA MQA-CLA2      # seconds
    python experiments/cla/design_space.py --scale mini --data DIR --seeds 0 1
    python experiments/cla/design_space.py --scale mini --data DIR --tokens 20e6 --models 'H128-*'
    python experiments/cla/design_space.py --scale 1B --data DIR      # the paper's recipe

Budget: tiny 4 models x 0.3 M tokens; mini 20 x 100 M; 1B 20 x 30 B. The same command goes on where
an interrupted one was; finished models are skipped. `cla-jax report OUT` draws again.
"""

import dataclasses
from typing import Literal

import tyro

from cla_jax.experiment import ExperimentOptions, check_seeds, run_experiment
from cla_jax.registry import model


@dataclasses.dataclass(frozen=True)
class DesignSpace(ExperimentOptions):
    """Train the models of CLA Table 1 on one data order; set them beside the paper's."""

    scale: Literal["tiny", "mini", "1B"] = "tiny"
    """tiny: minutes on a CPU; mini: one GPU; 1B: the paper's own recipe."""
    seeds: tuple[int, ...] = (0,)
    """Of the parameters; the data order is the same for all."""
    learning_rate: float | None = None
    """Peak. Default: the scale's (at 1B the paper's 3e-4)."""


def main(options: DesignSpace) -> int:
    """Train, report; the number of runs that failed."""
    names = options.names()
    check_seeds(options.seeds)
    training = {
        seed: options.recipe(learning_rate=options.learning_rate, seed=seed)
        for seed in options.seeds
    }
    streams = options.streams("cla-design-space")
    # JAX and Grain take seconds to import: not before the options are known to be good.
    from cla_jax.reporting.report import report, show
    from cla_jax.training.sweep import Entry, Sweep, failures

    directory = options.directory("cla-design-space")
    rate = training[options.seeds[0]].optimizer.learning_rate
    sweep = Sweep(
        directory, "cla-design-space", options.shared(streams, learning_rate=rate), streams
    )
    outcomes = sweep.run(
        [
            Entry(model(name), training[seed], f"{name.partition('/')[2]}/seed-{seed}")
            for seed in options.seeds
            for name in names
        ]
    )
    if any(outcome.result for outcome in outcomes):
        show(report([directory]))
    return failures(outcomes)


if __name__ == "__main__":
    run_experiment("design_space", lambda: main(tyro.cli(DesignSpace, description=__doc__)))
