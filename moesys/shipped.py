"""The configurations and guides that come with the package, wherever it is installed."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).parent
CONFIGS = FOLDER / "configs"
DOCS = FOLDER / "docs"


def configs() -> list[tuple[str, str]]:
    """Every shipped configuration as a path from `FOLDER`, with a sentence about it."""
    paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return [(path.relative_to(FOLDER).as_posix(), about(path)) for path in paths]


def about(path: Path) -> str:
    """The first sentence of a configuration's first comment; "" if it begins with none."""
    comment = takewhile(lambda line: line.strip("# "), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), comment))
    return re.split(r"(?<=\.) ", text)[0]


def names() -> dict[str, Path]:
    """Every shipped configuration by its name: the file's, without folder and ending ("mixtral-8x7b")."""
    return {path.stem: path for path in sorted(CONFIGS.rglob("*.yaml"), key=lambda path: path.stem)}


def find(text: str) -> Path | None:
    """The shipped configuration that `text` names; None if none has this name.

    Its name alone ("mixtral-8x7b"), or its path with or without the folder configs ("models/mixtral-8x7b.yaml").
    """
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text:
        return None
    if text in (known := names()):
        return known[text]
    inside = CONFIGS.joinpath(*(path.parts[1:] if path.parts[:1] == ("configs",) else path.parts))
    return inside if inside in known.values() else None


def config(text: str) -> Path:
    """The path of the configuration `text`: a file or, if there is none, a shipped one (configs/quickstart.yaml)."""
    path = Path(text)
    if path.is_absolute() or path.parts[:1] != ("configs",) or ".." in path.parts or "\0" in text:
        return path
    try:
        return path if path.exists() or not (FOLDER / path).is_file() else FOLDER / path
    except OSError:  # no file can have this name: opening it gives the message
        return path
