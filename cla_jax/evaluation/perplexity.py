"""Perplexity of texts: per token, byte and word, with a stated stride."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from cla_jax.data.tokenizers import Tokenizer
from cla_jax.evaluation.scoring import Scorer, rolling_windows

__all__ = ["Perplexity", "perplexity"]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
        log_likelihood: of all tokens, nats.
        tokens: that were predicted.
        bytes: of the texts in UTF-8.
        words: pieces between white space, counted as lm-evaluation-harness counts them.
    """

    log_likelihood: float
    tokens: int
    bytes: int
    words: int

    @property
    def token_perplexity(self) -> float:
        """Depends on the tokenizer: not to be compared between tokenizers."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def byte_perplexity(self) -> float:
        """Of a byte; comparable between tokenizers."""
        return math.exp(-self.log_likelihood / self.bytes)

    @property
    def word_perplexity(self) -> float:
        """Of a word, as the CLA paper reports for Wikitext; infinite where it overflows."""
        try:
            return math.exp(-self.log_likelihood / self.words)
        except OverflowError:  # a hopeless model on long words
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """`log2` of the byte perplexity."""
        return -self.log_likelihood / self.bytes / math.log(2)


def perplexity(
    scorer: Scorer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity over texts, each on its own behind an end-of-text token.

    With the default stride the log-likelihood is that of lm-evaluation-harness's rolling requests.

    Args:
        scorer: of the model.
        tokenizer: the model's.
        texts: at least one that is not empty.
        stride: tokens that each window of `scorer.context` tokens adds, see `rolling_windows`.
        on_done: told how many windows each pass has finished.

    Raises:
        ValueError: no text, a stride out of range, or what `Scorer.score` raises.
    """
    if not any(texts):
        raise ValueError("no text to measure perplexity on: expected at least one character")
    encoded = tokenizer.encode_batch(texts)
    windows = [
        window
        for tokens in encoded
        for window in rolling_windows(tokens, tokenizer.end_of_text, scorer.context, stride)
    ]
    scores = scorer.score(windows, on_done)
    return Perplexity(
        log_likelihood=math.fsum(score.log_likelihood for score in scores),
        tokens=sum(map(len, encoded)),
        bytes=sum(len(text.encode()) for text in texts),
        words=sum(len(re.split(r"\s+", text)) for text in texts),
    )
