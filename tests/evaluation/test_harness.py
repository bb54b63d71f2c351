"""Our models in lm-evaluation-harness: what it asks, and what comes out, on tiny local files."""

import json
import math
import re
import sys
import types

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer  # type: ignore[import-not-found]

from cla_jax.evaluation import Request, Scorer, harness, perplexity
from cla_jax.evaluation.harness import HarnessModel, build_tasks, evaluate
from cla_jax.evaluation.task_sets import SETS, TASKS, expand, local_data
from tests.evaluation.models import CONTEXT, Naive, text_model

CHOICES = [
    {"query": f"Q: {n}?\nA:", "choices": [" aa", f" {n} b", " cccc"], "gold": n % 3}
    for n in range(6)
]
CONTEXTS = [
    {"contexts": [f"the {n} cat", "the dog"], "continuation": " sat.", "gold": n % 2}
    for n in range(4)
]
WORDS = [{"query": "once upon a", "continuation": " time"}, {"query": "x", "continuation": " y"}]
PAGES = [" = One = \n \n some @-@ text , here . \n", " = Two = \n other \n"]


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.fixture
def data(tmp_path):
    """Files for all tasks of both sets."""
    for name in TASKS:
        rows = {"winogrande": CONTEXTS, "lambada_openai": WORDS}.get(name, CHOICES)
        if name == "wikitext":
            (tmp_path / "wikitext.txt").write_text("".join(PAGES))
        else:
            lines = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def likelihood(model, context: str, continuation: str) -> float:
    tokens = model.tokenizer.encode
    request = Request(tokens(context), tokens(continuation))
    return Scorer(model.decoder, batch_size=1).score([request])[0].log_likelihood


def test_all_tasks_of_both_sets_run_from_files(model, data):
    names = expand(SETS)
    local = local_data(names, data)
    record, results = evaluate(model, build_tasks(names, local), local=local, batch_size=8)
    tasks = record["tasks"]
    assert set(tasks) == set(TASKS)
    for name, found in tasks.items():
        assert TASKS[name].metric in found["metrics"], name
        assert found["data"] == local[name].file

    # PIQA's, WinoGrande's and LAMBADA's numbers from the likelihoods themselves.
    right = [
        int(np.argmax([likelihood(model, row["query"], c) for c in row["choices"]])) == row["gold"]
        for row in CHOICES
    ]
    acc = tasks["piqa"]["metrics"]["acc"]
    assert acc["value"] == pytest.approx(np.mean(right))
    assert acc["stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    right = [
        int(np.argmax([likelihood(model, c, row["continuation"]) for c in row["contexts"]]))
        == row["gold"]
        for row in CONTEXTS
    ]
    assert tasks["winogrande"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(right))
    sums = [likelihood(model, row["query"], row["continuation"]) for row in WORDS]
    lambada = tasks["lambada_openai"]["metrics"]
    assert lambada["perplexity"]["value"] == pytest.approx(math.exp(-np.mean(sums)), rel=1e-4)

    # Wikitext's from the detokenized text, over the words before that.
    pages = [row["page"] for row in local["wikitext"].rows]
    assert wikitext_detokenizer({"page": pages[0]}) == " = One =\n\nsome-text, here. "
    sums = [
        perplexity(Scorer(model.decoder, batch_size=1), model.tokenizer,
                   [wikitext_detokenizer({"page": page})]).log_likelihood
        for page in pages
    ]  # fmt: skip
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    found = tasks["wikitext"]["metrics"]["word_perplexity"]
    assert found == {"value": pytest.approx(math.exp(-sum(sums) / words), rel=1e-4), "stderr": None}

    assert record["model"] == "test"
    assert record["requests"]["requests"] == sum(
        {"winogrande": 2 * 4, "lambada_openai": 2, "wikitext": 2}.get(n, 3 * 6) for n in TASKS
    )
    assert record["requests"]["compiled_shapes"] <= 2
    assert json.loads(json.dumps(record)) == record
    assert results["config"]["model_name"] == "test"
    assert results["n-shot"]["piqa"] == 0


def test_limit_takes_the_first_items(model, data):
    local = local_data(["piqa"], data)
    record, _ = evaluate(model, build_tasks(["piqa"], local), local=local, limit=2, batch_size=1)
    assert record["tasks"]["piqa"]["items"] == 2
    assert record["requests"]["requests"] == 2 * 3
    assert record["limit"] == 2


def test_rolling_is_our_perplexity(model):
    texts = ["The cat sat on the mat, and then it left. " * 3, "", "short"]
    adapter = HarnessModel(model, batch_size=2)
    requests = [instance("loglikelihood_rolling", text) for text in texts]
    found = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found[1] == 0.0
    expected = perplexity(Scorer(model.decoder, batch_size=2), model.tokenizer, texts)
    assert sum(found) == pytest.approx(expected.log_likelihood, rel=1e-9)
    assert adapter.counts.requests == 3


def test_spaces_and_empty_contexts(model):
    adapter = HarnessModel(model, batch_size="auto")
    found = adapter.loglikelihood(
        [instance("loglikelihood", "a ", "b"), instance("loglikelihood", "", "ab")],
        disable_tqdm=True,
    )
    assert found[0][0] == pytest.approx(likelihood(model, "a", " b"), rel=1e-5)
    (own,) = Scorer(model.decoder, batch_size=1).score([Request([256], [97, 98])])
    assert found[1][0] == pytest.approx(own.log_likelihood, rel=1e-5)


def test_long_requests_are_cut_from_the_left_counted_and_reported(model, caplog):
    adapter = HarnessModel(model, batch_size=1)
    tail = "t" * CONTEXT
    asked = [("xyz" + tail, "ab"), ("abc" + tail, "ab"), ("t", "ab")]
    found = adapter.loglikelihood(
        [instance("loglikelihood", *pair) for pair in asked], disable_tqdm=True
    )
    assert found[0] == found[1]
    assert (adapter.counts.requests, adapter.counts.truncated) == (3, 2)
    assert "2 of 3 requests were longer than the 40 tokens that test reads" in caplog.text
    with pytest.raises(ValueError, match=r"nothing to score: the continuation of .* has no tokens"):
        adapter.loglikelihood([instance("loglikelihood", "a", "")], disable_tqdm=True)


def test_generation_stops_where_it_is_told(model):
    adapter = HarnessModel(model, batch_size=2)
    prompts = ["The ", "a" * (CONTEXT + 5), ""]
    options = {"until": [], "max_gen_toks": 5}
    whole = adapter.generate_until(
        [instance("generate_until", p, options) for p in prompts], disable_tqdm=True
    )
    naive = Naive(model.decoder)
    for prompt, text in zip(prompts, whole, strict=True):
        tokens = list(prompt.encode())[-(CONTEXT - 5) :] or [256]
        new = list[int]()
        for _ in range(5):
            row = naive.log_probabilities(np.array(tokens + new))[-1]
            if (token := int(row.argmax())) == 256:
                break
            new.append(token)
        assert text == model.tokenizer.decode(new)
    assert adapter.counts.truncated == 1
    stop = next(c for c in whole[0][1:] if c != whole[0][0])
    again = adapter.generate_until(
        [instance("generate_until", "The ", {"until": [stop, ""], "max_gen_toks": 5})],
        disable_tqdm=True,
    )
    assert again == [whole[0].split(stop)[0]]
    sampled = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 10, "until": "\n"}
    drawn = adapter.generate_until([instance("generate_until", "The ", sampled)] * 3)
    assert len(set(drawn)) > 1
    with pytest.raises(ValueError, match=r"max_gen_toks=40: test reads 40 tokens, .* give 1 to 39"):
        adapter.generate_until([instance("generate_until", "a", {"max_gen_toks": CONTEXT})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "task mine: max_gen_toks=40"),
        ({"until": 5}, "task mine: until is .*5.*: expected a stop string"),
    ],
)
def test_wrong_generation_is_refused_before_anything_is_scored(model, options, message):
    config = types.SimpleNamespace(
        task="mine", output_type="generate_until", generation_kwargs=options
    )
    with pytest.raises(ValueError, match=message):
        HarnessModel(model).check([types.SimpleNamespace(config=config)])


def test_a_context_of_spaces_is_scored(model):
    scores = HarnessModel(model).loglikelihood([instance("loglikelihood", "  ", "word")])
    assert math.isfinite(scores[0][0])


def test_tasks_of_ones_own(model, data):
    rows = [{"q": "a", "a": " b"}, {"q": "c", "a": " d"}]
    (data / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data / 'mine.jsonl'}}}}}\n"
        "doc_to_text: q\ndoc_to_target: a\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    local = local_data(["piqa", "mine"], data)
    tasks = build_tasks(["piqa", "mine"], local, data)
    record, _ = evaluate(model, tasks, local=local, batch_size=1)
    assert record["tasks"]["mine"] == {
        "metrics": {"acc": {"value": 0.0, "stderr": 0.0}}, "items": 2, "data": None, "sha256": None,
    }  # fmt: skip
    (data / "mine.jsonl").write_text("")
    with pytest.raises(ValueError, match="the data of task 'mine' could not be read"):
        build_tasks(["mine"], {}, data)


def test_unknown_names_are_refused(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"there is no task 'arc_eazy' .*; the nearest is 'arc_eas"
    ):
        build_tasks(["arc_eazy"], {})
    with pytest.raises(ValueError, match=r"there is no task .yaml file in it"):
        build_tasks(["mine"], {}, tmp_path)
    with pytest.raises(
        ValueError, match=r"'through_cash' is unknown: .*; the nearest is 'through_"
    ):
        HarnessModel(model, through_cash=True)


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called")  # it looks for git and the like
def test_the_harness_s_own_command_line_knows_our_models(model, data, monkeypatch, capsys):
    """Its index of all its tasks takes most of the time."""
    monkeypatch.setattr(harness, "load", lambda path, tokenizer: model)
    (data / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data / 'piqa.jsonl'}}}}}\n"
        "doc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = "run --model cla-jax --model_args checkpoint=runs/mine --tasks mine"
    arguments += f" --include_path {data} --output_path {data}/out"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments.split()])
    harness.main()
    assert re.search(r"\|mine *\|", capsys.readouterr().out)
    (written,) = (data / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["mine"]["acc,none"] in np.arange(7) / 6
