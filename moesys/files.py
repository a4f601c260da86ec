"""Writes files that are whole or absent, and JSON that any parser reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from moesys.errors import FileError


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: readers see the old text or the new, never a part.

    A path that is no regular file, such as /dev/stdout, is written to directly.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist.

    Raises:
        FileError: it does, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileError(f"{path}: exists, and is left as it is\n    remedy: name another file by --to") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FileError(f"{path}: {reason}\n    remedy: name another file by --to") from None


def json_text(value: Any, indent: int | None = None, compact: bool = False) -> str:
    """`value` as strict JSON (RFC 8259): numbers that are not finite, which JSON lacks, become null."""
    separators = (",", ":") if compact else None
    return json.dumps(_finite(value), indent=indent, separators=separators, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Replace `path` by `value` as strict JSON, at once."""
    write_whole(path, json_text(value, indent) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: missing, unreadable, no JSON or no object; names the file and says `remedy`.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path}: {(error.strerror or str(error)).lower()}\n    remedy: {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON ({error})\n    remedy: {remedy}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, not an object\n    remedy: {remedy}")
    return value


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of one JSON object per line, without lines that are damaged or cut short.

    A file that does not exist has none.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value
