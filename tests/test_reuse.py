"""docs/reuse.md as a stranger would use it: what it prints, how little it changes, and that the
model it ends with computes what an independent implementation of CLA2 computes."""

import contextlib
import difflib
import inspect
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cla_jax import KV, KVCache, KVSharing, extend_layers, scan_layers, stack_layers
from cla_jax.models import attention

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "reuse.md").read_text("utf-8")
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
BLOCKS = [(code, printed) for code, printed in BLOCK.findall(PAGE)]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The page's names, after all its code ran, as a user's JAX is set; what it prints is there."""
    names: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for code, printed in BLOCKS:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "docs/reuse.md", "exec"), names)
            assert out.getvalue() == printed
    return names


def test_prints_what_it_says(page: dict[str, Any]):
    assert len(BLOCKS) >= 9
    assert page["choose_implementation"](page["q"], page["k"])[0] == page["implementation"]


def test_cla2_changes_at_most_fifteen_lines():
    before, after = (code.splitlines() for code, _ in (BLOCKS[0], BLOCKS[2]))
    assert before[0] == after[0] == "import jax"
    changed = [
        line for line in difflib.unified_diff(before, after, n=0) if re.match(r"\+(?!\+\+)", line)
    ]
    assert len(changed) <= 15, changed


def naive(weights: Any, tokens: jax.Array) -> jax.Array:
    """The page's model with CLA2, layer by layer, in plain einsum: `[B, T, V]`."""
    eps = 1e-6  # of nnx.RMSNorm

    def norm(w: Any, x: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * w["scale"][...]

    def linear(w: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("btd,de->bte", x, w["kernel"][...]) + w["bias"][...]

    B, T = tokens.shape
    x = weights["embed"]["embedding"][...][tokens] + weights["position"]["embedding"][...][:T]
    k = v = None
    for layer in range(6):
        w = jax.tree.map(lambda a, i=layer // 2: a[i], weights["blocks"][0][layer % 2])
        h = norm(w["norm"], x)
        q = linear(w["query"], h).reshape(B, T, 4, 16)
        if layer % 2 == 0:
            k, v = (linear(w[name], h).reshape(B, T, 4, 16) for name in ("key", "value"))
        assert k is not None
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 4
        scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(B, T, 64)
        x = x + linear(w["out"], mixed)
        x = x + linear(w["down"], jax.nn.gelu(linear(w["up"], norm(w["ffn_norm"], x))))
    return norm(weights["norm"], x) @ weights["embed"]["embedding"][...].T


@pytest.mark.standard_dtype_promotion
def test_gradients_equal_an_independent_implementation(page: dict[str, Any]):
    tokens = page["tokens"]
    weights = nnx.to_pure_dict(nnx.state(page["after"], nnx.Param))

    def ours(weights: Any) -> jax.Array:
        model = page["Transformer"](50, 64, 64, 4, 6, nnx.Rngs(0))
        nnx.update(model, weights)
        return (model(tokens)[0] ** 2).mean()

    with jax.numpy_rank_promotion("allow"):
        value, found = jax.value_and_grad(ours)(weights)
        expected, wanted = jax.value_and_grad(lambda w: (naive(w, tokens) ** 2).mean())(weights)
    assert np.isfinite(value)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(found):
        other = dict(jax.tree_util.tree_leaves_with_path(wanted))[path]
        np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-6 + 1e-4 * abs(other).max())


class Sum(nnx.Module):
    """The least of layers: K/V is its input, attention reads it."""

    def __init__(self, owns_kv: bool, rngs: nnx.Rngs) -> None:
        self.owns_kv = owns_kv
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (8,)))

    def __call__(self, x: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
        h = (x * self.scale[None, None, :])[:, :, None, :]
        if self.owns_kv:
            kv = KV(h, h).behind(kv)
        return x + kv.attend(h)[:, :, 0], kv


SHARINGS = [
    KVSharing.none(4), KVSharing.cla(5, 2), KVSharing((0, 1, 1, 0, 0)), KVSharing((0, 1, 0, 1, 4)),
]  # fmt: skip


@pytest.mark.parametrize("sharing", SHARINGS, ids=lambda s: "-".join(map(str, s.owners)))
@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (9, 1, 2)], ids=str)
def test_extending_equals_whole_sequences(
    sharing: KVSharing, stacked: bool, chunks: tuple[int, ...]
):
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))
    whole = scan_layers(Sum.__call__, sharing, layers, x)
    cache = KVCache.of_layers(
        sharing, 2, 12, kv_heads=1, head_dim=8, dtype="float32", stacked=stacked
    )
    outs, start = [], 0
    for width in chunks:
        out, cache = extend_layers(
            Sum.__call__, sharing, layers, x[:, start : start + width], cache
        )
        outs.append(out)
        start += width
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [12, 12])
    same, none = extend_layers(Sum.__call__, sharing, layers, x, None)
    assert none is None
    np.testing.assert_array_equal(same, whole)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("sharing", SHARINGS, ids=lambda s: "-".join(map(str, s.owners)))
def test_an_8_bit_cache_is_read_alike_however_tokens_come(sharing: KVSharing, dtype: str):
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))

    def extended(chunks: tuple[int, ...]) -> jax.Array:
        cache = KVCache.of_layers(sharing, 2, 12, kv_heads=1, head_dim=8, dtype=dtype)
        outs, start = [], 0
        for width in chunks:
            part = x[:, start : start + width]
            out, cache = extend_layers(Sum.__call__, sharing, layers, part, cache)
            outs.append(out)
            start += width
        return jnp.concatenate(outs, axis=1)

    together = extended((12,))
    np.testing.assert_allclose(extended((9, 1, 2)), together, rtol=2e-5, atol=2e-5)
    whole = scan_layers(Sum.__call__, sharing, layers, x)
    np.testing.assert_allclose(together, whole, atol=0.05 * np.abs(whole).max())


def test_rows_of_different_lengths():
    sharing, widths = KVSharing.cla(4, 2), (3, 5)
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    whole = scan_layers(Sum.__call__, sharing, layers, x)
    cache = KVCache.of_layers(sharing, 2, 6, kv_heads=1, head_dim=8, dtype="float32")
    _, cache = extend_layers(
        Sum.__call__, sharing, layers, x[:, :5], cache, jnp.array(widths, jnp.int32)
    )
    last = jnp.stack([x[row, width] for row, width in enumerate(widths)])[:, None]
    out, cache = extend_layers(Sum.__call__, sharing, layers, last, cache)
    for row, width in enumerate(widths):
        np.testing.assert_allclose(out[row, 0], whole[row, width], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [4, 6])


def forgetful(layer: Sum, x: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
    h = x[:, :, None, :]
    return x, KV(h, h) if layer.owns_kv else kv


def test_errors_that_name_the_layer():
    sharing = KVSharing.cla(4, 2)
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3, 8))

    def cache(sharing: KVSharing = sharing, kv_heads: int = 1) -> KVCache:
        return KVCache.of_layers(sharing, 2, 6, kv_heads=kv_heads, head_dim=8, dtype="float32")

    with pytest.raises(ValueError, match="layer 0 is an owner but returned KV: with a cache"):
        extend_layers(forgetful, sharing, layers, x, cache())
    with pytest.raises(ValueError, match="returned its entry as it was"):
        extend_layers(lambda p, x, kv: (x, kv), sharing, layers, x, cache())
    with pytest.raises(ValueError, match="4 KV layers for a map with 2 owners"):
        extend_layers(Sum.__call__, sharing, layers, x, cache(KVSharing.none(4)))
    with pytest.raises(ValueError, match=r"2 KV heads and head dim 8: expected \[2, T, 2, 8\]"):
        extend_layers(Sum.__call__, sharing, layers, x, cache(kv_heads=2))
    with pytest.raises(ValueError, match="3 queries a row attend to an entry to which 0"):
        extend_layers(lambda p, x, kv: (kv.attend(x[:, :, None]), kv), sharing, layers, x, cache())
    with pytest.raises(ValueError, match="goes into the layers as float32"):
        scan_layers(
            lambda p, x, kv: (x.astype(jnp.bfloat16), 0 if kv is None else kv),
            sharing, layers, x,
        )  # fmt: skip


def test_state_that_a_scan_would_lose_is_refused():
    class Dropping(Sum):
        def __init__(self, owns_kv: bool, rngs: nnx.Rngs) -> None:
            super().__init__(owns_kv, rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    sharing = KVSharing.cla(4, 2)
    layers = stack_layers(Dropping, sharing, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"holds Rng\w+ at .*dropout.*: carry it in x"):
        scan_layers(Sum.__call__, sharing, layers, jnp.ones((2, 3, 8)))


def test_heads_are_an_axis():
    """`jax.nn` would take `[B, T, D]` for one row of B tokens, and mix the batch."""
    x = jnp.ones((2, 6, 8))
    # Past the annotations, which only the tests check.
    unchecked = inspect.unwrap(attention._attention)
    with pytest.raises(ValueError, match=r"queries are \(2, 6, 8\): expected \[batch, length"):
        unchecked(x, KV._make((x, x)), None, is_causal=True)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([5, 4], "each must be 0 to the 4 tokens"),
        ([-1, 4], "each must be 0 to the 4 tokens"),
        ([4], "an integer for each of 2 rows"),
    ],
)
def test_widths_out_of_range(widths: list[int], message: str):
    sharing = KVSharing.cla(4, 2)
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    cache = KVCache.of_layers(sharing, 2, 6, kv_heads=1, head_dim=8, dtype="float32")
    with pytest.raises(ValueError, match=message):
        extend_layers(Sum.__call__, sharing, layers, jnp.ones((2, 4, 8)), cache, jnp.array(widths))


def test_a_stack_that_is_too_short_is_refused():
    """JAX would take the last layer again."""
    sharing = KVSharing.cla(6, 2)
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    layers[0][1] = jax.tree.map(lambda a: a[:2], layers[0][1])
    with pytest.raises(ValueError, match=r"segment 0, position 1 .*leading axis of 3 repeats"):
        scan_layers(Sum.__call__, sharing, layers, jnp.ones((2, 3, 8)))


@pytest.mark.parametrize("owners", [(0, 0, 2, 2), (0, 1, 2, 3, 3, 3, 3, 3)], ids=str)
def test_inside_shard_map(owners: tuple[int, ...]):
    """Also where K/V leave a scanned segment, in its carry."""
    sharing = KVSharing(owners)
    layers = stack_layers(Sum, sharing, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (8, 3, 8))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def run(x: jax.Array) -> jax.Array:
        return scan_layers(Sum.__call__, sharing, layers, x)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_allclose(jax.jit(sharded)(x), run(x), rtol=2e-5, atol=2e-5)
