"""Merging against a loop over heads, and the order of heads that queries rely on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cla_jax.conversion import first, mean, merge_kv_heads
from cla_jax.sharing import KVSharing


@given(
    num_layers=st.integers(1, 7),
    kv_layers=st.integers(1, 7),
    kv_heads=st.integers(1, 3),
    per_head=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_mean_and_first_equal_a_loop_over_heads(
    num_layers: int, kv_layers: int, kv_heads: int, per_head: int, seed: int
):
    """Where KV layers do not divide the depth too: the groups are those of MLKV eq. 17."""
    kv_layers = min(kv_layers, num_layers)
    sharing = KVSharing.mlkv(num_layers, kv_layers)
    random, heads = np.random.default_rng(seed), kv_heads * per_head
    layers = [random.standard_normal((4, 2, heads, 3)) for _ in range(num_layers)]
    means = merge_kv_heads(layers, sharing, kv_heads, mean)
    firsts = merge_kv_heads(layers, sharing, kv_heads, first)
    assert list(means) == list(sharing.owner_layers)
    for group in range(kv_layers):
        members = [n for n in range(num_layers) if n * kv_layers // num_layers == group]
        for k in range(kv_heads):
            merged = [
                layers[n][:, :, head]
                for n in members
                for head in range(heads)
                if head // per_head == k
            ]
            found = means[members[0]][:, :, k]
            np.testing.assert_allclose(found, sum(merged) / len(merged), rtol=0, atol=1e-12)
            np.testing.assert_array_equal(firsts[members[0]][:, :, k], merged[0])


def test_a_group_of_four_weighs_each_head_a_quarter():
    heads = np.array([[1.0, 10.0, 100.0, 1000.0]], np.float32).reshape(1, 4, 1)
    merged = merge_kv_heads([heads], KVSharing((0,)), 1)
    assert merged[0].item() == 1111 / 4
    assert merged[0].dtype == np.float32


def test_sixteen_bit_means_are_rounded_once():
    heads = np.array([1.0, 2**-11, 2**-11], np.float16).reshape(1, 3, 1)
    exact = (1 + 2**-10) / 3
    assert merge_kv_heads([heads], KVSharing((0,)), 1)[0].item() == np.float16(exact)


def test_nothing_to_merge_changes_no_bit():
    layers = [np.random.default_rng(i).standard_normal((2, 4, 3)).astype("f2") for i in range(3)]
    for merge in (mean, first):
        merged = merge_kv_heads(layers, KVSharing.none(3), 4, merge)
        assert [merged[i].tobytes() for i in range(3)] == [layer.tobytes() for layer in layers]


def test_heads_and_layers_that_do_not_fit():
    layers = [np.zeros((4, 2))] * 3
    with pytest.raises(ValueError, match=r"kv_heads=3 does not divide the 4 .* is 2"):
        merge_kv_heads(layers, KVSharing.none(3), 3)
    with pytest.raises(ValueError, match=r"kv_heads=0 .* is 1"):
        merge_kv_heads(layers, KVSharing.none(3), 0)
    with pytest.raises(ValueError, match="3 layers were given; the map has 2"):
        merge_kv_heads(layers, KVSharing.none(2), 4)
