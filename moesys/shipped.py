"""The configurations and guides that come with the package, wherever it is installed."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIGS = FOLDER / "configs"
DOCS = FOLDER / "docs"


def configs() -> list[tuple[str, str]]:
    """Every shipped configuration as a path from `FOLDER`, with its first comment."""
    paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return [(path.relative_to(FOLDER).as_posix(), _about(path)) for path in paths]


def _about(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def config(text: str) -> Path:
    """The path of the configuration `text`: a file or, if there is none, a shipped one (configs/quickstart.yaml)."""
    path = Path(text)
    if path.is_absolute() or path.parts[:1] != ("configs",) or ".." in path.parts or "\0" in text:
        return path
    try:
        return path if path.exists() or not (FOLDER / path).is_file() else FOLDER / path
    except OSError:  # no file can have this name: opening it gives the message
        return path
