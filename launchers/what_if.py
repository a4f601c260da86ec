"""`moesys what-if`: predictions from a recorded run and, if asked for, runs that show how good they are."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from moesys import leftovers
from moesys.config.load import dump, load
from moesys.config.schema import Config
from moesys.errors import FileError
from moesys.files import read_json, write_json
from moesys.launchers.launch import launch
from moesys.launchers.spec import RunSpec
from moesys.measure.explain.step_selection import RecordedStep, steps_to_explain
from moesys.measure.predict.links import Profile
from moesys.measure.predict.settings import MODEL, WhatIfError, variants
from moesys.measure.predict.what_if import Prediction, Predictor
from moesys.measure.record import step_files as records
from moesys.train.validate import load_checked


def command(arguments: argparse.Namespace) -> int:
    """Predict, measure if asked to, show, and write RUN/measure/what_if.json."""
    run_dir: Path = arguments.run_dir
    config, steps = recorded(run_dir)
    if arguments.measure and config.launch.launcher == "slurm":
        rule = "--measure waits for the runs that it starts, and launch.launcher slurm only submits"
        raise WhatIfError(f"{rule}\n    remedy: leave --measure out")
    path = arguments.profile or config.measure.profile
    if path is None:
        raise WhatIfError("--profile: links are not known; measure them: moesys bench a2a CONFIG --profile FILE")
    predictor = Predictor(config, _vocabulary(run_dir), steps, Profile.load(Path(path)))
    named = {" ".join(words): words for words in map(_words, arguments.change or [])} or variants(config)
    found: list[Prediction] = []
    for name, changes in named.items():
        changed = load_checked(run_dir / "config.yaml", changes, with_data=False)
        faster = 2.0 if name == "links twice as fast" and not changes else 1.0
        prediction = predictor.predict(name, changes, changed, faster)
        if arguments.measure and changes:
            prediction = replace(prediction, measured=measure(changed, run_dir.parent))
        found.append(prediction)
    base = Prediction("as recorded", [], predictor.recorded.total.step, predictor.recorded.total.exposed)
    console = Console(markup=False)
    console.print(table([base, *found]))
    console.print(f"Modelled are {MODEL}; computation is taken to stay as it was.", highlight=False, soft_wrap=True)
    write_json(run_dir / "measure" / "what_if.json", [p.as_json() for p in [base, *found]])
    return 0


def _words(change: str) -> list[str]:
    """The overrides in one --change."""
    try:
        return shlex.split(change)
    except ValueError as error:
        raise WhatIfError(f"--change {change!r}: {error}\n    remedy: write 'key=value key=value'") from None


def recorded(run_dir: Path) -> tuple[Config, list[RecordedStep]]:
    """A run's configuration, and its recorded steps that are explained.

    Raises:
        WhatIfError: it has none.
    """
    if not (run_dir / "summary.json").exists():
        raise WhatIfError(f"{run_dir} is not a finished run: give the folder that moesys launch made")
    choice = steps_to_explain(records.recorded(run_dir))
    if not choice.steps:
        raise WhatIfError(f"{run_dir} recorded no steps: launch it with --measure")
    if choice.note:
        print(choice.note)
    return load(run_dir / "config.yaml").config, choice.steps


def _vocabulary(run_dir: Path) -> int:
    """Entries of the vocabulary that the run was trained with."""
    path = run_dir / "summary.json"
    remedy = f"launch the run again: {run_dir}/config.yaml"
    size = read_json(path, remedy).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise FileError(f"{path}: vocab_size is {size!r}, not a number of at least 1\n    remedy: {remedy}")
    return size


def measure(config: Config, runs: Path) -> float:
    """Run the setting with the same launcher, in a folder beside the run that is removed again.

    Returns the median seconds of its recorded steps.
    """
    output = config.output.model_copy(update={"tensorboard": False, "wandb": False})
    alone = {"output": output, "measure": config.measure.model_copy(update={"metrics_port": None})}
    with leftovers.temporary("what-if-", runs) as folder:
        spec = RunSpec.of(config.model_copy(update=alone), folder)
        (spec.run_dir / "config.yaml").write_text(dump(spec.config))
        if launch(spec, config.launch.launcher, Console(stderr=True, quiet=True)):
            raise WhatIfError(f"{config.name} did not run with this setting")
        _, steps = recorded(spec.run_dir)
    return median(step.seconds for step in steps)


def table(predictions: list[Prediction]) -> Table:
    """Seconds of a step as recorded, as predicted, and as measured where that was done."""
    base = predictions[0]
    shown = Table(title="what if: predictions from recorded steps and fitted links", title_justify="left")
    measured = any(p.measured is not None for p in predictions)
    for name in ("setting", "step ms", "of recorded", "exposed all-to-all ms", *(["measured ms", "error"] * measured)):
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for p in predictions:
        row = [p.name, f"{p.step * 1e3:.1f}", f"{p.step / base.step:.2f}", f"{p.exposed * 1e3:.1f}"]
        if measured:
            row += ["", ""] if p.measured is None or p.error is None else [f"{p.measured * 1e3:.1f}", f"{p.error:+.0%}"]
        shown.add_row(*row)
    return shown
