"""What a function does, read from its jaxpr."""

import itertools
from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation in order, those of inner jaxprs behind the one that holds them."""
    for equation in jaxpr.eqns:
        yield equation
        values = itertools.chain.from_iterable(
            value if isinstance(value, tuple | list) else [value]
            for value in equation.params.values()
        )
        for value in values:
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
