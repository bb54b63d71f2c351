"""Programs compiled for devices that need not be there: what they take of memory and links.

XLA compiles for a TPU topology on any machine that has the `libtpu` package, and for so many CPU
devices without it. Nothing is run: speed is not to be had so, memory and collectives are.
"""

import contextlib
import os
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from cla_jax._choices import check_choice
from cla_jax.configs import ExecutionConfig, ModelConfig, TrainConfig
from cla_jax.inference import KVCache, extend, prefill
from cla_jax.inference.cache import CACHE_AXES, SCALE_AXES
from cla_jax.models.sharding import logical_axes
from cla_jax.parallel import Layout, in_force
from cla_jax.training import Model, make_train_step
from cla_jax.training.optimizer import make_optimizer
from cla_jax.training.step import abstract_state

__all__ = [
    "TPU_MEMORY",
    "Program",
    "compile_decode",
    "compile_prefill",
    "compile_train_step",
    "lower_train_step",
    "target_devices",
]

type Program = Literal["train", "prefill", "decode"]
# Bytes of high-bandwidth memory of a device, by the kinds that JAX names.
TPU_MEMORY = {
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5": 95 * 2**30,
    "TPU v6 lite": 32 * 2**30,
}
_KINDS = ("cpu", "v4", "v5e", "v5p", "v6e")


def target_devices(target: str) -> list[Any]:
    """Devices to compile for.

    Args:
        target: a TPU topology, such as `v5e:4x4` or `v5p:4x4x4`; or `cpu:8`, so many devices of
            this machine's processor, which need not have them.

    Raises:
        ValueError: no such target; `libtpu` is not installed; more CPU devices than this process
            was started with; another process is compiling for TPU.
    """
    kind, _, shape = target.partition(":")
    check_choice("target", kind, _KINDS)
    if kind == "cpu":
        return _cpu_devices(target, shape)
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"target={target!r}: expected a topology, such as {kind}:4x4, or cpu:8")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except Exception as error:
        if "not installed" in str(error):
            raise ValueError(
                f"target={target}: compiling for TPU needs the libtpu package: pip install "
                "libtpu==0.0.52 (any machine will do), or --target cpu:8"
            ) from None
        if "lockfile" in str(error):  # it advises to remove it, under the other process
            raise ValueError(
                f"target={target}: another process on this machine compiles for TPU, and libtpu "
                "takes one at a time: wait until it is done"
            ) from None
        raise ValueError(
            f"target={target}: {str(error).splitlines()[0][:200]}; some that exist: "
            "v5e:4x4, v6e:4x4, v5p:4x4x4, v4:2x2x4"
        ) from None
    return list(found.devices)


def _cpu_devices(target: str, count: str) -> list[Any]:
    if not count.isdecimal() or not int(count):
        raise ValueError(f"target={target!r}: expected a number of devices, such as cpu:8")
    with contextlib.suppress(RuntimeError):  # JAX is in use already
        jax.config.update("jax_num_cpu_devices", int(count))
    found = jax.devices("cpu")
    if len(found) < int(count):
        raise ValueError(
            f"target={target}: this process was started with {len(found)} CPU devices; at most "
            f"cpu:{len(found)}"
        )
    return list(found[: int(count)])


def compile_train_step(
    config: ModelConfig, training: TrainConfig, layout: Layout
) -> jax.stages.Compiled:
    """The step that `train` takes, state donated."""
    return lower_train_step(config, training, layout).compile()


def lower_train_step(
    config: ModelConfig, training: TrainConfig, layout: Layout
) -> jax.stages.Lowered:
    """The same, traced: to be compiled where and when it suits."""
    model = Model(config, training.execution)
    optimizer = make_optimizer(training.optimizer, training.steps)
    data = training.data
    state = abstract_state(model, optimizer, layout)
    window = (data.batch_size, data.sequence_length + 1)
    names = ["tokens", *(["documents"] if data.document_mask else [])]
    batch = {name: jax.ShapeDtypeStruct(window, jnp.int32, sharding=layout.of(("batch", "length")))
             for name in names}  # fmt: skip
    step = make_train_step(model, optimizer, training.micro_batches, layout)
    with in_force(layout):
        return step.lower(state, batch)


def compile_prefill(
    config: ModelConfig, layout: Layout, *, batch: int, length: int, dtype: str = "bfloat16"
) -> jax.stages.Compiled:
    """The prefill of whole prompts into a cache of their length, donated."""
    with in_force(layout):
        decoder, cache = _inference(config, layout, batch, length, dtype)
        tokens = _tokens(layout, batch, length)
        return jax.jit(prefill, donate_argnums=2).lower(decoder, tokens, cache).compile()


def compile_decode(
    config: ModelConfig, layout: Layout, *, batch: int, length: int, dtype: str = "bfloat16"
) -> jax.stages.Compiled:
    """One step of decoding behind a cache with room for `length` tokens, donated."""
    with in_force(layout):
        decoder, cache = _inference(config, layout, batch, length, dtype)
        tokens = _tokens(layout, batch, 1)
        return jax.jit(extend, donate_argnums=2).lower(decoder, tokens, cache).compile()


def _tokens(layout: Layout, batch: int, length: int) -> jax.ShapeDtypeStruct:
    shape, rows = (batch, length), layout.of(("cache_batch", None))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)


def _inference(
    config: ModelConfig, layout: Layout, batch: int, length: int, dtype: str
) -> tuple[Any, KVCache]:
    """Shapes, and where they lie, of a decoder for inference and of its cache."""
    model = Model(config, ExecutionConfig())
    params = jax.eval_shape(lambda: model.init(0))
    decoder = jax.eval_shape(lambda params: model(params).unstacked(), params)

    def lay(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        value = variable.get_value()
        axes = logical_axes(variable)
        return variable.replace(_at(value, layout.of(axes[len(axes) - value.ndim :])))

    decoder = jax.tree.map(lay, decoder, is_leaf=lambda v: isinstance(v, nnx.Variable))
    cache = jax.eval_shape(lambda: KVCache.create(config, batch, length, dtype))
    entries, scales = layout.of(CACHE_AXES), layout.of(SCALE_AXES)

    def lie(stacks: tuple[Any, ...], where: NamedSharding) -> tuple[Any, ...]:
        return tuple(_at(stack, where) for stack in stacks)

    placed = KVCache(
        lie(cache.k, entries),
        lie(cache.v, entries),
        _at(cache.lengths, layout.of(("cache_batch",))),
        lie(cache.k_scale, scales),
        lie(cache.v_scale, scales),
    )
    return decoder, placed


def _at(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
