# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside the cache
#
# What a decoding step writes and reads when layers share keys and values: the cache call by call,
# the attention maps of an owner and its readers over the same K/V, and memory against context.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cla_jax") is None:  # on Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "cla-jax"], check=True)

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Markdown, display

from cla_jax import model
from cla_jax.data import ByteTokenizer, EmbeddedCorpus, prepare_corpus, prepare_streams
from cla_jax.inference import KVCache, attention_weights, extend, prefill
from cla_jax.recipes import SCALES, recipe
from cla_jax.reporting.attention import attention_maps
from cla_jax.reporting.cache import cache_contents, cache_memory
from cla_jax.reporting.live import LiveCurves
from cla_jax.reporting.tables import Column, markdown
from cla_jax.training import train

# %% [markdown]
# ## A model to look into
#
# CLA3 on six layers: layers 0 and 3 own keys and values, two readers follow each. Half a minute of
# training on the source code of the standard library, so that its attention means something.

# %%
config = model("tiny/MQA-CLA3")
print(config.sharing.diagram())

work, tokenizer = Path(tempfile.mkdtemp()), ByteTokenizer()
corpus = prepare_corpus(EmbeddedCorpus(max_bytes=2**21), work / "data")
streams = prepare_streams(corpus, tokenizer, work / "data")
scale = dataclasses.replace(SCALES["tiny"], sequence_length=128, validation_tokens=10_000)
training = recipe(scale, tokens=200 * 1024, batch_size=8)

shown = display(Markdown("compiling ..."), display_id=True)
curves = LiveCurves(shown.update)
trained = train(
    config, training, streams, work / "run", resume=True, on_record=curves.watch(config, training)
)
decoder = trained.model(trained.params)

# %% [markdown]
# ## Decoding, step by step
#
# A batch of two prompts of different lengths. The cache is an explicit value: a call takes one and
# returns the next. `prefill` begins the rows, `extend` goes on with them; a row of width 0 is left
# as it is, so the second row stops a step before the first.

# %%
prompts = ["self.", "if"]
ids = [np.frombuffer(prompt.encode(), np.uint8) for prompt in prompts]
widths = np.array([len(row) for row in ids], np.int32)
tokens = np.zeros((2, widths.max()), np.int32)
for row, prompt in enumerate(ids):
    tokens[row, : len(prompt)] = prompt  # padded on the right

cache = KVCache.create(config, batch=2, length=12, dtype="float32")
logits, after = jax.jit(prefill)(decoder, tokens, cache, widths)
caches, calls, texts = [cache, after], ["prefill"], list(prompts)
for step in range(4):
    going = np.array([1, step < 3], np.int32)
    token = logits.argmax(-1)
    texts = [text + chr(int(t)) * int(g) for text, t, g in zip(texts, token, going, strict=True)]
    logits, after = jax.jit(extend)(decoder, token[:, None], caches[-1], going)
    caches.append(after)
    calls.append(f"decode {step + 1}")
print(texts, "lengths", caches[-1].lengths.tolist())

# %% [markdown]
# What each call has written, found in the arrays. Six layers have run every time; two of them have
# written. A row's length says how far its queries see: what padding has left behind it is never
# read, and the next token overwrites it.

# %%
display(cache_contents(caches, calls, config.sharing))

# %% [markdown]
# Cached decoding computes what one forward pass over the whole text computes:

# %%
whole = jnp.array([list(texts[0].encode())], jnp.int32)
difference = jnp.abs(decoder(whole)[0, -1] - logits[0]).max()
print(f"largest difference of the logits of row 0: {float(difference):.1e}")

# %% [markdown]
# ## The same keys, other queries
#
# Layers 0, 1 and 2 attend to the keys and values of layer 0. Each projects queries of its own, so
# each looks elsewhere.

# %%
text = "def read(self, size):\n  "
weights = attention_weights(decoder, jnp.array([list(text.encode())], jnp.int32))
characters = [{" ": "␣", "\n": "↵"}.get(character, character) for character in text]
display(attention_maps([np.asarray(w) for w in weights], config.sharing, 0, characters))

# %% [markdown]
# The second group, over the K/V of layer 3:

# %%
display(attention_maps([np.asarray(w) for w in weights], config.sharing, 3, characters))

# %% [markdown]
# ## Memory
#
# Readers own no bytes. The arrays that are allocated, beside the arithmetic, for the tiny models at
# 256 tokens:

# %%
variants = [model(f"tiny/{name}") for name in ("MHA", "MQA", "MQA-CLA2", "MQA-CLA3")]
rows = [(each, KVCache.create(each, batch=1, length=256).nbytes) for each in variants]
columns = (
    Column("model", "model", lambda row: row[0].name),
    Column("kv_layers", "KV layers", lambda row: row[0].kv_layers, "d"),
    Column("allocated", "allocated, bytes", lambda row: row[1], ",d"),
    Column("arithmetic", "256 x KV bytes per token", lambda r: 256 * r[0].kv_bytes_per_token, ",d"),
)
display(Markdown(markdown(rows, columns)))

# %% [markdown]
# At the paper's 1B scale, for one sequence. MQA takes out a factor of 16 (the KV heads), CLA2 and
# CLA3 two and nearly three more (the KV layers).

# %%
display(cache_memory([model(f"1B/H128-{name}") for name in ("MHA", "MQA", "MQA-CLA2", "MQA-CLA3")]))
