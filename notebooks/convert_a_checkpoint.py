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
# # Convert a checkpoint
#
# A trained model can be given a sharing map after the fact: the KV heads of the layers that will
# share are merged into one, the MLPs are widened to the old parameter count, and the model is
# trained a little more (*uptraining*, MLKV section 4). This notebook does it to a small model and
# compares two merges, before and after uptraining.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cla_jax") is None:  # on Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "cla-jax"], check=True)

# %%
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from IPython.display import Markdown, display

from cla_jax import conversion, load, model
from cla_jax.data import ByteTokenizer, EmbeddedCorpus, prepare_corpus, prepare_streams
from cla_jax.recipes import MLKV_SCALES, SCALES, recipe
from cla_jax.reporting import load_run, markdown
from cla_jax.reporting.live import LiveCurves
from cla_jax.reporting.uptraining import COLUMNS, Source, Uptrained, uptraining
from cla_jax.training import InitialParams, train

work = Path(tempfile.mkdtemp())
jax.config.update("jax_compilation_cache_dir", str(work / "xla"))  # both merges compile once

# %% [markdown]
# ## A checkpoint
#
# Here it is trained on the spot: six layers of four KV heads, an ordinary MHA model. With a
# network, a real one is two lines:
# `load_huggingface(huggingface_directory("EleutherAI/pythia-160m-deduped"))`, from
# `cla_jax.conversion`.

# %%
corpus = prepare_corpus(EmbeddedCorpus(max_bytes=2**21), work / "data")
streams = prepare_streams(corpus, ByteTokenizer(), work / "data")
scale = dataclasses.replace(SCALES["tiny"], sequence_length=128, validation_tokens=20_000)
training = recipe(scale, tokens=200 * 512, batch_size=4)

shown = display(Markdown("compiling ..."), display_id=True)
curves = LiveCurves(shown.update)
config = model("tiny/MHA")
trained = train(
    config, training, streams, work / "source", resume=True,
    on_record=curves.watch(config, training),
)  # fmt: skip

# %% [markdown]
# As a Hugging Face directory (`config.json` and safetensors) it can be read by `transformers` too;
# nothing is shared yet.

# %%
own = conversion.HuggingFaceCheckpoint(config, jax.tree.map(np.asarray, trained.params))
conversion.save_huggingface(own, work / "checkpoint")
checkpoint = conversion.load_huggingface(work / "checkpoint", name="tiny/MHA")
for file in sorted((work / "checkpoint").iterdir()):
    print(f"{file.name:20} {file.stat().st_size:>10,} bytes")

# %% [markdown]
# ## Conversion
#
# `MLKV-3` leaves three KV heads in the whole model: three KV layers of one head each. Each of them
# is made of the eight heads (two layers of four) that it replaces.

# %%
sharing, kv_heads = conversion.parse_sharing("MLKV-3", checkpoint.config)
converted = conversion.convert(checkpoint, sharing, kv_heads, conversion.mean, match_params=True)
print(sharing.diagram(), "\n")
for each in (checkpoint.config, converted.config):
    print(
        f"{each.kv_layers} KV layers of {each.kv_heads}: {each.kv_bytes_per_token:,} KV bytes per "
        f"token, MLP width {each.ffn_dim}, {each.parameters:,} parameters"
    )

# %% [markdown]
# ## Two merges, before and after uptraining
#
# *Mean* averages the heads, as the MLKV paper does; *first* keeps the first and drops the others. A
# run that is begun with given parameters validates them first, at step 0: that is the loss right
# after conversion.

# %%
MERGES = {"mean": conversion.mean, "first": conversion.first}
VARIANTS = {"MQA-6": "none", "MLKV-3": "MLKV-3", "MLKV-2": "MLKV-2"}  # one KV head in each owner
scale = dataclasses.replace(MLKV_SCALES["tiny"], validation_tokens=20_000)
uptrain = recipe(scale, tokens=40 * 512, batch_size=4)

uptrained = {}
for variant, pattern in VARIANTS.items():
    sharing, _ = conversion.parse_sharing(pattern, checkpoint.config)
    for name, merge in MERGES.items():
        made = conversion.convert(checkpoint, sharing, 1, merge, match_params=True)
        uptrained[variant, name] = train(
            dataclasses.replace(made.config, name=f"tiny/{variant}"), uptrain, streams,
            work / variant / name, initial=InitialParams(lambda made=made: made.params),
            resume=True, on_record=lambda record: None,
        )  # fmt: skip
runs = {key: load_run(run.directory) for key, run in uptrained.items()}
print(f"{len(runs)} variants uptrained on {uptrain.steps} steps; the source had {training.steps}")

# %% [markdown]
# Merging raises the loss, and a fifth of the source's training takes most of the rise back. In
# GQA's own comparison the mean beats the first head; between merges that end as near to each other
# as here, a model of this size does not decide.

# %%
source = Source(
    "tiny/MHA", InitialParams(lambda: checkpoint.params).fingerprint, config.parameters, 24,
    trained.result["validation_loss"],
)  # fmt: skip
rows = [
    Uptrained(variant, {name: runs[variant, name] for name in MERGES}, paper=None)
    for variant in VARIANTS
]
display(uptraining(rows, source))

# %%
kept = [column for column in COLUMNS if not column.key.startswith(("paper", "rank", "training"))]
display(Markdown(markdown(rows, kept)))

# %% [markdown]
# ## Save it
#
# `transformers` cannot express shared K/V, so the saved config has a model type of its own and the
# map under the name that the CLA authors use. `cla_jax.load` reads it. (What it writes is what a
# few seconds of training make of a small model.)

# %%
chosen = uptrained["MLKV-3", "mean"]
params = jax.tree.map(np.asarray, chosen.params)
made = conversion.HuggingFaceCheckpoint(chosen.model.config, params)
conversion.save_huggingface(made, work / "converted")
saved = json.loads((work / "converted" / "config.json").read_text())
print({key: saved[key] for key in ("model_type", "num_key_value_heads", "sharing_pattern")})

# %%
reader = load(work / "converted", tokenizer="bytes")
print(reader.generate("import ", max_new_tokens=60, temperature=0.7, top_k=20).text)
