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
# # What is shared
#
# In a decoder, every layer attends to keys and values. A layer either **owns** them (it projects
# and caches them) or **reads** those of an earlier layer. The cache holds the owners' alone, so the
# list of owners decides how large it is.
#
# This notebook draws the patterns of the CLA and MLKV papers, does the cache arithmetic, and sets
# it beside the papers' tables. It needs no accelerator and trains nothing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cla_jax") is None:  # on Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "cla-jax"], check=True)

# %%
from IPython.display import Markdown, display

from cla_jax import KVSharing, model, model_names
from cla_jax.reporting import papers
from cla_jax.reporting.design_space import paper_design_space
from cla_jax.reporting.patterns import patterns
from cla_jax.reporting.tables import Column, markdown

# %% [markdown]
# ## A sharing map
#
# CLA with sharing factor 2 (CLA2), on six layers: layers 0, 2 and 4 own, each layer above one
# reads.

# %%
sharing = KVSharing.cla(num_layers=6, factor=2)
print(sharing.owners, "\n")
print(sharing.diagram())

# %% [markdown]
# Everything else follows from that tuple: how many layers are cached, what the model scans over,
# and where a pipeline may be cut without separating layers that share.

# %%
print("KV layers:", sharing.kv_layers, "of", sharing.num_layers)
print("cache slot of each layer:", sharing.cache_slots)
print("pipeline stages that split no group:", sharing.pipeline_stages)

# %% [markdown]
# ## The papers' patterns
#
# Twenty layers, as in CLA's 1B models. Readers are outlines; a line joins them to their owner.

# %%
variants = (
    "MQA",
    "MQA-CLA2",
    "MQA-CLA3",
    "MQA-CLA2-KeepEnds",
    "MQA-CLA2-DenseFront",
    "MQA-CLA2-DenseBack",
)
display(patterns([model(f"1B/H128-{variant}") for variant in variants]))

# %% [markdown]
# ## Cache arithmetic
#
# A cached token takes keys and values (2) of `G` KV layers, `K` KV heads and head dim `H`, at 2
# bytes each. Sharing within a layer (GQA, MQA) lowers `K`; sharing across layers lowers `G`; the
# two multiply.

# %%
config = model("1B/H128-MQA-CLA2")
G, K, H = config.kv_layers, config.kv_heads, config.head_dim
print(f"2 x G={G} x K={K} x H={H} x 2 bytes = {2 * G * K * H * 2:,} bytes per token")
assert config.kv_bytes_per_token == 2 * G * K * H * 2

# %% [markdown]
# ## CLA Table 1
#
# The twenty models of the paper's design space: our arithmetic beside the bytes and perplexities
# that the paper prints.

# %%
design_space = [(model(f"1B/{variant}"), result) for variant, result in papers.CLA_TABLE_1.items()]
columns = (
    Column("model", "model", lambda row: row[0].name),
    Column("kv_layers", "KV layers", lambda row: row[0].kv_layers, "d"),
    Column("kv_heads", "KV heads", lambda row: row[0].kv_heads, "d"),
    Column("head_dim", "head dim", lambda row: row[0].head_dim, "d"),
    Column("ours", "KV bytes per token", lambda row: row[0].kv_bytes_per_token, ",d"),
    Column("theirs", "the paper's", lambda row: row[1].kv_bytes_per_token, ",d"),
    Column("perplexity", "the paper's perplexity", lambda row: row[1].perplexity, ".2f"),
)
display(Markdown(markdown(design_space, columns)))
same = sum(
    config.kv_bytes_per_token == result.kv_bytes_per_token for config, result in design_space
)
print(f"bytes agree in {same} of {len(design_space)} rows")

# %% [markdown]
# Down and to the left is better: fewer bytes, lower perplexity. At equal bytes, a CLA2 model with
# larger heads beats one without cross-layer sharing, down to the smallest caches.

# %%
display(paper_design_space())

# %% [markdown]
# ## MLKV Table 2
#
# MLKV counts KV heads over all layers together: `MLKV-6` is six KV layers of one head. These are
# Pythia-160M, converted and trained a little more; the loss is the paper's, at the end.

# %%
mlkv = [(model(f"pythia-160m/{variant}"), result) for variant, result in papers.MLKV_160M.items()]
columns = (
    Column("model", "model", lambda row: row[0].name),
    Column("kv_layers", "KV layers", lambda row: row[0].kv_layers, "d"),
    Column("kv_heads", "KV heads a layer", lambda row: row[0].kv_heads, "d"),
    Column("bytes", "KV bytes per token", lambda row: row[0].kv_bytes_per_token, ",d"),
    Column("parameters", "parameters", lambda row: row[0].parameters, ",d"),
    Column("loss", "the paper's loss", lambda row: row[1].loss, ".4f"),
    Column("accuracy", "the paper's accuracy, %", lambda row: row[1].accuracy, ".2f"),
)
display(Markdown(markdown(mlkv, columns)))

# %% [markdown]
# ## A map of your own
#
# Any list of owners will do, as long as an owner comes before its readers and reads from nobody
# itself.

# %%
print(KVSharing((0, 1, 1, 1, 4, 4)).diagram(), "\n")
try:
    KVSharing((0, 0, 1, 3))
except ValueError as error:
    print(error)

# %% [markdown]
# All models that the library knows by name:

# %%
scales = dict.fromkeys(name.partition("/")[0] for name in model_names())
for scale in scales:
    names = [name.partition("/")[2] for name in model_names() if name.startswith(f"{scale}/")]
    print(f"{scale}: {', '.join(names)}")
