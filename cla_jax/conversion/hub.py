"""Where a checkpoint directory lies: a path, or a model on the Hugging Face hub."""

import difflib
import re
from pathlib import Path

from cla_jax.conversion.safetensors_io import CHECKSUMS, INDEX

__all__ = ["TOKENIZER_FILES", "huggingface_directory", "source_name"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def huggingface_directory(source: str | Path) -> Path:
    """A checkpoint directory by its path, or by `OWNER/NAME[@REVISION]` from the hub's cache.

    Of a model on the hub, `config.json`, safetensors and tokenizer files are fetched; `hf:` may
    stand in front.

    Raises:
        ValueError: no such directory, or nothing to be had from the hub.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: expected a checkpoint directory")
    name = str(source).removeprefix("hf:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        parent = path.parent
        siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; the nearest is {parent / near[0]}" if near else ""
        raise ValueError(
            f"no directory {path}{hint}. Expected a checkpoint directory or OWNER/NAME[@REVISION] "
            "on the Hugging Face hub"
        )
    return _from_hub(name)


def source_name(source: str | Path) -> str:
    """What a model is called by where it comes from: its directory's name, or that on the hub."""
    path = Path(source).expanduser()
    return path.resolve().name if path.is_dir() else str(source).removeprefix("hf:")


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["config.json", "model*.safetensors", INDEX,
                            CHECKSUMS, *TOKENIZER_FILES],
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"there is no directory {name}, and {repository!r} could not be had from the Hugging "
            f"Face hub nor from its local cache ({type(error).__name__}: {cause}). Offline, give a "
            "directory instead"
        ) from None
    return Path(path)
