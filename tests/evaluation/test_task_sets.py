"""Local files of the papers' tasks: what is read, and what is refused with which words."""

import json

import pytest

from cla_jax.evaluation.task_sets import SETS, TASKS, expand, local_data

QUERY = {"query": "Question: why?\nAnswer:", "choices": [" one", " two  ", "three"], "gold": 1}
CONTEXTS = {"contexts": ["the cat", "the dog"], "continuation": " sat there.", "gold": 0}
WORD = {"query": "once upon a", "continuation": " time"}


def write(directory, name, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("\n".join(lines) + "\n")


def test_sets_are_the_papers():
    assert expand(["cla"]) == SETS["cla"]
    assert expand(["mlkv", "cla", "mine", "piqa"]) == (
        "arc_easy", "lambada_openai", "piqa", "sciq", "wikitext", "hellaswag", "winogrande",
        "openbookqa", "boolq", "mine",
    )  # fmt: skip
    assert set(expand(SETS)) == set(TASKS)


def test_every_form_is_read(tmp_path):
    write(tmp_path / "mc", "piqa_validation.jsonl", QUERY, "", QUERY)
    write(tmp_path / "mc", "winogrande_xl_validation.jsonl", CONTEXTS)
    write(tmp_path, "lambada_openai.jsonl", WORD)
    write(tmp_path, "wikitext2_raw_test.txt", " ", " = One = ", " text", " = = Part = = ", " more",
          " = Two @-@ b = ", " end")  # fmt: skip
    names = ("mine", "wikitext", "piqa", "winogrande", "lambada_openai")
    found = local_data(names, tmp_path)
    assert list(found) == list(names[1:])
    assert found["piqa"].file == "piqa_validation.jsonl"
    assert found["piqa"].rows == (
        {"query": QUERY["query"], "choices": ["one", "two  ", "three"], "gold": 1},
    ) * 2  # fmt: skip
    assert found["winogrande"].rows[0]["continuation"] == "sat there."
    assert found["lambada_openai"].rows == (WORD,)
    assert [row["page"].split("\n")[0] for row in found["wikitext"].rows] == [
        " = One = ", " = Two @-@ b = ",
    ]  # fmt: skip
    assert "more" in found["wikitext"].rows[0]["page"]


def test_line_ends_do_not_matter(tmp_path):
    """WikiText is to be had with both; the harness's detokenizer knows one."""
    lines = ["", " = One = ", " a , b", " = Two = ", " c", ""]
    found = []
    for name, end in (("unix", "\n"), ("dos", "\r\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wikitext.txt").write_bytes(end.join(lines).encode())
        found.append(local_data(["wikitext"], tmp_path / name)["wikitext"].rows)
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_plain_name_comes_first(tmp_path):
    write(tmp_path, "sciq_validation.jsonl", QUERY)
    write(tmp_path, "sciq_test.jsonl", QUERY, QUERY)
    assert local_data(["sciq"], tmp_path)["sciq"].file == "sciq_test.jsonl"
    write(tmp_path, "sciq.jsonl", QUERY)
    assert local_data(["sciq"], tmp_path)["sciq"].file == "sciq.jsonl"


@pytest.mark.parametrize(
    ("task", "file", "rows", "message"),
    [
        ("piqa", "piqa.jsonl", [""], "piqa.jsonl is empty: expected at least one item"),
        ("piqa", "piqa.jsonl", [QUERY, '{"query": "a'], "piqa.jsonl, line 2 is not JSON"),
        ("piqa", "piqa.jsonl", ["[1]"], r"line 1: expected an object, found \[1\]"),
        ("piqa", "piqa.jsonl", [QUERY, {**QUERY, "gold": 3}], "line 2: gold is 3, expected 0 to 2"),
        ("piqa", "piqa.jsonl", [{**QUERY, "gold": -1}], "gold is -1"),
        ("piqa", "piqa.jsonl", [{**QUERY, "gold": True}], "gold is True"),
        ("piqa", "piqa.jsonl", [{**QUERY, "gold": "1"}], "gold is '1'"),
        ("piqa", "piqa.jsonl", [{"query": "a", "choice": [], "gold": 0}],
         "no field 'choices' among .*; the nearest is 'choice'"),
        ("piqa", "piqa.jsonl", [{**QUERY, "choices": ["a"]}], "expected a list of two texts"),
        ("piqa", "piqa.jsonl", [{**QUERY, "choices": ["a", ""]}], "choices holds ''"),
        ("piqa", "piqa.jsonl", [{**QUERY, "query": None}], "query is None, expected a text"),
        ("winogrande", "winogrande.jsonl", [{**CONTEXTS, "gold": 2}], "gold is 2, expected 0 to 1"),
        ("lambada_openai", "lambada_openai.jsonl", [{"query": "a"}], "no field 'continuation'"),
        ("lambada_openai", "lambada_openai.jsonl", [{**WORD, "continuation": "time"}],
         "continuation is 'time', expected the space before the word"),
        ("piqa", "piqa.jsonl", ['{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}'],
         "query is .* expected a text"),
        ("wikitext", "wikitext.txt", ["no article"], "no line ' = Title = '"),
    ],
)  # fmt: skip
def test_refuses_what_is_wrong_and_says_where(tmp_path, task, file, rows, message):
    write(tmp_path, file, *rows)
    with pytest.raises(ValueError, match=message) as refused:
        local_data([task], tmp_path)
    assert str(tmp_path / file) in str(refused.value)


def test_refuses_what_is_missing(tmp_path):
    write(tmp_path / "eval", "piqa.jsonl", QUERY)
    with pytest.raises(ValueError, match=r"the nearest is .*eval$"):
        local_data(["piqa"], tmp_path / "evals")
    with pytest.raises(ValueError, match=r"no file for\n  sciq: sciq.jsonl or .*\n  boolq: "):
        local_data(["piqa", "sciq", "boolq"], tmp_path / "eval")
    (tmp_path / "eval" / "piqa.jsonl").write_bytes(b'{"query": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"piqa.jsonl is not UTF-8: byte 14"):
        local_data(["piqa"], tmp_path / "eval")
