"""`cla-jax train`, and `report` on what it left."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cla_jax.configs import MeshConfig, ModelConfig, TrainConfig
from cla_jax.recipes import RECIPES
from cla_jax.registry import model


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on text; the run directory holds its config, metrics, checkpoints and result.

    On your own text as bytes: `cla-jax train tiny/MQA-CLA2 --out runs/mine --text my_text/ --preset
    tiny`. A paper's whole recipe on prepared data: `cla-jax train 1B/H128-MQA-CLA2 --out runs/1b
    --data data/slimpajama --preset cla-1b`. SIGTERM and Ctrl-C save first; --resume goes on.
    """

    name: Annotated[str, tyro.conf.Positional]
    """The model; `cla-jax models` lists them."""
    out: Path
    """The run's directory."""
    training: TrainConfig = dataclasses.field(default_factory=lambda: _preset(sys.argv))
    """The recipe, as the preset has it."""
    preset: Literal["tiny", "cla-1b", "cla-3b", "mlkv"] = "tiny"
    """Whose recipe: the quickstart's, CLA section 3.1 at 1B or 3B, MLKV section 4.4."""
    data: Path | None = None
    """A directory that `cla-jax prepare-data` made."""
    text: str | None = None
    """Instead: text as for prepare-data, read as bytes. Default: the Python standard library."""
    data_dir: Path = Path("runs/data")
    """Where prepared text is kept, for the next run."""
    mesh: str = ""
    """Devices, as in fsdp=4,tensor=2, or data, fsdp or tensor for all of them; stage=2,data=4 is a
    pipeline. Default: one device. A run may be resumed on another mesh."""
    microbatches: int | None = None
    """Of a pipeline: parts that a batch is cut into. Default: up to four a stage."""
    coordinator: str = ""
    """With several processes, HOST:PORT of process 0, which listens there; or slurm, under srun."""
    processes: int | None = None
    """How many there are; not with slurm."""
    process: int | None = None
    """Which of them this is, from 0; not with slurm."""
    resume: bool = False
    """Go on from the newest checkpoint in `--out`."""
    force: bool = False
    """Resume though recipe or data differ from those that the run was begun with."""

    def run(self) -> None:
        """Train it."""
        config: ModelConfig = model(self.name)  # before the slow imports: a bad name fails at once
        if self.data is not None and self.text is not None:
            raise ValueError("--data and --text both name the training text: give one of them")
        if self.force and not self.resume:
            raise ValueError("--force is about a run that goes on: give --resume too")
        recipe = self._recipe()
        from cla_jax import data
        from cla_jax.parallel import ProcessConfig, check_mesh, join
        from cla_jax.parallel.processes import agree, is_first
        from cla_jax.training import train

        join(
            ProcessConfig(
                coordinator=self.coordinator, processes=self.processes, process=self.process
            )
        )

        def prepare() -> data.Streams:
            check_mesh(config, recipe)
            if self.data is not None:
                return data.open_prepared(self.data)
            corpus = data.prepare_corpus(data.corpus_at(self.text), self.data_dir)
            return data.prepare_streams(corpus, data.ByteTokenizer(), self.data_dir)

        # Together: where one leaves first, the others would be told that it is lost.
        streams = agree(prepare)
        if self.resume and is_first() and not (self.out / "config.json").exists():
            print(f"nothing to resume in {self.out}: starting at step 0", file=sys.stderr)
        trained = train(config, recipe, streams, self.out, resume=self.resume, force=self.force)
        if is_first():
            print(
                f"validation perplexity {trained.result['validation_perplexity']:.3f}, {self.out}"
            )

    def _recipe(self) -> TrainConfig:
        """With the options that name a part of it apart; what is named twice is refused."""
        recipe, preset = self.training, RECIPES[self.preset]
        execution = recipe.execution
        if self.mesh:
            if recipe.mesh != preset.mesh or _names(sys.argv, "--training.mesh."):
                raise ValueError(
                    f"--mesh {self.mesh} and --training.mesh.* ({recipe.mesh}) both name the "
                    "devices: give one of them"
                )
            recipe = dataclasses.replace(recipe, mesh=MeshConfig.parse(self.mesh))
        if self.microbatches is not None:
            count = execution.pipeline_microbatches
            option = "--training.execution.pipeline-microbatches"
            if count != preset.execution.pipeline_microbatches or _names(sys.argv, option):
                raise ValueError(
                    f"--microbatches {self.microbatches} and {option} {count} both cut a batch: "
                    "give one of them"
                )
            execution = dataclasses.replace(execution, pipeline_microbatches=self.microbatches)
            recipe = dataclasses.replace(recipe, execution=execution)
        return recipe


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the tables and figures of experiments or runs again; nothing is trained.

    Examples: `cla-jax report runs/cla-design-space-tiny`, or, to set runs side by side with the
    first as the baseline, `cla-jax report runs/mine runs/other --out comparison`. Parts of one
    experiment, trained apart: `cla-jax report parts/one parts/two --out whole`.
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of experiments, or of finished runs."""
    out: Path | None = None
    """Where to write; experiments of one kind are then parts of one. Default: the experiment's
    directory; for runs, runs/report."""

    def run(self) -> None:
        """Write and show them."""
        from cla_jax.reporting.report import report, show

        show(report(self.directories, self.out))


def _preset(arguments: list[str]) -> TrainConfig:
    """The recipe that the command line names: the defaults of all `--training.*` options."""
    given = [b for a, b in itertools.pairwise(arguments) if a == "--preset"]
    given += [a.removeprefix("--preset=") for a in arguments if a.startswith("--preset=")]
    return RECIPES.get(given[-1] if given else "tiny", RECIPES["tiny"])


def _names(arguments: list[str], option: str) -> bool:
    """Whether the command line names an option, or one below it, also with its default value."""
    return any(given.replace("_", "-").startswith(option) for given in arguments)
