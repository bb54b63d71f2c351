"""Attention maps of a group."""

import numpy as np
import pytest

from cla_jax.reporting.attention import attention_maps, overlap
from cla_jax.sharing import KVSharing

SHARING = KVSharing((0, 0, 2, 0))
WEIGHTS = [np.tril(np.full((1, 2, 5, 5), 1.0 + layer)) for layer in range(4)]
WEIGHTS = [w / w.sum(-1, keepdims=True) for w in WEIGHTS]


def test_a_row_of_panels_for_owner_and_readers():
    figure = attention_maps(WEIGHTS, SHARING, 0, list("hello"))
    assert len(figure.axes) == 3 * 2
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["layer 0 owns\nquery", "layer 1 reads\nquery", "layer 3 reads\nquery"]
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, np.sqrt(WEIGHTS[0][0, 0]))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == list("hello")
    assert "layers 1 and 3 share 100% and 100%" in figure.texts[0].get_text().replace("\n", " ")


def test_overlap():
    one = np.array([[[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]])
    other = np.array([[[1, 0, 0], [0, 1, 0], [0.6, 0.4, 0]]])
    assert overlap(one, one) == pytest.approx(1)
    assert overlap(one, other) == pytest.approx((0.5 + 0.5) / 2)


@pytest.mark.parametrize(
    ("weights", "owner", "tokens", "message"),
    [
        (WEIGHTS, 1, "hello", "layer 1 owns no K/V; the owners are 0, 2"),
        (WEIGHTS, 9, "hello", "layer 9 owns no K/V"),
        (WEIGHTS[:3], 0, "hello", "3 layers of weights; the map has 4"),
        (WEIGHTS, 0, "hell", "4 tokens were given for maps of 5"),
    ],
)
def test_refused(weights, owner, tokens, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(weights, SHARING, owner, list(tokens))
