"""Refusing what is none of the valid choices, with the nearest that is."""

import difflib
from collections.abc import Collection

_ALIKE = 0.8  # of two spellings, as difflib compares them


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


def resembled(name: str, known: Collection[str]) -> str:
    """In brackets, for a message: the known name that one may be a misspelling of; or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=_ALIKE)
    return f" (the nearest that is known is {near[0]})" if near else ""
