"""From a run to its exit code: start the workers, show how they get on, stop them when asked to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console

from moesys.errors import LaunchError
from moesys.launchers import slurm, summary
from moesys.launchers.failure import Outcome
from moesys.launchers.progress import Progress
from moesys.launchers.spec import RunSpec
from moesys.launchers.stop import STOPPED, StopRequests

POLL_S = 0.1


class Workers(Protocol):
    """What a launcher is to `watch`: something that starts, is asked how it goes, and can be stopped."""

    def start(self, phase: Callable[[str], None]) -> None:
        """Start the workers, or raise `LaunchError`; `phase` is told what is being waited for."""

    def poll(self) -> Outcome | None:
        """None while the run goes on; else how it ended, with no worker left running."""

    def stop(self) -> None:
        """End all workers and what was started for them; returns when none is left. Harmless twice."""


def launch(spec: RunSpec, launcher: str, console: Console | None = None) -> int:
    """Run `spec` with `launcher` to its end (slurm: submit it); returns the exit code, 0 if it finished.

    A failing worker's error is printed, and its exit code returned; a stop on request (Ctrl-C, SIGTERM)
    returns 130. Raises `LaunchError` if the workers cannot be started.
    """
    if launcher == "slurm":
        return slurm.submit(spec)
    return watch(workers(spec, launcher), spec, console or Console())


def workers(spec: RunSpec, launcher: str) -> Workers:
    """The not yet started workers of `launcher`."""
    if launcher == "local":
        from moesys.launchers.local import LocalWorkers

        return LocalWorkers(spec)
    if launcher == "ray":
        from moesys.launchers.ray import RayWorkers  # Ray takes half a second to import

        return RayWorkers(spec)
    raise LaunchError(f"there is no launcher {launcher!r}: use ray, local or slurm")


def watch(started: Workers, spec: RunSpec, console: Console) -> int:
    """Start workers, show their progress until they end or are asked to stop; returns the exit code."""
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    with StopRequests() as stop, Progress(spec.run_dir, console) as progress:
        outcome = run(started, progress, stop)
    if outcome.message:
        print(f"moesys: {outcome.message}", file=sys.stderr)
    if outcome.exit_code == 0:
        summary.show(spec.run_dir, console)
    return outcome.exit_code


def run(started: Workers, progress: Progress, stop: StopRequests) -> Outcome:
    """The loop of `watch`; whatever happens in it, no worker is left running."""
    try:
        started.start(progress.phase)
        stop.install()
        while stop.requested is None:
            outcome = started.poll()
            if outcome is not None:
                return outcome
            progress.refresh()
            time.sleep(POLL_S)
        progress.phase("stopping")
        return Outcome(STOPPED, f"stopped by {stop.requested.name}")
    finally:
        started.stop()
