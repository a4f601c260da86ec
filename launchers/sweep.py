"""Several variations of one configuration, trained one after another and compared in one table.

moesys sweep configs/sweeps/gates.yaml
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from moesys.config.changes import Kind
from moesys.config.load import dump, run_name
from moesys.config.schema import Config
from moesys.config.sweep import read_sweep
from moesys.errors import CheckpointError, ConfigError, Problem
from moesys.files import json_objects, write_json
from moesys.launchers import summary
from moesys.launchers.launch import launch
from moesys.launchers.lock import locked
from moesys.launchers.spec import RunSpec
from moesys.train import resume, run_folder
from moesys.train.validate import load_checked

COLUMNS = (
    ("held-out loss", "heldout_loss", "{:.3f}"),
    ("bits per byte", "heldout_bits_per_byte", "{:.3f}"),
    ("imbalance", "imbalance", "{:.2f}"),
    ("dropped", "dropped", "{:.1%}"),
    ("active parameters", "active_parameters", "{:,}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)
"""Heading, key and format of each figure of a run."""

SUBMITS = "only submits a run, and a sweep waits for the figures of each"
WITHIN = "set it to local or ray, and start the sweep inside a job"

LAST = 0.2
"""Share of the steps, the last ones, over which figures of single steps are averaged."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, all legal; their folders are NAME-RUN."""

    name: str
    configs: dict[str, Config]

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Sweep:
        """Read and check everything before anything starts; `overrides` win over the file's.

        Raises:
            ConfigError: what is wrong with the file, or with any of its runs.
        """
        file = read_sweep(path)
        base = path.parent / file.base
        every = [*file.overrides, *overrides]
        name = run_name(path)
        configs, problems = {}, []
        for run, own in file.runs.items():
            try:
                configs[run] = load_checked(base, [*every, *own, f"name={name}-{run}"])
            except ConfigError as error:
                problems += [replace(p, where=f"{path}, run {run}: {p.where}") for p in error.problems]
        for run, config in configs.items():
            if config.launch.launcher == "slurm":
                problems.append(Problem("launch.launcher", SUBMITS, WITHIN, "slurm", f"{path}, run {run}"))
        if problems:
            raise ConfigError(problems)
        return cls(name, configs)

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return Path(next(iter(self.configs.values())).output.runs) / self.name


def run(sweep: Sweep, console: Console) -> int:
    """Train the missing runs, then write and print the table; returns the exit code of a run that fails.

    Raises:
        CheckpointError: the folder of a run holds figures of other settings; names each, before any starts.
    """
    _require_same(sweep)
    for number, (name, config) in enumerate(sweep.configs.items(), 1):
        console.print(f"{sweep.name} {number}/{len(sweep.configs)}: {name}")
        if code := _train(config, console):
            return code
    rows = {name: figures(RunSpec.of(config).run_dir) for name, config in sweep.configs.items()}
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.folder / "sweep.json", rows)
    (sweep.folder / "table.md").write_text(table(rows))
    console.print(table(rows), highlight=False, soft_wrap=True)
    console.print(f"also in {sweep.folder}")
    return 0


def _require_same(sweep: Sweep) -> None:
    """Raise CheckpointError if a run was trained with other settings: each row of the table is one configuration."""
    rows, folders = [], []
    for config in sweep.configs.values():
        spec = RunSpec.of(config)
        run_folder.check(spec.run_dir)
        found = resume.trained_with(spec.run_dir, spec.config)
        # The place of the data may change: workers compare their content.
        if changed := [change for change in found if change.kind is not Kind.CONTENT]:
            folders.append(shlex.quote(str(spec.run_dir)))
            rows += [f"  {spec.run_dir}", *(f"    {change}" for change in changed)]
    if folders:
        text = "\n".join([f"{len(folders)} of {len(sweep.configs)} runs were trained with other settings", *rows])
        remedy = f"train them anew: rm -r {' '.join(folders)}; or give the sweep's file another name"
        raise CheckpointError(f"{text}\n    remedy: {remedy}")


def _train(config: Config, console: Console) -> int:
    """Train one run to its end, unless its summary is there. Its folder holds figures of these settings alone."""
    spec = RunSpec.of(config)
    found = summary.read(spec.run_dir) or {}
    if found.get("steps") == config.train.steps and not resume.trained_with(spec.run_dir, spec.config):
        console.print(f"  already trained: {spec.run_dir}")
        return 0
    with locked(spec.run_dir):
        for line in resume.check(spec.run_dir, spec.config):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        with run_folder.proposed(spec.run_dir, dump(spec.config)):
            return launch(spec, config.launch.launcher, console)


def figures(run_dir: Path) -> dict[str, Any]:
    """Every figure of a finished run: its summary, and the mean of each metric over its last steps."""
    steps = [r for r in json_objects(run_dir / "metrics.jsonl") if "loss" in r]
    last = steps[-max(1, round(LAST * len(steps))) :]
    keys = dict.fromkeys(key for record in last for key in record)
    numbers = {key: [r[key] for r in last if isinstance(r.get(key), float)] for key in keys}
    means = {key: fmean(values) for key, values in numbers.items() if values}
    found = summary.read(run_dir) or {}
    return means | {key: value for key, value in found.items() if key != "config"}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line per run, as Markdown."""
    shown = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in rows.values())]
    lines = [["", *(heading for heading, _, _ in shown)], ["---"] * (len(shown) + 1)]
    for name, row in rows.items():
        cells = ["" if row.get(key) is None else form.format(row[key]) for _, key, form in shown]
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
