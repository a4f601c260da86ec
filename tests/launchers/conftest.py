"""Runs of toy workers, each launched by a driver process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moesys.config.schema import Config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PATIENCE_S = 600.0
"""After which a process counts as hung. It decides nothing else: on a busy machine all takes longer."""


class Launched:
    """A driver process (drive.py), its run folder, and what it and its workers did."""

    def __init__(self, launcher: str, run_dir: Path, ranks: int, settings: tuple[str, ...], env: dict[str, str]):
        self.run_dir = run_dir
        command = [sys.executable, str(HERE / "drive.py"), launcher, str(run_dir), str(ranks), *settings]
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RAY_ADDRESS")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
            **env,
        }
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        )

    def finish(self, timeout: float = PATIENCE_S) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of the driver, once it has ended."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def seen(self) -> list[dict[str, Any]]:
        """What each worker saw, in rank order."""
        files = sorted((self.run_dir / "seen").glob("*.json"), key=lambda path: int(path.stem))
        return [json.loads(path.read_text()) for path in files]

    def wait_until_training(self, timeout: float = PATIENCE_S) -> list[int]:
        """The workers' process numbers, once they have taken a step."""
        metrics = self.run_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() or self.process.poll() is not None, timeout)
        assert self.process.poll() is None, self.process.communicate()
        return [worker["pid"] for worker in self.seen()]

    def alive(self) -> list[int]:
        """The workers that still run."""
        return [worker["pid"] for worker in self.seen() if alive(worker["pid"])]

    def wait_until_gone(self, pids: Iterable[int], timeout: float = PATIENCE_S) -> None:
        """Return when none of these processes runs any more; fails after `timeout` seconds."""
        wait_for(lambda: not any(map(alive, pids)), timeout)

    def descendants(self) -> dict[int, str]:
        """Everything that the driver started, and what that started: process number → command line."""
        found: dict[int, str] = {}
        parents = {self.process.pid}
        while parents:
            children = {pid for pid, parent in all_parents().items() if parent in parents}
            found |= {pid: command_line(pid) for pid in children}
            parents = children
        return found


def wait_for(condition: Callable[[], bool], timeout: float) -> None:
    """Return when `condition` holds; fails after `timeout` seconds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_parents() -> dict[int, int]:
    """Process number → its parent's, of all processes."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return parents


def command_line(pid: int) -> str:
    """A process's command line, "" if it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """`launched(launcher, ranks, "section.key=value", ..., VARIABLE=value)` starts a driver process."""
    started: list[Launched] = []

    def start(launcher: str, ranks: int, *settings: str, **env: str) -> Launched:
        started.append(Launched(launcher, tmp_path / "run", ranks, settings, env))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


@pytest.fixture
def config() -> Callable[..., Config]:
    """`config(cluster={...}, launch={...}, ...)` makes a small configuration."""

    def make(**sections: object) -> Config:
        return Config.model_validate({"model": {"hidden": 8, "layers": 1}, **sections})

    return make
