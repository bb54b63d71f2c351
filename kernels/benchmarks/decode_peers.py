"""The peers: PyTorch's SDPA on flash and on cuDNN, and FlashInfer's paged decode.

They read the very arrays that the JAX side reads (DLPack), in the layout each of them likes, and
are timed as CUDA graphs of calls over all layers' caches in turn, as the JAX programs are; where a
call cannot be captured it is launched from the host, and the row says so.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from decode_shapes import Shape
from decode_timing import Cache, Measured, Timing, reason, slope

PAGE = 64
WORKSPACE = 512 * 2**20


def missing(peer: str) -> str:
    """Why this peer cannot be had on this machine; empty if it can."""
    for module in ("torch", *(("flashinfer",) if peer == "flashinfer" else ())):
        try:
            found = importlib.import_module(module)
        except Exception as error:  # a broken installation is as good as none
            return f"{module} cannot be imported: {reason(error)}"
        if module == "torch" and not found.cuda.is_available():
            return "torch finds no GPU"
    return ""


def version(peer: str) -> str:
    """Of what carries this peer."""
    module = "flashinfer" if peer == "flashinfer" else "torch"
    return f"{module} {importlib.import_module(module).__version__}"


def obstacle(peer: str, shape: Shape) -> str:
    """Why this peer cannot take this shape; empty if it can."""
    if shape.dtype != "bf16":
        return "timed with bf16 caches alone"
    if not shape.full and peer != "flashinfer":
        return "takes no lengths"
    return ""


def prepare(peer: str, shape: Shape, q: jax.Array, caches: Sequence[Cache]) -> Any:
    """`call(i)`: attention over layer `i`, as a torch array with `B * N * H` entries.

    Second, a note on how; empty if there is nothing to say.
    """
    torch = importlib.import_module("torch")
    jax.block_until_ready((q, caches))
    queries = torch.from_dlpack(q)[:, 0]  # [B, N, H]
    layers = [tuple(torch.from_dlpack(x)[0] for x in cache) for cache in caches]  # [B, S, K, H]
    if peer == "flashinfer":
        return _flashinfer(torch, shape, queries, layers), ""
    backend = {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}[peer]
    return _sdpa(torch, shape, queries, layers, backend)


def _sdpa(
    torch: Any, shape: Shape, q: Any, layers: list[tuple[Any, ...]], backend: str
) -> tuple[Callable[[int], Any], str]:
    attention = importlib.import_module("torch.nn.attention")
    forced = getattr(attention.SDPBackend, backend)
    q = q[:, :, None].contiguous()  # [B, N, 1, H]
    layers = [tuple(x.transpose(1, 2).contiguous() for x in layer) for layer in layers]
    function = torch.nn.functional.scaled_dot_product_attention

    def grouped(i: int) -> Any:
        with attention.sdpa_kernel(forced):
            return function(q, *layers[i], enable_gqa=shape.N != shape.K)

    def repeated(i: int) -> Any:
        k, v = (
            x[:, :, None].expand(-1, -1, shape.N // shape.K, -1, -1).flatten(1, 2)
            for x in layers[i]
        )
        with attention.sdpa_kernel(forced):
            return function(q, k, v)

    try:
        grouped(0)
    except RuntimeError as error:
        if shape.K > 1:
            raise  # repeating several KV heads would copy the cache
        repeated(0)
        return repeated, f"KV head expanded, since enable_gqa fails: {reason(error)}"
    return grouped, ""


_workspace: list[Any] = []  # one for all shapes


def _flashinfer(
    torch: Any, shape: Shape, q: Any, layers: list[tuple[Any, ...]]
) -> Callable[[int], Any]:
    flashinfer = importlib.import_module("flashinfer")
    if not _workspace:
        _workspace.append(torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device))
    room = shape.capacity // PAGE
    pages = [-(-length // PAGE) for length in shape.lengths]
    starts = np.concatenate([[0], np.cumsum(pages)])
    table = np.concatenate([row * room + np.arange(used) for row, used in enumerate(pages)])
    last = [length - (used - 1) * PAGE for length, used in zip(shape.lengths, pages, strict=True)]
    starts, table, last = (
        torch.tensor(np.asarray(x, np.int32), device=q.device) for x in (starts, table, last)
    )
    q = q.contiguous()
    paged = [tuple(x.reshape(-1, PAGE, shape.K, shape.H) for x in layer) for layer in layers]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace[0], "NHD", use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(
        starts, table, last, shape.N, shape.K, shape.H, PAGE,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    out = torch.empty_like(q)
    return lambda i: wrapper.run(q, paged[i], out=out)


def measure(
    peer: str, q: jax.Array, caches: Sequence[Cache], shape: Shape, timing: Timing
) -> tuple[np.ndarray, Callable[[], tuple[Measured, str]]]:
    """The output of one call, `[B, N, H]` float32, and what times it and says how."""
    torch = importlib.import_module("torch")
    with torch.no_grad():
        call, note = prepare(peer, shape, q, caches)
        out = call(0).float().cpu().numpy().reshape(shape.B, shape.N, shape.H)
        torch.cuda.synchronize()
    count = timing.steps(shape) * timing.calls(shape)

    def time() -> tuple[Measured, str]:
        with torch.no_grad():
            work, how = _captured(torch, call, count, len(caches))

            def run(n: int) -> None:
                for _ in range(n):
                    work()
                torch.cuda.synchronize()

            return slope(run, count, timing), "; ".join(filter(None, (note, how)))

    return out, time


def _captured(
    torch: Any, call: Callable[[int], Any], count: int, layers: int
) -> tuple[Callable[[], Any], str]:
    """What makes `count` calls over the layers in turn: a CUDA graph if it can be."""

    def eager() -> None:
        for i in range(count):
            call(i % layers)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(layers):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eager()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # a call that allocates or waits cannot be captured
        torch.cuda.synchronize()
        return eager, f"launched from the host, no graph: {reason(error)}"
    return graph.replay, ""


def release() -> None:
    """Give torch's unused memory back to the device."""
    importlib.import_module("torch").cuda.empty_cache()
