"""Long commands of single tests, run beside the tests before them: most tests leave a core idle.

A module's `EARLY` names such tests, each with a function from an empty folder to the command, or to None where the
test does without. They start when the tests are collected, one after another; a test asks the fixture `early` for its
command's result, and waits where it is not there yet.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Command:
    """Words and environment of a process that is to start in `cwd`."""

    words: list[str]
    env: Mapping[str, str]
    cwd: Path


class Early:
    """One thread that runs commands in the order in which tests will ask for them."""

    def __init__(self) -> None:
        self._pool, self._place = ThreadPoolExecutor(1), tempfile.TemporaryDirectory()
        self._folders: dict[str, Path] = {}
        self._results: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
        self._running: subprocess.Popen[str] | None = None

    def begin(self, name: str, command: Callable[[Path], Command | None]) -> None:
        """Put the command of the test `name` into the queue."""
        folder = self._folders[name] = Path(self._place.name) / str(len(self._folders))
        folder.mkdir()
        if (one := command(folder)) is not None:
            self._results[name] = self._pool.submit(self._run, one)

    def _run(self, command: Command) -> subprocess.CompletedProcess[str]:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command.words, env=command.env, cwd=command.cwd, stdout=pipe, stderr=pipe, text=True
        ) as self._running:
            out, err = self._running.communicate()
        return subprocess.CompletedProcess(command.words, self._running.returncode, out, err)

    def result(self, name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        """How the command of the test `name` ended, and its folder."""
        return self._results[name].result(), self._folders[name]

    def close(self) -> None:
        """End what still runs; remove the folders."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._running is not None:
            self._running.kill()
        self._pool.shutdown()
        self._place.cleanup()


def begin(session: pytest.Session) -> Early:
    """The commands of all tests of the session, begun."""
    early = Early()
    for item in session.items:
        name = item.name
        command = getattr(getattr(item, "module", None), "EARLY", {}).get(name)
        if command is not None and not session.config.option.collectonly:
            early.begin(name, command)
    return early
