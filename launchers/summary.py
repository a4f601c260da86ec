"""The summary of a run in one table: its loss beside simple models', its speed, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesys.files import read_json
from moesys.measure.report.facts import results

PLACES = ("checkpoint", "metrics", "report")
"""Keys of summary.json that name files."""


def read(run_dir: Path) -> dict[str, Any] | None:
    """The run's summary.json, or None if there is none. Raises FileError if it is damaged."""
    path = run_dir / "summary.json"
    return read_json(path, "remove it, and launch the run again: it writes it anew") if path.exists() else None


def table(summary: dict[str, Any], run_dir: Path) -> Table:
    """`summary` as a table for the terminal."""
    result = Table(title=f"run {run_dir.name}", title_justify="left", show_header=False)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for label, text in results(summary):
        result.add_row(label, text)
    for key in PLACES:
        if summary.get(key):
            result.add_row(key, Text(str(summary[key])))
    if summary.get("communication"):
        result.add_row("communication", summary["communication"]["sentence"])
    result.add_row("summary", Text(str(run_dir / "summary.json")))
    return result


def show(run_dir: Path, console: Console) -> None:
    """Print the summary of the run in `run_dir`, if it wrote one."""
    summary = read(run_dir)
    if summary is not None:
        console.print(table(summary, run_dir))
