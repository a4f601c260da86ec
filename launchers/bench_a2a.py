"""`moesys bench a2a`: launches the benchmark of collectives on the ranks of a configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from moesys import leftovers
from moesys.config.load import dump
from moesys.config.schema import Config
from moesys.data import routing_files
from moesys.files import read_json, write_json
from moesys.launchers.launch import run, workers
from moesys.launchers.spec import RunSpec
from moesys.launchers.stop import StopRequests
from moesys.measure.a2a_benchmark.command_options import A2ABenchError, options_of
from moesys.measure.a2a_benchmark.fitted_links import lines
from moesys.measure.a2a_benchmark.options import BenchmarkOptions
from moesys.measure.a2a_benchmark.result import CollectiveResult
from moesys.measure.a2a_benchmark.table import LARGER, as_json, progress_line, show
from moesys.measure.a2a_benchmark.traffic import Matrix
from moesys.measure.predict.links import Profile
from moesys.train.validate import load_checked
from moesys.words import plural

WIDTH = 112
"""Columns of the table. A narrower terminal wraps it; nothing is cut."""


def command(arguments: argparse.Namespace) -> int:
    """Launch the benchmark, show its table, and write the files that were asked for."""
    overrides = list(arguments.overrides)
    if arguments.launcher:
        overrides.append(f"launch.launcher={arguments.launcher}")
    config = load_checked(arguments.config, overrides, with_data=False)
    if config.cluster.nodes * config.cluster.ranks_per_node < 2:
        raise A2ABenchError("one rank has nobody to send to: set cluster.ranks_per_node or cluster.nodes to more")
    options = options_of(arguments, config, routed)
    found = measured(config, options)
    if isinstance(found, int):
        return found
    results = [CollectiveResult(**result) for result in found["results"]]
    show(results, found["facts"], Console(width=max(WIDTH, Console().width)))
    if arguments.json is not None:
        write_json(arguments.json, as_json(results, found["facts"], options))
    if arguments.profile is not None:
        facts = {"date": date.today().isoformat(), **found["facts"]}
        if not lines(results):
            raise A2ABenchError(f"{arguments.profile} is not written: no link could be fitted\n    remedy: {LARGER}")
        Profile(lines(results), facts).save(arguments.profile)
    return 1 if any(result.wrong for result in results) else 0


def measured(config: Config, options: BenchmarkOptions) -> dict[str, Any] | int:
    """The results that the ranks wrote; the exit code of a run that failed."""
    base = Path(config.output.runs).expanduser()
    base.mkdir(parents=True, exist_ok=True)
    with leftovers.temporary("bench-a2a-", base) as folder:
        spec = RunSpec.of(config, folder)
        (spec.run_dir / "config.yaml").write_text(dump(spec.config))
        write_json(spec.run_dir / "bench.json", asdict(options))
        started = workers(spec, config.launch.launcher, "moesys.train.a2a")
        follow = Follow(spec.run_dir / "follow.jsonl", Console(stderr=True))
        with StopRequests() as stop:
            outcome = run(started, spec, follow, stop)
        if outcome.exit_code:
            print(f"moesys: {outcome.message}", file=sys.stderr)
            return outcome.exit_code
        return read_json(spec.run_dir / "results.json", "run the benchmark again")


def routed(folder: Path, config: Config) -> Matrix:
    """Rows that each rank sent to each rank in a recorded run, over its layers and steps.

    Raises:
        A2ABenchError: the run had another number of ranks or experts.
    """
    world, ep = config.cluster.nodes * config.cluster.ranks_per_node, max(1, config.parallel.ep)
    matrix = [[0] * world for _ in range(world)]
    for rank, experts, chosen in routing_files.assignments(folder):
        if rank >= world or experts % ep or config.parallel.etp > 1:
            rule = f"was recorded with at least {plural(rank + 1, 'rank')} and {plural(experts, 'expert')}"
            raise A2ABenchError(f"--routing {folder} {rule}: give the configuration it was recorded with, without etp")
        first = rank // ep * ep
        for expert, rows in enumerate(chosen):
            matrix[rank][first + expert // (experts // ep)] += rows
    return matrix


class Follow:
    """Shows each result when it is there."""

    failed = False

    def __init__(self, path: Path, console: Console):
        self._path, self._console, self._shown = path, console, 0

    def phase(self, text: str) -> None:
        """Show what the launcher waits for."""
        self._console.print(f"{text} …", highlight=False)

    def tell(self, lines: Iterable[str]) -> None:
        """Print lines."""
        for line in lines:
            self._console.print(line, highlight=False)

    def refresh(self) -> None:
        """Show the results that were written since the last call."""
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            whole = [line for line in lines[self._shown :] if line.endswith("\n")]
            self._shown += len(whole)
            self.tell(map(progress_line, whole))
