"""The command that the user gave, and how a run that has ended early goes on."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moesys.config.schema import Config
from moesys.train.resume import newest


def command_line(words: Sequence[str] | None = None) -> str:
    """The command that started this process, default `sys.argv`, without what `launch.env` may hold of secrets."""
    program, *rest = sys.argv if words is None else words
    ours = Path(program).name == "moesys" or program.endswith(("moesys/cli.py", "moesys/__main__.py"))
    name = "moesys" if ours else f"python {program}"
    return " ".join([name, *(shlex.quote(re.sub(r"^(launch(\.env[^=]*)?)=.*", r"\1=…", word)) for word in rest)])


def going_on(run_dir: Path, step: int, config: Config) -> str:
    """Where a run is that ended after `step`, and from where the same command goes on."""
    steps = config.train.steps
    checkpoint = newest(run_dir / "checkpoints")
    if checkpoint is None:
        rule = "no checkpoint was saved yet"
        if not config.output.checkpoint_every:
            rule += ": set output.checkpoint_every to keep the work of a run that is stopped"
        return f"the run got to step {step} of {steps}; {rule}\n    to start again: {command_line()}"
    return (
        f"the run got to step {step} of {steps}; its newest checkpoint is {checkpoint}\n    to go on: {command_line()}"
    )
