"""MLKV Table 2, and the 410M set: convert a trained model to fewer KV heads, then train it on.

Paper: Zuhri et al. 2024 (arXiv 2406.09297), sections 4.2 to 4.4 and 5.3. KV heads are merged by
averaging, MLPs widened to the same number of parameters, and each variant trained on 5 % of the
corpus: 2.46 M packed rows of 2048 tokens, 24 a step, learning rate 6e-4. Expected at 160m, the loss
after uptraining: GQA-48 2.7082, MLKV-48 2.7656, MQA-12 2.7505, MLKV-12 2.8014, MLKV-6 2.8013,
MLKV-4 2.8261, MLKV-2 2.8942, MLKV-1 3.3934. For 410m the paper prints accuracies alone.

    python experiments/mlkv/uptrain.py                                # tiny: minutes on two cores
    python experiments/mlkv/uptrain.py --smoke --models MLKV-6 --merge mean     # a minute
    python experiments/mlkv/uptrain.py --scale mini --data DIR --merge mean     # one GPU
    python experiments/mlkv/uptrain.py --scale 160m --source EleutherAI/pythia-160m-deduped \
        --data DIR --merge mean
    python experiments/mlkv/uptrain.py --scale 410m --source EleutherAI/pythia-410m-deduped \
        --data DIR --merge mean

Budget: tiny trains its own source (0.3 M bytes) and 16 variants (0.04 M each); mini its own (100 M
tokens) and 8 variants x 5 M for each merge; 160m 8 variants x 5.0 B, 410m 3. All see the same rows
in the same order; --tokens is of the variants alone. The same command goes on where an interrupted
one was; finished variants are skipped; more of them, or the other merge, may be added later.
`cla-jax report OUT` draws again.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from cla_jax.experiment import ExperimentOptions, run_experiment
from cla_jax.recipes import MLKV_SCALES, Scale, recipe
from cla_jax.registry import match_models, model

if TYPE_CHECKING:
    from cla_jax.configs import ModelConfig, TrainConfig
    from cla_jax.conversion import HuggingFaceCheckpoint
    from cla_jax.data import Streams
    from cla_jax.training import InitialParams
    from cla_jax.training.step import Params
    from cla_jax.training.sweep import Outcome

NAME = "mlkv-uptrain"
# What a source may have otherwise than the registry's model of its scale.
FREE = ("name", "sequence_length", "init_std", "norm_epsilon", "rope_theta", "rope_scaling")


@dataclasses.dataclass(frozen=True)
class Uptrain(ExperimentOptions):
    """Convert a model to the variants of MLKV Table 2 (410m: Table 4) and uptrain each."""

    scale: Literal["tiny", "mini", "160m", "410m"] = "tiny"
    """tiny: minutes on a CPU; mini: one GPU; 160m and 410m: the paper's own recipe."""
    source: str | None = None
    """What is converted: a Hugging Face directory, or OWNER/NAME[@REVISION] on the hub. Scales tiny
    and mini train their own."""
    merge: tuple[Literal["mean", "first"], ...] = ("mean", "first")
    """What becomes of KV heads that are merged; the paper takes their mean."""
    learning_rate: float | None = None
    """Peak. Default: the scale's (the paper's 6e-4)."""

    def scales(self) -> Mapping[str, Scale]:
        """The recipes by scale."""
        return MLKV_SCALES

    def names(self, default: tuple[str, ...] = ("*",)) -> tuple[str, ...]:
        """The variants, by their full names."""
        family = f"pythia-{self.scale}"
        found = match_models(family, self.models or default)
        if self.models and f"{family}/MHA" in found and len(found) == 1:
            raise ValueError(f"{family}/MHA is the source itself: name variants to convert it to")
        return tuple(name for name in found if name != f"{family}/MHA")

    def check(self) -> None:
        """Whether there is something to convert.

        Raises:
            ValueError: no source at a scale that trains none, or no merge.
        """
        if self.source is None and f"{self.scale}-source" not in MLKV_SCALES:
            raise ValueError(
                f"scale {self.scale} converts a trained model: give --source "
                f"EleutherAI/pythia-{self.scale}-deduped, or a directory that holds it"
            )
        if not self.merge:
            raise ValueError("no merge: give --merge mean, first or both")


def main(options: Uptrain) -> int:
    """Convert, train, report; the number of runs that failed."""
    names, merges = options.names(), tuple(dict.fromkeys(options.merge))
    options.check()
    training = options.recipe(learning_rate=options.learning_rate)
    streams = options.streams(NAME)
    # JAX and Grain take seconds to import: not before the options are known to be good.
    from cla_jax.reporting.report import report, show
    from cla_jax.training.sweep import Entry, Outcome, Sweep, failures

    directory = options.directory(NAME)
    rate = training.optimizer.learning_rate
    sweep = Sweep(directory, NAME, options.shared(streams, learning_rate=rate), streams)
    checkpoint = None if options.source is None else load_source(options.source, options.scale)
    outcomes = list[Outcome]()
    if checkpoint is None:
        source = model(f"pythia-{options.scale}/MHA")
        entry = Entry(source, source_recipe(options), "MHA/source")
        outcomes = sweep.run([entry], what="source")
        if failures(outcomes):
            return 1
        checkpoint = own_checkpoint(directory / entry.directory, entry.config)
    warn_of_another_tokenizer(checkpoint, streams)
    record_source(directory, checkpoint, options, streams, outcomes)
    outcomes += sweep.run(
        [
            Entry(config, training, f"{name.partition('/')[2]}/{merge}", initial)
            for merge in merges
            for name in names
            for config, initial in [variant(checkpoint, name, merge)]
        ],
        what="variant",
    )
    if any(outcome.result and outcome.entry.initial for outcome in outcomes):
        show(report([directory]))
    return failures(outcomes)


def load_source(source: str, scale: str) -> "HuggingFaceCheckpoint":
    """The checkpoint to be converted, as float32: means of 16-bit weights are not rounded.

    Raises:
        ValueError: no such checkpoint, or not one of this scale.
    """
    import jax
    import numpy as np

    from cla_jax.conversion import huggingface_directory, load_huggingface, source_name
    from cla_jax.conversion.huggingface import load_config

    directory = huggingface_directory(source)
    name = source_name(source)
    config, _ = load_config(directory, name=name)
    check_source(config, model(f"pythia-{scale}/MHA"))
    checkpoint = load_huggingface(directory, name=name)
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), checkpoint.params)
    return dataclasses.replace(checkpoint, params=params)


def check_source(config: "ModelConfig", wanted: "ModelConfig") -> None:
    """Whether a checkpoint is of the model that the variants are of.

    Raises:
        ValueError: it is not; names every field that differs.
    """
    found, expected = config.to_dict(), wanted.to_dict()
    found["rotary_dim"], expected["rotary_dim"] = config.rotary, wanted.rotary
    differs = [
        f"{field}={found[field]!r}, expected {expected[field]!r}"
        for field in expected
        if field not in FREE and found[field] != expected[field]
    ]
    if config.sequence_length < wanted.sequence_length:
        differs.append(f"sequence_length={config.sequence_length}, expected at least "
                       f"{wanted.sequence_length}")  # fmt: skip
    if differs:
        scale = wanted.name.partition("/")[0]
        raise ValueError(f"the source {config.name} is no {scale}: {'; '.join(differs)}")


def own_checkpoint(directory: Path, config: "ModelConfig") -> "HuggingFaceCheckpoint":
    """The source that was trained here, from its last checkpoint."""
    import jax
    import numpy as np

    from cla_jax.conversion import HuggingFaceCheckpoint
    from cla_jax.conversion.parameters import parameter_shapes
    from cla_jax.training.checkpoints import load_params

    _, params = load_params(
        directory / "checkpoints", config.to_dict(), parameter_shapes(config)
    )  # fmt: skip
    return HuggingFaceCheckpoint(config, jax.tree.map(np.asarray, params))


def warn_of_another_tokenizer(checkpoint: "HuggingFaceCheckpoint", streams: "Streams") -> None:
    """Says so if the tokens are not the source's: a file may differ though its tokens do not."""
    from cla_jax.data import JsonTokenizer

    for file in checkpoint.tokenizer_files:
        if file.name == "tokenizer.json":
            end = streams.train.end_of_text
            try:
                own = JsonTokenizer(file.read_bytes(), file.parent.name, end)
            except ValueError:
                own = None
            if own is None or own.fingerprint != streams.train.tokenizer_fingerprint:
                print(
                    f"the data was prepared with tokenizer {streams.train.tokenizer!r}, which is "
                    f"not {file}: if its tokens are others, all losses below are meaningless",
                    file=sys.stderr,
                )


def record_source(
    directory: Path,
    checkpoint: "HuggingFaceCheckpoint",
    options: Uptrain,
    streams: "Streams",
    outcomes: "Sequence[Outcome]",
) -> None:
    """Leaves `source.json` beside the runs: which model was converted, and its validation loss.

    Raises:
        ValueError: the directory's variants were converted from another one.
    """
    from cla_jax.data.files import write_json
    from cla_jax.reporting.uptraining import Source
    from cla_jax.reporting.uptraining import load_source as recorded
    from cla_jax.training import InitialParams, validate

    initial, path = InitialParams(lambda: checkpoint.params), directory / "source.json"
    if path.exists():
        before = recorded(directory)
        if before.fingerprint != initial.fingerprint:
            raise ValueError(
                f"{directory} holds variants of {before.name} (parameters "
                f"{before.fingerprint[:16]}), this source is {checkpoint.config.name} (parameters "
                f"{initial.fingerprint[:16]}): give this one another --out"
            )
        return
    config = checkpoint.config
    if outcomes and outcomes[0].result:  # trained here
        loss = outcomes[0].result["validation_loss"]
    else:
        print(f"source: {config.name}: validating")
        loss = validate(config, options.recipe(), streams, initial)
    source = Source(config.name, initial.fingerprint, config.parameters,
                    config.kv_layers * config.kv_heads, loss)  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(source))


def source_recipe(options: Uptrain) -> "TrainConfig":
    """Of the source that is trained here; the uptraining's own options are not for it."""
    preset = options.preset() if options.smoke else MLKV_SCALES[f"{options.scale}-source"]
    return recipe(preset, batch_size=options.batch_size, micro_batch=options.micro_batch)


def variant(
    checkpoint: "HuggingFaceCheckpoint", name: str, merge: str
) -> tuple["ModelConfig", "InitialParams"]:
    """The source as the registry's model of a name: its architecture and first parameters.

    What the source has otherwise than the registry, such as its norms' epsilon, it keeps.
    """
    from cla_jax import conversion
    from cla_jax.training import InitialParams

    known, how = model(name), {"mean": conversion.mean, "first": conversion.first}[merge]
    config = conversion.converted_config(checkpoint.config, known.sharing, known.kv_heads, True)

    def make() -> "Params":
        converted = conversion.convert(
            checkpoint, known.sharing, known.kv_heads, how, match_params=True
        )
        return converted.params

    return dataclasses.replace(config, name=name), InitialParams(make)


if __name__ == "__main__":
    run_experiment("uptrain", lambda: main(tyro.cli(Uptrain, description=__doc__)))
