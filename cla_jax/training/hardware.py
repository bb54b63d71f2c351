"""Peak arithmetic rates, for model FLOP utilisation (MFU)."""

import jax

# Dense bfloat16 FLOP/s of one chip, from the vendors' data sheets.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(devices: int = 1) -> float | None:
    """Dense bfloat16 peak of so many devices, FLOP/s; None for a device not in the table."""
    kind = jax.devices()[0].device_kind
    matches = [peak for name, peak in _PEAK_FLOPS.items() if kind.startswith(name)]
    # The first match is the longest name ("TPU v5 lite" before "TPU v5"): the table's order.
    return matches[0] * devices if matches else None
