"""The command that the user gave, and the one with which a run that ended early goes on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moesys.config.schema import Config
from moesys.config.secret import is_secret, reference
from moesys.train.manifest import newest


def command_line(words: Sequence[str] | None = None) -> str:
    """The command that started this process, default `sys.argv`, with `$NAME` for a secret of `launch.env`.

    It can be given again where the shell has the variable NAME, as config.yaml can.
    """
    program, *rest = sys.argv if words is None else words
    ours = Path(program).name == "moesys" or program.endswith(("moesys/cli.py", "moesys/__main__.py"))
    name = "moesys" if ours else f"python {program}"
    return " ".join([name, *(shlex.quote(_without_secret(word)) for word in rest)])


def _without_secret(word: str) -> str:
    """An override without the secret that it may hold; sections, which may hold several, are left out whole."""
    key, equals, value = word.partition("=")
    if equals and key in ("launch", "launch.env"):
        return f"{key}=…"
    name = key.removeprefix("launch.env.")
    if name == key or not is_secret(name, value) or reference(value):
        return word
    return f"{key}=${name}"


def going_on(run_dir: Path, step: int, config: Config) -> str:
    """The place of a run that ended after `step`, and the command that goes on from there."""
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
