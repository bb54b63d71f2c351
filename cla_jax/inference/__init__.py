"""Generation."""

from cla_jax.inference.generate import check_prompt, greedy

__all__ = ["check_prompt", "greedy"]
