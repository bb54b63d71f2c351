"""What cross-layer KV sharing costs and saves, on your own text, in about three minutes of CPU.

Trains `tiny/MQA` and its CLA2 twin on the same data in the same order, then prints and draws K/V
bytes per token against validation perplexity and lets the CLA2 model continue a prompt. It is CLA
Table 1's comparison of H128-MQA and H128-MQA-CLA2 (10,240 against 5,120 bytes per token, perplexity
13.54 against 13.60) in miniature.

    python experiments/quickstart.py                  # the Python standard library's sources
    python experiments/quickstart.py --text my.txt    # a UTF-8 file, or a folder of .txt files

An interrupted quickstart goes on where it was; a finished one is only drawn again.
"""

import dataclasses
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console

from cla_jax import model
from cla_jax.recipes import SCALES, recipe

BASELINE, SHARED = "tiny/MQA", "tiny/MQA-CLA2"
PROMPT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Train an MQA baseline and its CLA2 twin on text; print and draw memory against perplexity."""

    text: str | None = None
    """A UTF-8 text file, or a folder of them. Default: the Python standard library."""
    out: Path = Path("runs/quickstart")
    """Where runs, figures and prepared text go."""
    steps: int = 500
    """Training steps of each model."""
    batch_size: int = 4
    """Sequences per step."""
    sequence_length: int = 256
    """Tokens (bytes) per sequence."""
    seed: int = 0
    """Of the parameters; the data order is the same for all."""
    prompt: str | None = None
    """What the CLA2 model continues. Default: the start of your text's validation part."""
    new_tokens: int = 160
    """How many bytes it adds."""


def main(options: Quickstart) -> None:
    """Run it."""
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    scale = dataclasses.replace(SCALES["tiny"], sequence_length=options.sequence_length)
    rows, length = options.batch_size, options.sequence_length
    if options.steps < 1:
        raise ValueError(f"steps={options.steps} must be at least 1")
    training = recipe(
        scale, tokens=options.steps * rows * length, batch_size=rows, seed=options.seed
    )
    # TFDS and Grain take seconds to import: not before the options are known to be good.
    from cla_jax.data import ByteTokenizer, corpus_at, prepare_corpus, prepare_streams
    from cla_jax.inference import GenerateConfig, check_prompts, generate
    from cla_jax.reporting import figures, load_run, tables
    from cla_jax.training import train

    tokenizer = ByteTokenizer()
    info = prepare_corpus(corpus_at(options.text), options.out / "data")
    streams = prepare_streams(info, tokenizer, options.out / "data")
    console.print(
        f"{info.name}: {info.num_documents:,} documents, {info.num_bytes:,} bytes, "
        f"{len(info.skipped_files)} files skipped (not UTF-8), fingerprint {info.fingerprint[:12]}"
    )
    passes = options.steps * rows * length / streams.train.num_tokens
    console.print(
        f"{options.steps} steps of {rows} x {length} tokens each: {passes:.2f} passes over "
        f"{streams.train.num_tokens:,} tokens"
    )
    prompt = options.prompt
    if prompt is None and options.text is None:
        prompt = "class Reader:\n    def __init__(self, "
    elif prompt is None:
        prompt = tokenizer.decode(streams.validation.tokens[:PROMPT_BYTES])
    continuing = GenerateConfig(options.new_tokens, stop_tokens=(tokenizer.end_of_text,))
    ids = check_prompts(model(SHARED), [tokenizer.encode(prompt)], options.new_tokens)
    directory = options.out / f"{info.fingerprint[:12]}-{options.steps}-steps-seed-{options.seed}"
    trained = {
        name: train(model(name), training, streams, directory / name.replace("/", "-"), resume=True)
        for name in (BASELINE, SHARED)
    }

    runs = [load_run(run.directory) for run in trained.values()]
    rows = tables.comparison(runs, baseline=runs[0])
    console.print()
    console.print(tables.terminal_table(rows, tables.COLUMNS))
    console.print(
        f"CLA2 caches {rows[1].cache_ratio:.2f} of the baseline's bytes at "
        f"{rows[1].perplexity_ratio:.3f} of its perplexity. At this size and budget a difference "
        "of a few percent is noise:\nanother --seed moves it as much. The papers' differences show "
        "at their scale."
    )
    results = directory / "results.csv"
    results.write_text(tables.csv_text(rows, tables.COLUMNS), "utf-8")
    console.print(f"wrote {results}")
    for figure, stem in ((figures.loss_curves(runs), "loss"), (figures.pareto(runs), "pareto")):
        for path in figures.save(figure, directory / stem):
            console.print(f"wrote {path}")

    shared = trained[SHARED]
    console.print(f"\n{SHARED} continues, greedily, after {training.steps} steps:")
    console.print(prompt, style="dim", end="")
    generate(
        shared.model(shared.params),
        ids,
        continuing,
        decode=tokenizer.decode,
        on_text=lambda _, text: console.print(text, end=""),
    )
    console.print(f"\n\nMore of it: cla-jax generate {shared.directory} --prompt 'import '")
    console.print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    try:
        main(tyro.cli(Quickstart, description=__doc__))
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt as error:
        print("quickstart: interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 130))
