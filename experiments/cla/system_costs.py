"""CLA section 2.3 measured: what cross-layer sharing saves and costs beside the KV cache.

Paper: Brandon et al. 2024 (arXiv 2405.12981), section 2.3. Expected: the KV cache falls by the
sharing factor ("slightly less if the sharing factor does not evenly divide": CLA3 on 20 layers has
7/20); training memory, parameters and FLOPs fall slightly; Table 1 gives the bytes (10,240; 5,120).

    python experiments/cla/system_costs.py                          # the tiny models: a minute
    python experiments/cla/system_costs.py --smoke                  # two of them: seconds
    python experiments/cla/system_costs.py --models mini/H128-MQA 'mini/*' --batch-size 16 --gpu
    python experiments/cla/system_costs.py --models '1B/H128-MQA*' --batch-size 16 --gpu
    python experiments/cla/system_costs.py --models '1B/*' --repeats 0   # compile only, any machine

For each model, in a process of its own: KV bytes per token, parameters, FLOPs per token (formula
and XLA's count), the compiled step's memory, the device's peak, the median time of a training step.
Decode time is left out: it comes with cached inference. Models already measured are skipped.
"""

import dataclasses
from pathlib import Path

import tyro

from cla_jax.experiment import run_experiment
from cla_jax.recipes import SCALES
from cla_jax.registry import match_models, model


@dataclasses.dataclass(frozen=True)
class SystemCosts:
    """Measure what training steps of models cost; the first model is the baseline."""

    models: tuple[str, ...] = ("tiny/MQA", "tiny/*")
    """Full names or globs: '1B/H128-MQA*'. The first is what ratios are to."""
    batch_size: int = 8
    """Sequences per step."""
    sequence_length: int | None = None
    """Tokens of each. Default: the models' own."""
    gpu: bool = False
    """Run as at scale mini: bfloat16, segments unrolled, logits in chunks. Default: as at tiny."""
    repeats: int = 10
    """Timed steps. 0: compile alone; nothing is allocated, so the models may be larger than this
    machine."""
    out: Path = Path("runs/cla-system-costs")
    """Where measurements, table and figure go."""
    smoke: bool = False
    """Two models, two short sequences, three steps: seconds."""


def main(options: SystemCosts) -> int:
    """Measure, report; the number of models that failed."""
    patterns = ("tiny/MQA", "tiny/MQA-CLA2") if options.smoke else options.models
    names = dict.fromkeys(n for p in patterns for n in match_models(p.partition("/")[0], [p]))
    if not names:
        raise ValueError("no models: give names or globs, such as 'mini/*'")
    configs = [model(name) for name in names]
    batch, repeats = (2, 3) if options.smoke else (options.batch_size, options.repeats)
    length = 64 if options.smoke else options.sequence_length or configs[0].sequence_length
    for field, value, least in (("batch_size", batch, 1), ("sequence_length", length, 1),
                                ("repeats", repeats, 0)):  # fmt: skip
        if value < least:
            raise ValueError(f"{field}={value} must be at least {least}")
    # JAX takes seconds to import: not before the options are known to be good.
    from cla_jax.evaluation import measure_all
    from cla_jax.reporting.report import report, show

    out = options.out.with_name(options.out.name + "-smoke") if options.smoke else options.out
    scale = SCALES["mini" if options.gpu else "tiny"]
    failures = measure_all(
        configs, out / "costs.json", batch_size=batch, sequence_length=length,
        execution=scale.execution, repeats=repeats,
    )  # fmt: skip
    if len(failures) < len(configs):
        show(report([out]))
    return len(failures)


if __name__ == "__main__":
    run_experiment("system_costs", lambda: main(tyro.cli(SystemCosts, description=__doc__)))
