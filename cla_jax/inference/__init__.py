"""Generation."""

from cla_jax.inference.generate import greedy

__all__ = ["greedy"]
