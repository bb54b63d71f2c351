"""The cache as it is drawn: what was written by whom, and its bytes against the context."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from cla_jax.configs import ModelConfig
from cla_jax.inference import KVCache
from cla_jax.models import KV
from cla_jax.registry import model
from cla_jax.reporting.cache import _NEW, _OLD, _UNSEEN, cache_contents, cache_memory
from cla_jax.sharing import KVSharing

CONFIG = ModelConfig(
    name="toy", sharing=KVSharing((0, 0, 2)), d_model=8, ffn_dim=8, query_heads=2, kv_heads=1,
    head_dim=4, vocab_size=9,
)  # fmt: skip


def cells(axes) -> np.ndarray:
    """Colours `[G, S]`."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return np.array([to_hex(patch.get_facecolor()) for patch in patches]).reshape(2, -1)


@pytest.mark.parametrize("stacked", [False, True])
def test_new_old_and_padding(stacked):
    empty = KVCache.create(CONFIG, 2, 6, "float32", stacked=stacked)
    ones = jnp.ones((2, 3, 1, 4))
    begun = empty
    for slot in range(2):
        begun = begun.begin(slot, begun.stored(KV(ones, ones)))
    begun = begun.grown(jnp.array([3, 2]))  # row 1's third token is padding
    step = begun
    for slot in range(2):
        step = step.write(slot, step.stored(KV(2 * ones[:, :1], 2 * ones[:, :1])))
    step = step.grown(jnp.array([1, 1]))

    figure = cache_contents([empty, begun, step], ["prefill", "decode"], CONFIG.sharing)
    prefilled, decoded, prefilled_1, decoded_1 = (figure.axes[i] for i in (0, 2, 1, 3))
    blank = "#ffffff"
    for axes, expected in (
        (prefilled, [_NEW] * 3 + [blank] * 3),
        (decoded, [_OLD] * 3 + [_NEW] + [blank] * 2),
        (prefilled_1, [_NEW] * 2 + [_UNSEEN] + [blank] * 3),
        (decoded_1, [_OLD] * 2 + [_NEW] + [blank] * 3),
    ):
        assert cells(axes).tolist() == [expected] * 2
    assert prefilled.get_title() == "prefill\nrow 0: length 3"
    names = [label.get_text() for label in prefilled.get_yticklabels()]
    assert names == ["KV 0: layer 0, read by 1", "KV 1: layer 2"]


def test_one_cache_more_than_calls():
    empty = KVCache.create(CONFIG, 1, 4, "float32")
    with pytest.raises(ValueError, match="2 caches for 2 calls"):
        cache_contents([empty, empty], ["a", "b"], CONFIG.sharing)


def test_memory_against_context():
    names = ("1B/H128-MHA", "1B/H128-MQA-CLA2")
    figure = cache_memory([model(name) for name in names], 8192, batch=2)
    for name, line in zip(names, figure.axes[0].lines, strict=False):
        x, y = np.asarray(line.get_xydata()).T
        np.testing.assert_allclose(y, 2 * x * model(name).kv_bytes_per_token)
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert set(labels) == {"H128-MHA  2.68 GB", "H128-MQA-CLA2  83.9 MB"}
    with pytest.raises(ValueError, match="no models"):
        cache_memory([])
