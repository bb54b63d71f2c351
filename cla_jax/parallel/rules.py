"""Which mesh axes a logical axis is laid out over: one dataclass for the whole model.

A new layout is another value of `Rules`; no model code knows a mesh axis.
"""

import dataclasses
import math

from jax.sharding import PartitionSpec

from cla_jax._choices import check_choice
from cla_jax._mesh import MeshConfig
from cla_jax.configs import ModelConfig, nearest_divisor

type Axes = tuple[str, ...]
"""Mesh axes that a logical axis is split over, the outermost first; none: it is copied."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Mesh axes by logical axis; the names of `cla_jax.models.sharding`.

    The defaults are those of a model whose sizes all divide; `Rules.of` fits them to a model.

    Attributes:
        vocab: of embedding and output projection, and of logits.
        embed: `D` of the large parameters.
        heads: query heads, of parameters and activations.
        kv_heads: KV heads, likewise; those of a cache are `cache_heads`.
        head_dim: `H`.
        mlp: `F`, of parameters and activations.
        layers: the stacked axis of a segment.
        layers_outside: of a segment beside a pipeline's body.
        pair: gate and up, key and value.
        norm: a norm's scale and bias.
        batch: rows of activations.
        batch_outside: rows where a layer runs beside a pipeline's stages.
        batch_loss: tokens of the loss, of which every device makes chunks of its own.
        length: tokens of a row.
        model: `D` of activations.
        cache_batch: rows of a cache; in inference also of the residual stream and of attention.
        cache_heads: KV heads of a cache; in inference also query heads, of parameters too.
    """

    vocab: Axes = ("tensor", "stage")
    embed: Axes = ("fsdp",)
    heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head_dim: Axes = ()
    mlp: Axes = ("tensor",)
    layers: Axes = ("stage",)
    layers_outside: Axes = ()
    pair: Axes = ()
    norm: Axes = ()
    batch: Axes = ("data", "fsdp")
    batch_outside: Axes = ("data", "fsdp", "stage")
    batch_loss: Axes = ("data", "fsdp")
    length: Axes = ()
    model: Axes = ()
    cache_batch: Axes = ("data", "fsdp")
    cache_heads: Axes = ("tensor",)

    @classmethod
    def of(cls, config: ModelConfig, mesh: MeshConfig) -> "Rules":
        """The rules for a model on a mesh of these sizes.

        Fewer KV heads than tensor shards: the small K/V projection is copied, and a cache is split
        by rows over `tensor` too (Pope et al. 2022, section 3.3), so that no device holds another's
        bytes; in inference so is attention, with copied weights. A vocabulary is split over
        `tensor` and `stage`, over one of them, or copied: what divides it. Where it is not split
        over `stage`, the loss's tokens are.

        Raises:
            ValueError: heads, feed-forward or model width do not divide, stages that the sharing
                map cannot be cut into; names the sizes that work.
        """
        _check(config, mesh)
        rules = cls()
        if config.kv_heads % mesh.tensor:
            rows = (*rules.cache_batch, "tensor")
            rules = dataclasses.replace(rules, kv_heads=(), cache_heads=(), cache_batch=rows)
        sizes = mesh.sizes
        alone: list[Axes] = [(axis,) for axis in rules.vocab if sizes[axis] > 1]
        ways = (rules.vocab, *alone, ())
        divide = (w for w in ways if config.vocab_size % math.prod(sizes[a] for a in w) == 0)
        rules = dataclasses.replace(rules, vocab=next(divide))
        if "stage" not in rules.vocab:
            rules = dataclasses.replace(rules, batch_loss=rules.batch_outside)
        return rules

    @property
    def pairs(self) -> tuple[tuple[str, Axes | str | None], ...]:
        """As `flax.nnx.logical_axis_rules` takes them."""
        names = [field.name for field in dataclasses.fields(self)]
        return tuple((name, self._entry(name)) for name in names)

    def mesh_axes(self, axis: str) -> Axes:
        """Of one logical axis.

        Raises:
            ValueError: there is no such axis; names the nearest.
        """
        check_choice("logical axis", axis, [field.name for field in dataclasses.fields(self)])
        return getattr(self, axis)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The mesh axes of an array with these logical axes.

        Raises:
            ValueError: there is no such axis; names the nearest.
        """
        return PartitionSpec(*(None if axis is None else self._entry(axis) for axis in axes))

    def _entry(self, name: str) -> Axes | str | None:
        axes = self.mesh_axes(name)
        return axes[0] if len(axes) == 1 else axes or None


def _check(config: ModelConfig, mesh: MeshConfig) -> None:
    N, K, F, D = config.query_heads, config.kv_heads, config.ffn_dim, config.d_model

    def divides(tensor: int) -> bool:
        return not (N % tensor or F % tensor) and (K % tensor == 0 or tensor % K == 0)

    if not divides(mesh.tensor):
        works = ", ".join(str(n) for n in range(1, N + 1) if divides(n))
        raise ValueError(
            f"{config.name}: tensor={mesh.tensor} splits {N} query heads, a feed-forward width of "
            f"{F} and {K} KV heads (which may be fewer, if they divide it); tensor sizes that "
            f"work: {works}"
        )
    if D % mesh.fsdp:
        raise ValueError(
            f"{config.name}: fsdp={mesh.fsdp} does not divide d_model={D}; the nearest size that "
            f"does is {nearest_divisor(D, mesh.fsdp)}"
        )
    if mesh.stage > 1:
        try:
            config.sharing.pipeline(mesh.stage)
        except ValueError as error:
            raise ValueError(f"{config.name}: {error}") from None
