"""Refusing what is none of the valid choices, with the nearest that is."""

import difflib
from collections.abc import Collection


def check_choice(field: str, value: object, choices: Collection[str]) -> None:
    """Whether `value` is one of `choices`.

    Args:
        field: what the message calls it.
        value: anything.
        choices: the valid names, in the order in which they are listed.

    Raises:
        ValueError: it is not; names value, choices and the nearest of them.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{field}={value!r}: expected one of {', '.join(choices)}; the nearest is {near!r}"
        )
