"""Small models and a naive scorer for the tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.data import ByteTokenizer
from cla_jax.evaluation import Request
from cla_jax.loading import TextModel
from cla_jax.models import Decoder
from cla_jax.sharing import KVSharing
from tests.models import reference
from tests.models.test_decoder import config_of

CONTEXT = 40
PATTERNS = {"none": KVSharing.none(3), "CLA2": KVSharing.cla(4, 2), "MLKV": KVSharing.mlkv(5, 2)}


def text_model(seed: int = 0) -> TextModel:
    """Random parameters, over bytes."""
    config = config_of(PATTERNS["CLA2"], 1, vocab_size=259, sequence_length=CONTEXT)
    return TextModel(config, reference.decoder(config, seed=seed), ByteTokenizer())


class Naive:
    """Scores one sequence at a time, in float64, with the naive decoder.

    Sequences are padded to one length, on the right: a causal model does not see that.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.config, self.context = decoder.config, decoder.config.sequence_length
        with reference.double():
            self._params = jax.tree.map(
                lambda array: jnp.asarray(array, jnp.float64), reference.extract(decoder)
            )

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """`[T, V]` of what follows each token."""
        padded = np.zeros((1, self.context), np.int32)
        padded[0, : len(tokens)] = tokens
        with reference.double():
            logits = np.asarray(reference.logits(self.config, self._params, padded))
        logits = logits[0, : len(tokens)]
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def score(self, request: Request) -> tuple[float, bool]:
        """Log-likelihood and greediness, the context cut to what fits."""
        continuation = np.asarray(request.continuation)
        whole = np.concatenate([request.context, continuation])[-(self.context + 1) :]
        rows = self.log_probabilities(whole[:-1])[-len(continuation) :]
        chosen = rows[np.arange(len(continuation)), continuation]
        return float(chosen.sum()), bool((rows.argmax(-1) == continuation).all())
