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
# # On a GPU
#
# Two questions. How near does decoding come to the fastest that the card's memory allows? And is
# what the planner says about memory true? Without a GPU the notebook shows the planner's
# arithmetic, which needs none, and says what it left out.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("cla_jax") is None:  # on Colab, with a GPU runtime
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "cla-jax[cuda]"], check=True)

# %%
import jax
from IPython.display import Markdown, display

from cla_jax import model
from cla_jax.evaluation.decoding import (
    bytes_in_use,
    decode_costs,
    memory_limit,
    random_decoder,
    read_bandwidth,
)
from cla_jax.inference.planning import MemoryPlan, check_fits
from cla_jax.inference.sizes import format_size
from cla_jax.reporting import planning
from cla_jax.reporting.roofline import columns, roofline
from cla_jax.reporting.tables import Column, markdown

ON_GPU = jax.default_backend() == "gpu"
NAMES = ("1B/H128-MHA", "1B/H128-MQA", "1B/H128-MQA-CLA2")
CONTEXT = 8192
print(f"{jax.devices()[0].device_kind}: {'measuring' if ON_GPU else 'no GPU, arithmetic alone'}")

# %% [markdown]
# ## The planner's arithmetic
#
# Weights, cache and workspace must fit. The weights are the same for all of these models, so what
# they leave is divided by the bytes of a row's cache.

# %%
memory = (memory_limit() if ON_GPU else None) or 80 * 10**9
plans = [
    MemoryPlan(config, 1, CONTEXT, memory) for config in planning.variants(model("1B/H128-MQA"))
]
plans.insert(0, MemoryPlan(model("1B/H128-MHA"), 1, CONTEXT, memory))
gain = plans[2].largest_batch / plans[1].largest_batch
title = f"At {CONTEXT:,} tokens, CLA2 fits {gain:.2f} times as many rows as MQA"
display(planning.capacity(plans, title=title))

# %% [markdown]
# The last two columns are the floor of a decoding step at the largest batch, at 3.35 TB/s (the
# data sheet of an H100). A step reads every weight once, and K/V once for every layer, readers
# too: sharing across layers makes room for more rows, it does not make a row's reads fewer.

# %%
display(Markdown(markdown(plans, planning.columns(1, CONTEXT, 3_350_000_000_000))))

# %% [markdown]
# ## Decoding against the roofline
#
# The ceiling is what this card reads in a plain sum over a large array, measured here and now, not
# the data sheet's.


# %%
def skipped(what: str) -> Markdown:
    return Markdown(f"*No GPU here, so nothing was measured. On one, this cell {what}.*")


if ON_GPU:
    ceiling = read_bandwidth()
    print(f"read ceiling {ceiling / 1e12:.2f} TB/s")
    costs = []
    for name in NAMES:
        decoder = random_decoder(model(name))
        for batch, context in ((1, 2048), (16, CONTEXT), (64, CONTEXT)):
            if batch <= MemoryPlan(model(name), batch, context, memory).largest_batch:
                costs.append(decode_costs(decoder, batch, context))
        del decoder
    display(Markdown(markdown(costs, columns(ceiling))))
    display(roofline(costs, ceiling))
else:
    display(
        skipped(
            "times decoding steps of MHA, MQA and CLA2 at three batches and draws them against the "
            "bytes that a step must read: where K/V dominate, a step comes near the ceiling"
        )
    )

# %% [markdown]
# ## The planner against the card
#
# The CLA2 model at 0.98 of the largest batch that the planner allows: what it planned beside what
# was allocated. The workspace is an upper estimate, so what the compiled step needs may be less,
# never more.

# %%
if ON_GPU:
    name = NAMES[-1]
    most = MemoryPlan(model(name), 1, CONTEXT, memory).largest_batch
    plan = MemoryPlan(model(name), int(0.98 * most), CONTEXT, memory)
    before = bytes_in_use()
    decoder = random_decoder(model(name))
    held = bytes_in_use() - before
    cost = decode_costs(decoder, plan.batch, CONTEXT)
    rows = [
        ("weights", plan.weights, held),
        ("cache", plan.cache, cost.cache_bytes),
        ("workspace", plan.workspace, cost.temporary_bytes),
    ]
    parts = (
        Column("part", "part", lambda row: row[0]),
        Column("planned", "planned, GB", lambda row: row[1] / 1e9, ".3f"),
        Column("measured", "measured, GB", lambda row: row[2] / 1e9, ".3f"),
    )
    print(
        f"largest batch {most:,}; {plan.batch:,} rows decode {cost.tokens_per_second:,.0f} tokens/s"
    )
    display(Markdown(markdown(rows, parts)))
    del decoder
else:
    display(
        skipped(
            "runs the CLA2 model at the planner's largest batch and sets weights, cache and "
            "workspace as planned beside those that were allocated"
        )
    )

# %% [markdown]
# More than fits is refused before anything is allocated, with what would fit. This, too, needs no
# GPU:

# %%
try:
    check_fits(model("1B/H128-MHA"), 256, CONTEXT, memory_bytes=memory)
except ValueError as error:
    print(error)
shared = MemoryPlan(model("1B/H128-MQA-CLA2"), 256, CONTEXT, memory)
check_fits(shared.config, shared.batch, CONTEXT, memory_bytes=memory)
print(f"\n{shared.config.name} fits with as many rows: its cache is {format_size(shared.cache)}")
