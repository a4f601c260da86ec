"""The launches of a run: one line each in launches.jsonl, with the command, the date and the versions."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moesys import __version__
from moesys.files import json_text

PACKAGES = ("torch", "ray", "megatron-core")
"""Whose versions are noted, where they are installed."""

SECRET = re.compile(r"^([^=]*(?:KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH)[^=]*)=.*$", re.IGNORECASE | re.DOTALL)
"""An override whose key says that its value is nobody's business."""


def note(run_dir: Path) -> None:
    """Add this process' command to the run's launches."""
    run_dir.mkdir(parents=True, exist_ok=True)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "versions": versions(),
    }
    with (run_dir / "launches.jsonl").open("a") as launches:
        launches.write(json_text(line) + "\n")


def command(arguments: Sequence[str]) -> str:
    """What was typed, ready for a shell; values of secret keys are left out."""
    words = [SECRET.sub(r"\1=…", word) for word in arguments[1:]]
    return shlex.join(["moesys", *words])


def versions() -> dict[str, str]:
    """Of moesys, Python and the packages that decide what a run computes."""
    found = {"moesys": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
