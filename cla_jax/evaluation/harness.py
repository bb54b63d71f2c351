"""Our models in EleutherAI's lm-evaluation-harness (Gao et al. 2023), without torch.

The only module that imports it (extra `eval`). `evaluate` scores a loaded model in process; run as
a program it is the harness's own command line with our models registered:

    python -m cla_jax.evaluation.harness run --model cla-jax --model_args checkpoint=runs/mine \
        --tasks piqa
"""

import contextlib
import dataclasses
import difflib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cla_jax.evaluation.records import Counts, as_json, evaluation_record
from cla_jax.evaluation.scoring import Request, Scorer, rolling_windows
from cla_jax.evaluation.task_sets import SETS, TASKS, TaskData
from cla_jax.inference import GenerateConfig, Sampling, generate
from cla_jax.loading import TextModel, load

try:
    import datasets
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import ConfigurableTask, Task
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise ValueError(
        "benchmarks run through lm-evaluation-harness, which is not installed "
        f"(no module {missing.name}): pip install 'cla-jax[eval]'"
    ) from None

__all__ = ["HarnessModel", "build_tasks", "evaluate"]

BOOTSTRAP = 1000  # resamples behind a standard error that has no formula (LAMBADA's perplexity)

_log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """A model of ours as the harness knows models.

    Args:
        checkpoint: a loaded model, or a path for `cla_jax.load`.
        batch_size: sequences of full length in one pass; None or `auto`: as `Scorer` chooses.
        through_cache: score token by token through the KV cache.
        cache_dtype: of that cache, as in `Scorer`.
        tokenizer: for a checkpoint without its own, as for `cla_jax.load`.
        max_batch_size: not used; the harness's command line gives it.
        device: not used: JAX's own choice; likewise.

    Attributes:
        counts: what was asked so far.

    Raises:
        ValueError: what `cla_jax.load` and `Scorer` raise, an unknown argument.
    """

    def __init__(
        self,
        checkpoint: TextModel | str | None = None,
        batch_size: int | str | None = None,
        through_cache: bool = False,
        cache_dtype: str | None = None,
        tokenizer: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            known = ("cache_dtype", "checkpoint", "through_cache", "tokenizer")
            name = next(iter(unknown))
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"model argument {name!r} is unknown: known are {', '.join(known)}; the nearest is "
                f"{near!r}"
            )
        if checkpoint is None:
            raise ValueError("the model argument checkpoint=DIRECTORY is missing")
        if isinstance(checkpoint, TextModel):
            self.model = checkpoint
        else:
            self.model = load(checkpoint, tokenizer=tokenizer)
        if batch_size is None or str(batch_size).startswith("auto"):
            rows = None
        else:
            rows = int(batch_size)
        self.scorer = Scorer(
            self.model.decoder, batch_size=rows, through_cache=bool(through_cache),
            cache_dtype=cache_dtype,
        )  # fmt: skip
        self._rows = rows or 8
        self.counts = Counts()

    def check(self, tasks: Sequence[Any]) -> None:
        """Whether it can do what tasks ask of it, before any is scored.

        Raises:
            ValueError: generation that is longer than the context, or asked for wrongly.
        """
        for task in tasks:
            config = getattr(task, "config", None)
            if config is not None and config.output_type == "generate_until":
                try:
                    self._generation(config.generation_kwargs or {})
                except (TypeError, ValueError) as error:
                    raise ValueError(f"task {config.task}: {error}") from None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, behind which a text without context is scored."""
        return self.model.tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, for the harness's caches."""
        return f"{self.model.tokenizer.name}-{self.model.tokenizer.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, without any special token: not the tokenizer's own for a beginning either."""
        return self.model.tokenizer.encode(string).tolist()

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's JSON."""
        return {
            "model_name": self.model.config.name,
            "model_num_parameters": self.model.config.parameters,
            "max_length": self.max_length,
            **dataclasses.asdict(self.counts),
        }

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        for texts, _, continuation in requests:
            if not continuation:
                raise ValueError(f"nothing to score: the continuation of {texts!r} has no tokens")
        with self._counting(len(requests)), self._bar(len(requests), disable_tqdm) as done:
            # A context of spaces alone has given them to its continuation.
            asked = [Request(c or [self.eot_token_id], t) for _, c, t in requests]
            scores = self.scorer.score(asked, done)
        self._report_truncated(sum(score.truncated for score in scores), len(requests))
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in disjoint windows behind the end-of-text token."""
        texts = [request.args[0] for request in requests]
        windows = [
            rolling_windows(tokens, self.eot_token_id, self.max_length)
            for tokens in self.model.tokenizer.encode_batch(texts)
        ]
        flat = [window for of_text in windows for window in of_text]
        with self._counting(len(requests)), self._bar(len(flat), disable_tqdm) as done:
            scores = iter(self.scorer.score(flat, done))
        sums = [math.fsum(next(scores).log_likelihood for _ in of_text) for of_text in windows]
        for text, log_likelihood in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), log_likelihood)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, the end of the text or the most tokens."""
        prompts = self.model.tokenizer.encode_batch([request.args[0] for request in requests])
        groups: dict[GenerateConfig, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._generation(request.args[1]), []).append(number)
        texts, truncated = [""] * len(requests), 0
        with self._counting(len(requests)), self._bar(len(requests), disable_tqdm) as done:
            for config, numbers in groups.items():
                room = self.max_length - config.max_new_tokens
                truncated += sum(len(prompts[n]) > room for n in numbers)
                # A prompt without tokens is a document's beginning.
                cut = {n: prompts[n][-room:] if len(prompts[n]) else [self.eot_token_id]
                       for n in numbers}  # fmt: skip
                for n, text in self._generated(config, cut, done):
                    texts[n] = text
                    self.cache_hook.add_partial("generate_until", requests[n].args, text)
        self._report_truncated(truncated, len(requests))
        return texts

    def _generation(self, arguments: Mapping[str, Any]) -> GenerateConfig:
        """How a request wants to be continued."""
        options: Any = normalize_gen_kwargs(dict(arguments), min(256, self.max_length // 2))
        until = options.get("until") or []
        if not isinstance(until, str | list) or not all(isinstance(s, str) for s in until):
            raise ValueError(f"until is {until!r}: expected a stop string or a list of them")
        new_tokens = int(options["max_gen_toks"])
        if not 0 < new_tokens < self.max_length:
            raise ValueError(
                f"max_gen_toks={new_tokens}: {self.model.config.name} reads {self.max_length} "
                f"tokens, prompt and new ones together; give 1 to {self.max_length - 1} in "
                "the task's generation_kwargs"
            )
        temperature = float(options.get("temperature") or 0.0) if options["do_sample"] else 0.0
        return GenerateConfig(
            max_new_tokens=new_tokens,
            sampling=Sampling(
                temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
            ),
            stop_tokens=(self.eot_token_id,),
            stop_strings=tuple(
                dict.fromkeys(s for s in ([until] if isinstance(until, str) else until) if s)
            ),
        )

    def _generated(
        self, config: GenerateConfig, prompts: Mapping[int, Any], done: Callable[[int], None]
    ) -> Iterator[tuple[int, str]]:
        """Texts by number, in batches of like lengths and of one size."""
        order = sorted(prompts, key=lambda n: -len(prompts[n]))
        room = len(prompts[order[0]]) + config.max_new_tokens
        config = dataclasses.replace(config, room=room)
        rows = min(self._rows, len(order))
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            padded = [prompts[n] for n in batch] + [prompts[batch[-1]]] * (rows - len(batch))
            found = generate(
                self.scorer.decoder, padded, config, first_row=start,
                decode=self.model.tokenizer.decode,
            )  # fmt: skip
            done(len(batch))
            yield from ((n, one.text or "") for n, one in zip(batch, found, strict=False))

    def _report_truncated(self, truncated: int, total: int) -> None:
        self.counts.truncated += truncated
        if truncated:
            _log.warning(
                f"{truncated} of {total} requests were longer than the {self.max_length} tokens "
                f"that {self.model.config.name} reads, and lost their beginning"
            )

    @contextlib.contextmanager
    def _counting(self, requests: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.counts.seconds += time.perf_counter() - started
        self.counts.requests += requests

    @contextlib.contextmanager
    def _bar(self, total: int, disable: bool) -> Iterator[Callable[[int], None]]:
        hidden = disable or not sys.stderr.isatty()
        with tqdm(total=total, disable=hidden, desc=self.model.config.name) as bar:
            yield lambda n: (bar.update(n), None)[1]


register_model("cla-jax")(HarnessModel)


class LocalTask(ConfigurableTask):
    """A task whose items are in memory."""

    def __init__(self, config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        """Nothing is fetched."""
        self.dataset = {"test": datasets.Dataset.from_list(list(self._rows))}


def build_tasks(
    names: Sequence[str],
    local: Mapping[str, TaskData] | None = None,
    include_path: Path | None = None,
) -> list[Task | str]:
    """The harness's tasks of these names, their data read.

    Args:
        names: the papers' tasks, the harness's, or those of `include_path`.
        local: data of the papers' tasks (`local_data`). With it, nothing is looked for on the hub:
            other names must be of `include_path`.
        include_path: a directory of task YAML files.

    Raises:
        ValueError: an unknown name (with the nearest), data that are not to be had.
    """
    if include_path is not None and not any(include_path.rglob("*.yaml")):
        raise ValueError(f"--include-path {include_path}: there is no task .yaml file in it")
    others = [name for name in names if name not in (local or {})]
    tasks: list[Any] = [_local_task(data) for data in (local or {}).values()]
    if not others:
        return tasks
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=False
    )
    if not set(others) <= set(manager.all_tasks) and local is None:
        manager = TaskManager(include_path=manager.include_path)  # reads all of the harness's files
    known = [*manager.all_tasks, *(local or {}), *SETS, *TASKS]
    for name in others:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            where = "" if local is None else " (with --data-dir, tasks come from files alone)"
            if include_path is not None:
                where += f", nor in a YAML file of {include_path} that could be read"
            raise ValueError(f"there is no task {name!r}{where}{hint}")
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever the task's data set raises
            first = (str(error).strip().splitlines() or [""])[0]
            advice = ". Without the network, give the papers' tasks as files: --data-dir"
            raise ValueError(
                f"the data of task {name!r} could not be read ({type(error).__name__}: {first})"
                + (advice if name in TASKS else "")
            ) from None
        tasks += loaded["tasks"].values()
    return tasks


def _local_task(data: TaskData) -> LocalTask:
    config = {
        "task": data.task, "test_split": "test", "num_fewshot": 0, **TASKS[data.task].config,
        "metadata": {"version": "local", "file": data.file},
    }  # fmt: skip
    if data.task == "wikitext":
        from lm_eval.tasks.wikitext import preprocess_wikitext  # type: ignore[import-not-found]

        config["doc_to_target"] = preprocess_wikitext.wikitext_detokenizer
        config["process_results"] = preprocess_wikitext.process_results
    return LocalTask(config, data.rows)


def evaluate(
    model: TextModel,
    tasks: Sequence[Any],
    *,
    local: Mapping[str, TaskData] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    through_cache: bool = False,
    cache_dtype: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores a model on tasks.

    Args:
        model: loaded.
        tasks: of `build_tasks`.
        local: the data behind them, for the record.
        limit: items of each task, the first; None: all.
        batch_size: as in `Scorer`.
        through_cache: as in `Scorer`.
        cache_dtype: as in `Scorer`.

    Returns:
        The record that `cla_jax.reporting` reads (`evaluation.json`), and the harness's own
        results, both as JSON values.
    """
    adapter = HarnessModel(
        model, batch_size=batch_size, through_cache=through_cache, cache_dtype=cache_dtype
    )
    adapter.check(tasks)
    run: Any = simple_evaluate  # its decorator hides its arguments
    # What it prints on the way is no part of what we print.
    with _one_process(), contextlib.redirect_stdout(sys.stderr):
        found = run(
            adapter, tasks=list(tasks), limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAP,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
    assert found is not None
    results = as_json(dict(found))
    record = evaluation_record(
        model, adapter.scorer, adapter.counts, results,
        local=local or {}, limit=limit, through_cache=through_cache,
    )  # fmt: skip
    return record, results


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Bootstrapping without forks, which JAX's threads do not survive."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        with _one_process():
            cli_evaluate()
    except ValueError as error:
        sys.exit(f"lm-eval: {error}")


if __name__ == "__main__":
    main()
