"""Evaluation: what models cost to train."""

from cla_jax.evaluation.measurements import Costs, measure_all, training_costs, training_costs_alone

__all__ = ["Costs", "measure_all", "training_costs", "training_costs_alone"]
