"""Plain processes on this machine: one per rank, without Ray."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from moesys.errors import LaunchError
from moesys.launchers import crash, inherited_env
from moesys.launchers.outcome import Outcome, clear_traces, first_cause, log_file, name, outcome
from moesys.launchers.port import ReservedPort
from moesys.launchers.processes import ExitStatus, Processes
from moesys.launchers.spec import RunSpec
from moesys.loopback import LOOPBACK
from moesys.train import device
from moesys.train.failure import Failure, FailureKind
from moesys.words import plural

HOST = "127.0.0.1"
SETTLE_S = 2.0
"""Seconds after a failure in which workers that reported one may end by themselves."""
ATTEMPTS = 3
"""Starts, at most, when the rendezvous port turns out to be taken."""


class LocalWorkers:
    """The workers of a run as child processes.

    `command` is run once per rank with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT set; default: training, `python -m moesys.train.rank moesys.train.worker RUN_DIR`.
    """

    def __init__(self, spec: RunSpec, command: Sequence[str] | None = None):
        self.spec = spec
        self.command = command or [sys.executable, "-m", "moesys.train.rank", "moesys.train.worker", str(spec.run_dir)]
        self._attempts = 0
        self._processes = Processes([], [], [])
        self._port: ReservedPort | None = None

    def start(self, phase: Callable[[str], None]) -> None:
        """Start all workers; calls `phase` with what is being waited for.

        Raises `LaunchError` if the run does not fit on this machine.
        """
        self.refuse()
        phase(f"starting {plural(self.spec.world, 'worker')}")
        clear_traces(self.spec.run_dir)
        self._attempts += 1
        self._killed_before = crash.kills()
        self._port = ReservedPort()
        environments = [self.environment(rank, self._port.number) for rank in range(self.spec.world)]
        logs = [log_file(self.spec.run_dir, rank) for rank in range(self.spec.world)]
        self._processes = Processes(self.command, environments, logs)

    def refuse(self) -> None:
        """Raise `LaunchError` if the run does not fit here."""
        if self.spec.config.cluster.nodes > 1:
            raise LaunchError(
                f"cluster.nodes is {self.spec.config.cluster.nodes}, but the local launcher runs on this machine "
                "alone\n    remedy: set cluster.nodes=1 and ranks_per_node to all ranks, or use --launcher ray"
            )

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """The environment of the worker of `rank`; rank 0 will listen on `port`."""
        world = self.spec.world
        chosen = device.choose(self.spec.config.cluster, [device.visible_gpus()], world, "this machine")
        own = {
            "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": HOST, "MASTER_PORT": port, "MOESYS_NODE_IP": HOST,
        }  # fmt: skip
        inherited = {**LOOPBACK, **inherited_env.cleaned(os.environ), **self.spec.env, **device.hide_gpus(chosen)}
        return {**inherited, **{key: str(value) for key, value in own.items()}}

    def poll(self) -> Outcome | None:
        """The outcome of the run once it has ended, with no worker left running; None before."""
        ended = self._processes.ended()
        if any(end.code for end in ended.values()):
            return self._failed()
        if len(ended) == self.spec.world:
            self.stop()
            return Outcome(0)
        return None

    def stop(self) -> None:
        """End all workers; returns when none is left."""
        self._processes.end()
        if self._port is not None:
            self._port.close()

    def _failed(self) -> Outcome | None:
        ended = self._settled()
        self.stop()
        failures = self._failures(ended)
        cause = first_cause(failures)
        if cause.kind is FailureKind.PORT and self._attempts < ATTEMPTS:
            self.start(lambda phase: None)
            return None
        who = name(cause.rank, self.spec.run_dir, self._processes.pids[cause.rank], os.uname().nodename)
        return outcome(cause, who, self.spec.run_dir)

    def _settled(self) -> dict[int, ExitStatus]:
        """The workers that ended, once those that reported a failure have ended too."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            time.sleep(0.05)
            ended = self._processes.ended()
            if self._processes.failures().keys() <= ended.keys():
                break
        return ended

    def _failures(self, ended: Mapping[int, ExitStatus]) -> list[Failure]:
        """The failures that workers reported, and those of workers that ended without a report."""
        reported = self._processes.failures()
        silent = {rank: end for rank, end in ended.items() if rank not in reported}
        failures = list(reported.values())
        for rank, end in silent.items():
            if end.code:
                failures.append(crash.failure(rank, end, self.spec.run_dir, self._killed_before))
        if first_cause(failures).kind in (FailureKind.TIMEOUT, FailureKind.LOST):
            early = "ended with exit code 0 before the run was at its end"
            failures += [Failure(rank, FailureKind.EXIT, early) for rank, end in silent.items() if not end.code]
        return failures
