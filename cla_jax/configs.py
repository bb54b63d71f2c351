"""Configurations: frozen dataclasses, with the figures that follow from them.

`ModelConfig` is the architecture (what a checkpoint must match), `ExecutionConfig` how it is run
(nothing that changes a parameter), `DataConfig`, `OptimizerConfig` and `TrainConfig` a training
run. Everything here is arithmetic: no array is built.
"""

import dataclasses
import difflib
from typing import Any, Literal, get_args

from cla_jax._choices import check_choice
from cla_jax._mesh import MeshConfig
from cla_jax.sharing import KVSharing

__all__ = [
    "AttentionConfig",
    "DataConfig",
    "ExecutionConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScaling",
    "TrainConfig",
]

Remat = Literal["none", "full", "dots"]
ComputeDtype = Literal["bfloat16", "float32"]
CacheDtype = Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]
Tracker = Literal["tensorboard", "wandb"]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`: the valid choice that a message names."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 and later stretch the rotary frequencies to contexts beyond the trained one.

    Wavelengths below `original_max_position_embeddings / high_freq_factor` tokens stay, those above
    `original_max_position_embeddings / low_freq_factor` grow by `factor`, and in between the
    frequency is interpolated. The names are those of Hugging Face configurations.

    Attributes:
        factor: by which the longest wavelengths grow.
        low_freq_factor: full wavelengths in the original context below which `factor` holds whole.
        high_freq_factor: full wavelengths in the original context above which nothing changes.
        original_max_position_embeddings: the context that the frequencies were trained at, tokens.

    Raises:
        ValueError: a value that is not positive, or bounds that are not in order.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(
                    f"rope_scaling.{field.name}={getattr(self, field.name)} must be positive"
                )
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of a layer's attention: what `KVProjection` and `QueryAttention` are built from.

    Attributes:
        d_model: width of the residual stream, `D`.
        query_heads: `N`; need not be `d_model / head_dim`.
        kv_heads: `K`; divides `query_heads`.
        head_dim: `H`.
        use_bias: biases on the projections.
        init_std: standard deviation of the initial weights.

    Raises:
        ValueError: a size that is not positive, heads that do not divide.
    """

    d_model: int
    query_heads: int
    kv_heads: int
    head_dim: int
    use_bias: bool = False
    init_std: float = 0.01275

    def __post_init__(self) -> None:
        for field in ("d_model", "query_heads", "kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if self.query_heads % self.kv_heads:
            nearest = nearest_divisor(self.query_heads, self.kv_heads)
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide query_heads={self.query_heads}; the "
                f"nearest that does is {nearest}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer with a K/V sharing map.

    The defaults are the Llama-like architecture of the CLA paper (section 3.1); `gpt_neox` of the
    registry sets the other switches.

    Attributes:
        name: the registry's name, or any other.
        sharing: who owns and who reads K/V; its length is the depth.
        d_model: width of the residual stream, `D`.
        ffn_dim: width of the feed-forward layer, `F`.
        query_heads: `N`; need not be `d_model / head_dim` (CLA's H512, H90, H46).
        kv_heads: `K`; divides `query_heads`.
        head_dim: `H`.
        vocab_size: `V`.
        sequence_length: tokens per training sequence.
        rms_norm: RMSNorm if true, LayerNorm (with a bias) if not.
        separate_kv_norm: the norm before the K/V projection is the owner's own, apart from the
            queries' (CLA section 3.1, for CLA models); otherwise they share one.
        swiglu: gated SiLU feed-forward if true, GELU if not.
        parallel_residual: attention and feed-forward both read the layer's input (GPT-NeoX).
        use_bias: biases on every projection inside the layers.
        rotary_dim: leading dimensions of each head that rotate; even, at most `head_dim`.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how Llama 3 stretches them; None: not at all.
        norm_epsilon: epsilon of every norm.
        tied_embeddings: the output projection is the embedding's transpose.
        init_std: standard deviation of every linear layer's and the embedding's initial weights.

    Raises:
        ValueError: a size that is not positive, heads that do not divide, an odd `rotary_dim`.
    """

    name: str
    sharing: KVSharing
    d_model: int
    ffn_dim: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    sequence_length: int = 2048
    rms_norm: bool = True
    separate_kv_norm: bool = False
    swiglu: bool = True
    parallel_residual: bool = False
    use_bias: bool = False
    rotary_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    init_std: float = 0.01275

    def __post_init__(self) -> None:
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        for field in ("ffn_dim", "vocab_size", "sequence_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}: {field}={getattr(self, field)} must be positive")
        try:
            _ = self.attention
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if self.rotary % 2 or not 0 <= self.rotary <= self.head_dim:
            nearest = min(max(self.rotary - self.rotary % 2, 0), self.head_dim // 2 * 2)
            raise ValueError(
                f"{self.name}: rotary_dim={self.rotary} must be even and at most "
                f"head_dim={self.head_dim}; the nearest is {nearest}"
            )

    @property
    def attention(self) -> AttentionConfig:
        """Of every layer."""
        return AttentionConfig(
            d_model=self.d_model, query_heads=self.query_heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, use_bias=self.use_bias, init_std=self.init_std,
        )  # fmt: skip

    @property
    def rotary(self) -> int:
        """`rotary_dim`, resolved."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def num_layers(self) -> int:
        """Depth, `L`."""
        return self.sharing.num_layers

    @property
    def kv_layers(self) -> int:
        """Layers that own K/V, `G`."""
        return self.sharing.kv_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the 16-bit K/V cache per token: the memory column of CLA Table 1."""
        return self.sharing.kv_bytes_per_token(self.kv_heads, self.head_dim)

    @property
    def parameters(self) -> int:
        """Number of parameters, without building the model."""
        D, F, V = self.d_model, self.ffn_dim, self.vocab_size
        bias = int(self.use_bias)
        norm = D if self.rms_norm else 2 * D
        queries, keys = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = D * queries + bias * queries + queries * D + bias * D
        fan = 2 if self.swiglu else 1
        ffn = fan * (D * F + bias * F) + F * D + bias * D
        owner = 2 * (D * keys + bias * keys) + (norm if self.separate_kv_norm else 0)
        embeddings = V * D * (1 if self.tied_embeddings else 2)
        layers = self.num_layers * (attention + ffn + 2 * norm) + self.kv_layers * owner
        return embeddings + layers + norm

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Training FLOPs per token, forward and backward, counting a multiply-add as two.

        Six per parameter, but for the embedding that is only looked up, and causal attention's
        two products over the mean of `sequence_length / 2` positions. Every layer attends, readers
        too; a reader saves its K/V projection alone (CLA section 2.3).
        """
        length = sequence_length or self.sequence_length
        lookups = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        attention = 2 * 2 * self.num_layers * self.query_heads * self.head_dim * length // 2
        return 6 * (self.parameters - lookups) + 3 * attention

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the map is written as `sharing_pattern`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["sharing"]
        if self.rope_scaling is not None:
            values["rope_scaling"] = dataclasses.asdict(self.rope_scaling)
        return {**values, "sharing_pattern": self.sharing.sharing_pattern}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown key, with the nearest valid name, or one that is missing.
        """
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        names = {f.name for f in dataclasses.fields(cls)} - {"sharing"} | {"sharing_pattern"}
        required = required & names | {"sharing_pattern"}
        for key in values.keys() - names:
            near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {key!r} in a model config; the nearest is {near!r}")
        if missing := sorted(required - values.keys()):
            raise ValueError(f"a model config lacks {', '.join(missing)}")
        values = dict(values)
        sharing = KVSharing.from_sharing_pattern(values.pop("sharing_pattern"))
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = _rope_scaling(values["rope_scaling"])
        return cls(sharing=sharing, **values)


def _rope_scaling(values: dict[str, Any]) -> RopeScaling:
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if set(values) != set(names):
        raise ValueError(
            f"rope_scaling has the keys {', '.join(sorted(values))}; expected {', '.join(names)}"
        )
    return RopeScaling(**values)


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a model is run. No setting here changes a parameter, only speed, memory and rounding.

    Attributes:
        compute_dtype: of activations and matrix products; parameters stay float32.
        remat: what the backward pass recomputes: `none`; `full` keeps a group's input alone (in a
            pipeline a stage's); `dots` also keeps the matrix products that have no batch dimension.
        scan: run each segment as one `jax.lax.scan`; false unrolls every layer.
        unroll: repeats per scan step. 1 compiles fastest; more trades compile time for speed.
        loss_chunk: tokens whose logits exist at a time in the training loss, at most, on each
            device of a mesh; 0 is all at once.
        pipeline_microbatches: parts that the rows of a forward and backward pass are cut into where
            a mesh has stages; divides them. 0: the most that divide them, up to four a stage.
    """

    compute_dtype: ComputeDtype = "bfloat16"
    remat: Remat = "none"
    scan: bool = True
    unroll: int = 1
    loss_chunk: int = 0
    pipeline_microbatches: int = 0

    def __post_init__(self) -> None:
        for field, kind in (("compute_dtype", ComputeDtype), ("remat", Remat)):
            check_choice(field, getattr(self, field), get_args(kind))
        if self.unroll < 1:
            raise ValueError(f"unroll={self.unroll} must be at least 1")
        if self.loss_chunk < 0:
            raise ValueError(f"loss_chunk={self.loss_chunk} must be 0 (off) or positive")
        if (count := self.pipeline_microbatches) < 0:
            raise ValueError(f"pipeline_microbatches={count} must be 0 (automatic) or positive")

    def loss_chunk_of(self, tokens: int) -> int:
        """Tokens of a chunk of the loss, where a device has so many at once: nearly equal chunks.

        Examples:
            >>> execution = ExecutionConfig(loss_chunk=4096)
            >>> execution.loss_chunk_of(8192), execution.loss_chunk_of(10_000)
            (4096, 3334)
        """
        if not self.loss_chunk or self.loss_chunk >= tokens:
            return tokens
        chunks = -(-tokens // self.loss_chunk)
        return -(-tokens // chunks)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which windows of the token stream make a batch.

    Attributes:
        sequence_length: tokens per sequence, `T`.
        batch_size: sequences per step over all processes, `B`.
        seed: of the shuffle.
        packing: `concat`: documents end to end, cut into windows (CLA); `first_fit`: whole
            documents packed into padded rows, those longer than a row truncated (MLKV section 4.3).
        document_mask: attention stays within a document and positions restart. Off in the papers'
            presets: neither paper mentions it.
    """

    sequence_length: int = 2048
    batch_size: int = 2048
    seed: int = 0
    packing: Literal["concat", "first_fit"] = "concat"
    document_mask: bool = False

    def __post_init__(self) -> None:
        for field in ("sequence_length", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are CLA's recipe (section 3.1).

    Attributes:
        learning_rate: peak. 3e-4 is the paper's "conservative" design-space setting.
        warmup_fraction: share of all steps spent warming up.
        final_fraction: share of the peak at the last step.
        clip_norm: global gradient norm above which gradients are scaled down.
    """

    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_fraction: float = 0.05
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        for field in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must be between 0 and 1")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0, below 1")
        for field in ("epsilon", "clip_norm"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run of one model.

    Attributes:
        steps: optimizer updates.
        micro_batch_size: sequences per forward and backward pass, whose gradients are summed in
            float32; divides the batch size. 0: the whole batch at once.
        seed: of the parameters.
        eval_every: steps between validations; the last step always validates. 0: only the last.
        eval_tokens: validation tokens each time, from the start; 0 is the whole validation stream.
        checkpoint_every: steps between checkpoints; the last step always saves. 0: only the last,
            so an interrupted run starts over.
        keep_checkpoints: how many of the newest to keep.
        log_every: steps between metric records.
        trackers: where metrics go beside `metrics.jsonl`: `tensorboard` (into the run directory),
            `wandb` (a project named cla-jax); each needs its own package.
        mesh: the devices that it is spread over. No part of what a run is: it may be resumed on
            another mesh, whose sums are rounded otherwise.
    """

    steps: int
    micro_batch_size: int = 0
    seed: int = 0
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    execution: ExecutionConfig = ExecutionConfig()
    eval_every: int = 0
    eval_tokens: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 1
    trackers: tuple[Tracker, ...] = ()
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        for field, least in (("steps", 1), ("eval_every", 0), ("eval_tokens", 0),
                             ("checkpoint_every", 0), ("keep_checkpoints", 1),
                             ("micro_batch_size", 0),
                             ("log_every", 1)):  # fmt: skip
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)} must be at least {least}")
        batch, micro = self.data.batch_size, self.micro_batch_size
        if micro and batch % micro:
            raise ValueError(
                f"micro_batch_size={micro} does not divide batch_size={batch}; the nearest that "
                f"does is {nearest_divisor(batch, micro)}"
            )

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of a step, each of `micro_batch_size` sequences."""
        return self.data.batch_size // (self.micro_batch_size or self.data.batch_size)
