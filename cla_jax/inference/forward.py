"""Forward passes that leave their K/V in a cache: whole prompts, chunks of them, single tokens.

One loop over the layers serves them all. Pure functions: `jax.jit` them and donate the cache. Given
the same tokens, every way of cutting them into calls gives the logits of the decoder's own forward
pass, to rounding.

Fast prefill. Let `m` be the last owner. Once the K/V of `m` is projected for every position,
nothing is cached any more, so from `m`'s query onward only the last position of each row is run,
unless the logits of all positions are asked for. CLA2 on 20 layers skips nearly two layers, the
shared upper half nearly half of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from cla_jax.inference.cache import KVCache, check_widths
from cla_jax.inference.entries import DECODE_QUERIES, attend_cached
from cla_jax.inference.quantization import StoredKV
from cla_jax.models import Decoder, attend
from cla_jax.models.rotary import Rotary, rotary
from cla_jax.models.sharding import constrain, laid_out_as, shards

type Row = int | Int[Array, ""]

# A row's residual stream lies where its K/V do, and its attention sends nothing.
_RESIDUAL = ("cache_batch", "length", "model")
_beside_cache = functools.partial(laid_out_as, batch="cache_batch", heads="cache_heads")


def prefill(
    decoder: Decoder,
    tokens: Int[Array, "b T"],
    cache: KVCache,
    widths: Int[Array, "b"] | np.ndarray | list[int] | None = None,
    *,
    first_row: Row = 0,
    all_logits: bool = False,
) -> tuple[Float[Array, "b V"] | Float[Array, "b T V"], KVCache]:
    """Begin rows of a cache: what they held before (finite numbers) is forgotten.

    Args:
        decoder: with its parameters; `Decoder.unstacked()` is faster.
        tokens: the beginnings of `b` rows, padded on the right with any ids.
        cache: with room for `T` tokens; donate it.
        widths: how many of the `T` tokens are the row's, 1 to `T` (traced ones are clipped to 0 to
            `T`); default all.
        first_row: the first of the `b` consecutive rows of the cache.
        all_logits: of every position, `[b, T, V]`, rather than each row's last.

    Returns:
        Logits, float32, and the cache with these rows begun.

    Raises:
        ValueError: a cache of another model, more rows or tokens than it has room for, widths
            out of range; some of the rows of a cache whose rows a mesh splits.
    """
    first_row, widths = _check(decoder, tokens, cache, widths, first_row)
    rows = first_row + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    begun = dataclasses.replace(cache, lengths=cache.lengths.at[rows].set(0))
    return _forward(decoder, tokens, begun, widths, first_row, all_logits, begins=True)


def extend(
    decoder: Decoder,
    tokens: Int[Array, "b T"],
    cache: KVCache,
    widths: Int[Array, "b"] | np.ndarray | list[int] | None = None,
    *,
    first_row: Row = 0,
    all_logits: bool = False,
) -> tuple[Float[Array, "b V"] | Float[Array, "b T V"], KVCache]:
    """Go on with rows of a cache: the next chunk of a prompt, or (`T` = 1) a step of decoding.

    Arguments, results and errors are those of `prefill`; but a row's width may be 0, which leaves
    the row as it is, and its logits then mean nothing. Tokens for which a row has no room are
    dropped: their logits mean nothing either.
    """
    first_row, widths = _check(decoder, tokens, cache, widths, first_row)
    return _forward(decoder, tokens, cache, widths, first_row, all_logits, begins=False)


def _check(
    decoder: Decoder, tokens: jax.Array, cache: KVCache, widths: Any, first_row: Any
) -> tuple[Row, jax.Array]:
    """Row and widths as arrays or numbers that are in range; traced values cannot be looked at."""
    cache.check(decoder.config)
    rows, length = tokens.shape
    if not 0 < rows <= cache.batch:
        raise ValueError(f"{rows} rows of tokens: the cache has {cache.batch}, expected 1 or more")
    if (parts := shards("cache_batch")) > 1 and rows != cache.batch:
        raise ValueError(
            f"{rows} rows of tokens for a cache of {cache.batch}, which a mesh splits by {parts}: "
            "expected tokens for all of its rows (a width of 0 leaves a row as it is)"
        )
    if not 0 < length <= cache.length:
        raise ValueError(
            f"{length} tokens a row: the cache has room for {cache.length}, expected 1 or more"
        )
    if not isinstance(first_row, Tracer):
        first_row = int(first_row)
        if not 0 <= first_row <= cache.batch - rows:
            raise ValueError(
                f"first_row={first_row}: {rows} rows of tokens begin at row 0 to "
                f"{cache.batch - rows} of a cache of {cache.batch}"
            )
    return first_row, check_widths(widths, rows, length)


def _forward(
    decoder: Decoder,
    tokens: Int[Array, "b T"],
    cache: KVCache,
    widths: Int[Array, "b"],
    first_row: Row,
    all_logits: bool,
    *,
    begins: bool,
) -> tuple[Float[Array, "b V"] | Float[Array, "b T V"], KVCache]:
    config, sharing = decoder.config, decoder.config.sharing
    rows, length = tokens.shape
    # Positions are needed where the cache's rows are: else every layer's rotation sends its angles.
    starts = jax.lax.dynamic_slice_in_dim(cache.lengths, first_row, rows)
    starts = constrain(starts, "cache_batch")
    steps = jnp.arange(length, dtype=jnp.int32)
    positions = starts[:, None] + steps[None, :]
    angles = rotary(positions, config.rotary, config.rope_theta, config.rope_scaling)
    seen = starts + jnp.int32(length)  # keys that the last query of each row sees
    # Padding may hold any id; one outside the vocabulary would be NaN, and 0 * NaN is NaN.
    ids = constrain(jnp.where(steps[None, :] < widths[:, None], tokens, 0), *_RESIDUAL[:2])
    # Ids are sent, rather than what `embed` makes of them before it looks them up.
    x = constrain(decoder.embed(constrain(ids, "batch", "length")), *_RESIDUAL)
    fresh: dict[int, StoredKV] = {}

    for index, slot in enumerate(sharing.cache_slots):
        layer = decoder.layer(index)
        h = layer.attention_norm(x)
        if sharing.owns(index):
            # What is read now is what will be read from the cache later.
            with _beside_cache():
                fresh[slot] = cache.stored(layer.keys_values(x, h, angles))
            write = cache.begin if begins else cache.write
            with jax.named_scope("cache_write"):
                cache = write(slot, fresh[slot], first_row)
        if index == sharing.owner_layers[-1] and not all_logits and length > 1:
            last = jnp.maximum(widths - 1, 0)[:, None]
            x, h = (jnp.take_along_axis(a, last[:, :, None], axis=1) for a in (x, h))
            angles = Rotary(*(jnp.take_along_axis(a, last[:, :, None], axis=1) for a in angles))
            seen = starts + widths
        if begins:
            stored, at = fresh[slot], 0
        elif rows == cache.batch:
            stored, at = cache.entry(slot)
        else:
            stored, at = cache.rows(slot, first_row, rows), 0

        def read(
            q: Float[Array, "b T N H"],
            stored: StoredKV = stored,
            at: Row = at,
            seen: jax.Array = seen,
        ) -> Float[Array, "b T N H"]:
            if begins and q.shape[1] > DECODE_QUERIES:
                return attend(q, stored.layer(0, q.dtype.name))
            return attend_cached(q, stored, seen, at)

        with jax.named_scope(f"layer_{index}"):
            with _beside_cache():
                attended = layer.attention(h, read, angles)
            x = constrain(layer.feed_forward(x, attended), *_RESIDUAL)

    logits = decoder.unembed(decoder.final_norm(x))
    if not all_logits:
        # A token is chosen where its row is: every device sorts rows of its own.
        logits = constrain(logits[:, 0], "cache_batch", None)
    return logits, cache.grown(widths, first_row)
