"""The blocks of README and docs, as Sybil finds them."""

from pathlib import Path

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).resolve().parents[1]
SLOW = "<!-- slow -->"


def examples(document: str) -> list[Example]:
    """The `python` and `sh` blocks of a document, in order; those of `sh` evaluate to nothing."""
    parsers = [PythonCodeBlockParser(), CodeBlockParser("sh", lambda example: None)]
    return list(Sybil(parsers=parsers).parse(ROOT / document).examples())


def is_shell(example: Example) -> bool:
    return example.region.lexemes is not None and example.region.lexemes["arguments"] == "sh"


def is_slow(example: Example) -> bool:
    """The document says so right above the block."""
    return example.document.text[: example.start].endswith(f"{SLOW}\n")


def python_blocks(document: str) -> list[str]:
    """The Python that takes no long time."""
    return [str(one.parsed) for one in examples(document) if not is_shell(one) and not is_slow(one)]
