"""Evaluation: how well models predict, and what they cost to train and to run.

`cla_jax.evaluation.harness` connects to lm-evaluation-harness and is imported by name: it alone
needs the extra `eval`.
"""

from cla_jax.evaluation.measurements import Costs, measure_all, training_costs, training_costs_alone
from cla_jax.evaluation.perplexity import Perplexity, perplexity
from cla_jax.evaluation.scoring import Request, Score, Scorer, rolling_windows

__all__ = [
    "Costs",
    "Perplexity",
    "Request",
    "Score",
    "Scorer",
    "measure_all",
    "perplexity",
    "rolling_windows",
    "training_costs",
    "training_costs_alone",
]
