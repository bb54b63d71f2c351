"""Kernels for caches that layers share; depends on JAX alone.

`decode_attention` is one operation with several implementations behind one signature. Axes: `B`
batch, `S` cache length, `T` query length, `G` stacked KV layers, `N` query heads, `K` KV heads,
`H` head dim.
"""

from cla_kernels._cudnn import MOST_ROWS as CUDNN_MOST_ROWS
from cla_kernels._mosaic_gpu import workspace_bytes as decode_workspace_bytes
from cla_kernels._target import gpu_obstacle, target_device
from cla_kernels.decode_attention import (
    EIGHT_BIT,
    IMPLEMENTATIONS,
    Implementation,
    choose_implementation,
    decode_attention,
)

__all__ = [
    "CUDNN_MOST_ROWS",
    "EIGHT_BIT",
    "IMPLEMENTATIONS",
    "Implementation",
    "choose_implementation",
    "decode_attention",
    "decode_workspace_bytes",
    "gpu_obstacle",
    "target_device",
]
