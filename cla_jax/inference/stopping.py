"""The text of one row while its tokens arrive, and the stop strings that end it. Host-side only."""

from collections.abc import Callable, Sequence

__all__ = ["Decode", "RowText", "check_stop_strings"]

type Decode = Callable[[Sequence[int]], str]
"""Tokens to text, as a tokenizer's `decode`: what is no whole character becomes U+FFFD."""

_CONTEXT = 16  # of the prompt: enough for a decoder that looks at the token before


def check_stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings, if they can stop anything.

    Raises:
        ValueError: one string instead of several, or an empty one among them.
    """
    if isinstance(stops, str):
        raise ValueError(f"stop_strings={stops!r} is a single string: give a tuple, ({stops!r},)")
    if "" in stops:
        raise ValueError(
            f"stop_strings={tuple(stops)!r} holds an empty string, which would end every text at "
            "once: leave it out"
        )
    return tuple(stops)


class RowText:
    """One row's text, decoded as its tokens come in blocks of any size.

    The text ends before the first stop string to be complete; where two are complete at the same
    character, before the longer. That is decided character by character, so the result does not
    depend on how the text was cut into tokens and blocks.

    A block is decoded together with the block before it, so a long text costs no more per token
    than a short one. This relies on a property of tokenizers' decoders: more tokens only add to the
    text, except that U+FFFD at its end (half a character, so far) may become something else. Such
    an end is held back until it is settled.

    Args:
        decode: tokens to text.
        stops: stop strings.
        context: tokens before the row's first, such as its prompt. They are no part of the text,
            but some decoders drop a space at the very beginning.

    Attributes:
        stop: the stop string that was met, or None.

    Raises:
        ValueError: as `check_stop_strings`.
    """

    def __init__(
        self, decode: Decode, stops: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._decode, self._stops = decode, check_stop_strings(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._all = [int(token) for token in context[-_CONTEXT:]]
        self._prompt = len(self._all)
        self.stop: str | None = None
        self._text, self._taken, self._finished = "", 0, False
        # Where decoding may begin anew, (index in _all, characters): ends of blocks that fell
        # between two characters. Text is decoded from the last but one of them, so that it begins
        # in the midst of a text as it does in the whole.
        self._ends = [(0, 0), (self._prompt, 0)]

    @property
    def tokens(self) -> list[int]:
        """The tokens added; once stopped, those whose text is all before the stop string."""
        return self._all[self._prompt :]

    @property
    def text(self) -> str:
        """The text up to the stop string; without an unsettled end until `finish`."""
        return self._text

    def add(self, tokens: Sequence[int]) -> bool:
        """Take the row's next tokens.

        Returns:
            Whether a stop string was met; what is added from then on is ignored.
        """
        if self.stop is None:
            self._all += map(int, tokens)
            decoded = self._decoded(len(self._ends) - 1, len(self._all))
            self._settle(decoded.rstrip("\ufffd"))
            if self.stop is None and decoded and decoded[-1] != "\ufffd":
                self._ends.append((len(self._all), len(self._text)))
        return self.stop is not None

    def finish(self) -> None:
        """No more tokens come: what was held back belongs to the text."""
        if self.stop is None and not self._finished:
            self._settle(self._decoded(len(self._ends) - 1, len(self._all)))
        self._finished = True

    def take(self) -> str:
        """The text that may be printed and was not taken before.

        Until `finish` or a stop string, that leaves out an end that may yet become the beginning of
        a stop string.
        """
        end = len(self._text)
        if self.stop is None and not self._finished:
            end -= self._held()
        new = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return new

    def _decoded(self, place: int, count: int) -> str:
        """The text of the first `count` tokens behind `_ends[place]`."""
        begin, end = self._ends[place - 1][0], self._ends[place][0]
        known, text = self._decode(self._all[begin:end]), self._decode(self._all[begin:count])
        if not text.startswith(known):  # the prompt ended in half a character
            known = known.rstrip("\ufffd")
        return text[len(known) :]

    def _settle(self, new: str) -> None:
        """The text behind the last end is `new`; look for a stop string in what that adds."""
        before = len(self._text)
        end = self._ends[-1][1]
        if end + len(new) <= before:
            return
        self._text = self._text[:end] + new
        search = max(0, before - self._longest + 1)
        found = [
            (at + len(s), at, s) for s in self._stops if (at := self._text.find(s, search)) >= 0
        ]
        if found:
            _, start, self.stop = min(found)
            self._text = self._text[:start]
            del self._all[self._tokens_before(start) :]

    def _tokens_before(self, start: int) -> int:
        """How many tokens, the prompt's among them, have all their text before `start`."""
        place = max(i for i, (_, characters) in enumerate(self._ends) if characters <= start)
        end, characters = self._ends[place]
        for count in range(len(self._all), end, -1):
            if characters + len(self._decoded(place, count)) <= start:
                return count
        return end

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stops):
                return length
        return 0
