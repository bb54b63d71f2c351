"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(target: Path, content: bytes) -> Path:
    """Writes beside the place and renames; a failure leaves what was there.

    Returns:
        The target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
