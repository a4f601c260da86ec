"""Launches a run: starts the workers, shows their progress, stops them on request, and returns an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from rich.console import Console

from moesys.errors import LaunchError
from moesys.launchers import history, placement, preflight, slurm, summary
from moesys.launchers.command import command_line, going_on
from moesys.launchers.liveness import LivenessMonitor
from moesys.launchers.outcome import Outcome, read_ranks
from moesys.launchers.progress import LiveDisplay
from moesys.launchers.spec import RunSpec
from moesys.launchers.stop import STOPPED, StopRequests
from moesys.parallel.degrees import resolve
from moesys.train.rank import COMMAND

POLL_S = 0.1


class Watcher(Protocol):
    """Receives the progress of a run."""

    failed: bool

    def phase(self, text: str) -> None:
        """Show what the run waits for."""

    def tell(self, lines: Iterable[str]) -> None:
        """Print lines for the user."""

    def refresh(self) -> None:
        """Show what is new."""


class Workers(Protocol):
    """The workers of a run, which `watch` starts, polls and stops. Every launcher has its own."""

    def start(self, phase: Callable[[str], None]) -> None:
        """Start the workers, or raise `LaunchError`; calls `phase` with what is being waited for."""

    def poll(self) -> Outcome | None:
        """The outcome of the run once it has ended, with no worker left running; None before."""

    def stop(self) -> None:
        """End all workers and what was started for them; returns when none is left. Harmless twice."""


def launch(spec: RunSpec, launcher: str, console: Console | None = None) -> int:
    """Run `spec` with `launcher` to its end (slurm: submit it); returns the exit code, 0 if it finished.

    A failing worker's error is printed, and its exit code returned; a stop on request (Ctrl-C, SIGTERM)
    returns 130. Raises `MoesysError` if the workers cannot be started, or the data cannot be read.
    """
    history.note(spec.run_dir)
    preflight.port(spec.config, launcher)
    if launcher == "slurm":
        return slurm.submit(spec)
    started = workers(spec, launcher)
    preflight.weights(spec.config, launcher, spec.run_dir)
    preflight.data(spec.config, launcher)
    return watch(started, spec, console or Console())


def workers(spec: RunSpec, launcher: str, program: str = "moesys.train.worker") -> Workers:
    """The not yet started workers of `launcher`; each will run the module `program` on the run's folder.

    In the module, `run(config, run_dir)` does the work of a rank.
    """
    spec = replace(spec, env={**spec.env, COMMAND: command_line()})
    command = [sys.executable, "-m", "moesys.train.rank", program, str(spec.run_dir)]
    if launcher == "local":
        from moesys.launchers.local import LocalWorkers

        return LocalWorkers(spec, command)
    if launcher == "hosts":
        from moesys.launchers.hosts import HostWorkers

        return HostWorkers(spec, command)
    if launcher == "ray":
        from moesys.launchers.ray import RayWorkers  # Ray takes half a second to import

        return RayWorkers(spec, f"{program}:run")
    if launcher == "slurm":
        rule = "launcher slurm submits runs alone, and this command waits for its workers"
        raise LaunchError(f"{rule}\n    remedy: set it to ray or local, and give the command inside a job")
    raise LaunchError(f"there is no launcher {launcher!r}: use ray, local, hosts or slurm")


def watch(started: Workers, spec: RunSpec, console: Console) -> int:
    """Start workers, show their progress until they end or are asked to stop; returns the exit code."""
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    with StopRequests() as stop, LiveDisplay(spec.run_dir, console) as progress:
        outcome = run(started, spec, progress, stop)
    if outcome.message:
        print(f"moesys: {outcome.message}", file=sys.stderr)
    if outcome.exit_code not in (0, STOPPED):
        print(f"the output of all workers is in {spec.run_dir / 'logs'}", file=sys.stderr)
    if outcome.exit_code and progress.step:
        print(going_on(spec.run_dir, progress.step, spec.config), file=sys.stderr)
    if outcome.exit_code == 0:
        summary.show(spec.run_dir, console)
    return outcome.exit_code


def run(started: Workers, spec: RunSpec, progress: Watcher, stop: StopRequests) -> Outcome:
    """The loop of `watch`. However it ends, no worker is left running."""
    placed, liveness = False, LivenessMonitor(spec.run_dir, spec.world, spec.config.launch.timeout_s)
    try:
        started.start(progress.phase)
        stop.install()
        while stop.requested is None:
            outcome = started.poll()
            if outcome is not None:
                progress.failed = outcome.exit_code != 0
                return liveness.explain(outcome)
            progress.refresh()
            progress.tell(liveness.poll())
            if not placed and (ranks := read_ranks(spec.run_dir)):
                placed = True
                progress.tell(misplaced(spec, ranks))
            time.sleep(POLL_S)
        progress.phase("stopping")
        return Outcome(STOPPED, f"stopped by {stop.requested.name}")
    finally:
        started.stop()


def misplaced(spec: RunSpec, ranks: Mapping[int, Mapping[str, object]]) -> list[str]:
    """Lines about groups that cross nodes in a started run.

    They name every tensor group across nodes, and expert groups that the plan had inside one.
    """
    degrees, _ = resolve(spec.config, spec.world)
    if degrees is None or len(ranks) != spec.world:
        return []
    found = placement.verify_map(degrees, [str(ranks[rank].get("host")) for rank in range(spec.world)])
    planned = placement.check(degrees, spec.config.cluster)
    return [str(crossing) for crossing in found if crossing.severity == "warning" or crossing not in planned]
