"""MLKV Figures 3, 5 and 6: memory and tokens/s against the batch, up to the largest that fits.

Paper: Zuhri et al. 2024 (arXiv 2406.09297), sections 4.5 and 5.2. A cache of length 2000, then 48
tokens one by one. Expected: memory rises by the K/V of a row (KV bytes per token x 2048); on a 12
GB GPU the largest batch of Pythia-160M is 48, of MLKV-2 940, of MLKV-1 1100; at batch 8 sharing
makes no difference to tokens/s.

    python experiments/mlkv/inference.py                   # tiny, any machine: minutes
    python experiments/mlkv/inference.py --scale 160m      # one GPU: Figures 3 and 6
    python experiments/mlkv/inference.py --scale 410m      # one GPU: Figure 5
    python experiments/mlkv/inference.py --smoke --models MHA MLKV-1      # seconds

Random weights. Every model has a process of its own, so that the device's peak is its alone. The
cache is made at once in its whole length (the paper's grows by 48 tokens). Memory is the
allocator's count with weights and cache in place; what a step needs while it runs is listed apart.
The largest batch is the planner's, and the last that is measured 0.98 of it: `python
experiments/throughput.py --verify` holds the planner against the device. The slope of memory over
the batch must be the formula's to 2 % where an allocator counts. Every point is saved as it is
measured, and the same command goes on; `cla-jax report OUT` draws again.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from cla_jax.configs import ComputeDtype, ExecutionConfig, ModelConfig
from cla_jax.experiment import run_experiment
from cla_jax.registry import match_models, model

TOLERANCE = 0.02
FEW = 8  # Figure 6


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a scale is measured."""

    length: int
    memory: str | None
    compute_dtype: ComputeDtype


SETTINGS = {
    "tiny": Setting(208, "128MiB", "float32"),  # bfloat16 is slow on CPUs
    "160m": Setting(2000, None, "bfloat16"),
    "410m": Setting(2000, None, "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Inference:
    """Measure what decoding takes, for each variant of a Pythia model."""

    scale: Literal["tiny", "160m", "410m"] = "tiny"
    """tiny: on a CPU; 160m and 410m: the paper's, on one GPU."""
    models: tuple[str, ...] = ("*",)
    """Names or globs, such as MHA 'MLKV-*'."""
    length: int | None = None
    """Tokens that a row's cache holds before. Default: the paper's 2000 (tiny: 208)."""
    new_tokens: int = 48
    """Decoded one by one, and timed."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.98)
    """Of the largest batch, that are measured; batch 8, the paper's Figure 6, always
    is, if it fits."""
    memory: str | None = None
    """That the planner counts on, as 80GiB. Default: what the device lets JAX have (tiny:
    128MiB)."""
    out: Path | None = None
    """Where measurements, tables and figure go. Default: runs/mlkv-inference-SCALE."""
    smoke: bool = False
    """A short cache, few tokens and little memory: seconds a model."""


def main(options: Inference) -> int:
    """Measure, report; how many models failed or deviate."""
    names = match_models(f"pythia-{options.scale}", options.models)
    setting = SETTINGS[options.scale]
    length = setting.length if options.length is None else options.length
    new_tokens, memory = options.new_tokens, options.memory or setting.memory
    if options.smoke:
        length, new_tokens, memory = 12, 4, "80MiB"
    for field, value in (("length", length), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{field}={value} must be at least 1")
    for share in options.shares:
        if not 0 < share <= 1:
            raise ValueError(f"--shares {share}: expected above 0 and at most 1")
    longest = model(names[0]).sequence_length
    if length + new_tokens > longest:
        raise ValueError(
            f"length {length} and {new_tokens} new tokens are more than the {longest} that "
            f"pythia-{options.scale} takes; the longest cache is {longest - new_tokens}"
        )
    # JAX takes seconds to import: not before the options are known to be good.
    from cla_jax.inference.sizes import parse_size
    from cla_jax.reporting.inference_costs import load_inference, variants
    from cla_jax.reporting.report import report, show

    bytes_ = None if memory is None else parse_size(memory)
    suffix = "-smoke" if options.smoke else ""
    out = options.out or Path("runs") / f"mlkv-inference-{options.scale}{suffix}"
    wanted = {
        "scale": options.scale, "length": length, "new_tokens": new_tokens,
        "context": length + new_tokens, "cache_dtype": "bfloat16",
        "compute_dtype": setting.compute_dtype,
    }  # fmt: skip
    session = Session(out, wanted, bytes_, options.shares)
    failed = sum(not session.measure(model(name)) for name in names)
    show(report([out]))
    record = load_inference(out)
    for row in variants(record):
        if row.deviation is not None:
            far = record.counted == "allocator" and abs(row.deviation) > TOLERANCE
            failed += far
            print(
                f"{row.name}: {row.row_bytes:,.0f} bytes a row, expected "
                f"{row.expected_row_bytes:,}: {row.deviation:+.3%}{', too far' if far else ''}"
            )
    return failed


class Session:
    """`inference.json`: what was measured before, and what is measured now.

    Raises:
        ValueError: the directory holds measurements under other options.
    """

    def __init__(
        self, out: Path, options: dict[str, Any], memory: int | None, shares: Sequence[float]
    ) -> None:
        from cla_jax.reporting.inference_costs import load_inference
        from cla_jax.training.checkpoints import check_identity

        self.path, self.options, self.memory = out / "inference.json", options, memory
        self.shares, self.weight_bytes = shares, 0
        self.record: dict[str, Any] | None = None
        if self.path.exists():
            before = load_inference(out)
            saved = {"options": dict(before.options)}
            wanted: dict[str, Any] = {"options": options}
            if memory is not None:
                saved, wanted = {**saved, "device": {"memory": before.memory}}, {
                    **wanted, "device": {"memory": memory}
                }  # fmt: skip
            check_identity(saved, wanted, str(self.path))
            self.record = json.loads(self.path.read_text("utf-8"))
            self.memory = before.memory

    def measure(self, config: ModelConfig) -> bool:
        """All batches of a model that were not measured before; whether all of them could be."""
        todo = self._todo(config)
        if todo == []:
            return self._done(config)
        from cla_jax.evaluation.decoding_alone import DecodingProcess

        execution = ExecutionConfig(compute_dtype=self.options["compute_dtype"])
        try:
            with DecodingProcess(config, execution) as process:
                self._begin(process.device)
                for batch in self._todo(config) or ():
                    self._point(process, config, batch)
        except RuntimeError as error:
            print(f"{config.name}: {error}", file=sys.stderr)
            return False
        return self._done(config)

    def _done(self, config: ModelConfig) -> bool:
        fits = self._largest(config) > 0
        print(f"{config.name}: {'measured' if fits else 'not one row fits'}", file=sys.stderr)
        return fits

    def _largest(self, config: ModelConfig) -> int:
        from cla_jax.inference.planning import MemorySettings, largest_batch

        settings = MemorySettings(
            self.options["cache_dtype"], self.options["compute_dtype"],
            prefill_tokens=1,  # the cache is not prefilled here
            sampling=False,
        )  # fmt: skip
        assert self.memory is not None
        return largest_batch(config, self.options["context"], self.memory, settings)

    def _todo(self, config: ModelConfig) -> list[int] | None:
        """Batches that are not measured; None before the memory is known."""
        if self.record is None:
            return None
        most = self._largest(config)
        batches = {max(int(share * most), 1) for share in self.shares}
        if most >= FEW:
            batches.add(FEW)
        done = {p["batch"] for p in self.record["points"] if p["model"] == config.name}
        return sorted(batches - done) if most else []

    def _begin(self, device: Any) -> None:
        """Takes the device into the record.

        Raises:
            ValueError: another one than before, or one that does not say how much memory it has.
        """
        if self.record is not None:
            if (device.kind, device.counted) != (self.record["device"], self.record["counted"]):
                raise ValueError(
                    f"{self.path} was measured on {self.record['device']}, this is {device.kind}: "
                    "choose another --out"
                )
            self.weight_bytes = device.weight_bytes
            return
        self.memory = device.memory if self.memory is None else self.memory
        if self.memory is None:
            raise ValueError(
                f"{device.kind} does not say how much memory there is: give --memory 16GiB"
            )
        self.weight_bytes = device.weight_bytes
        self.record = {
            "options": self.options, "device": device.kind, "counted": device.counted,
            "memory": self.memory, "points": [],
        }  # fmt: skip

    def _point(self, process: Any, config: ModelConfig, batch: int) -> None:
        from cla_jax.data.files import write_json
        from cla_jax.reporting.inference_costs import InferencePoint

        assert self.record is not None
        costs = process.costs(
            batch, self.options["context"], cache_dtype=self.options["cache_dtype"],
            steps=self.options["new_tokens"], repeats=1, warm_up=2,
        )  # fmt: skip
        point = InferencePoint(
            model=config.name, batch=batch, largest_batch=self._largest(config),
            weight_bytes=self.weight_bytes, held_bytes=costs.held_bytes,
            peak_bytes=costs.peak_bytes, temporary_bytes=costs.temporary_bytes,
            step_seconds=costs.step_seconds,
        )  # fmt: skip
        self.record["points"].append(dataclasses.asdict(point))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.record)
        print(
            f"{config.name}: batch {batch:,}: {point.cache_bytes / 1e6:,.1f} MB beyond the "
            f"weights, {point.tokens_per_second:,.0f} tokens/s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_experiment("inference", lambda: main(tyro.cli(Inference, description=__doc__)))
