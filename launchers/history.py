"""The launches of a run: one line each in launches.jsonl, with the command, the date and the versions."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moesys.files import json_text
from moesys.launchers.command import command_line
from moesys.version import __version__

PACKAGES = ("torch", "ray", "megatron-core")
"""Packages whose versions are noted, if they are installed."""


def note(run_dir: Path) -> None:
    """Add this process' command to the run's launches."""
    run_dir.mkdir(parents=True, exist_ok=True)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "versions": versions(),
    }
    with (run_dir / "launches.jsonl").open("a") as launches:
        launches.write(json_text(line) + "\n")


def versions() -> dict[str, str]:
    """Versions of moesys, Python and the packages that decide what a run computes."""
    found = {"moesys": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
