"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: readers see the old text or the new, never a part.

    What is no regular file, as /dev/stdout, is written to as it is.
    """
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
