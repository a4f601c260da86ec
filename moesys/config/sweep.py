"""The YAML of a sweep: variations of one configuration, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from moesys.config.read import read_file
from moesys.config.schema import LONGEST_RUN_NAME, LongestText, Section
from moesys.config.translate import problems_of
from moesys.errors import ConfigError, Problem

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$"), LongestText(LONGEST_RUN_NAME)]


class SweepFile(Section):
    """The YAML of a sweep."""

    title = "a sweep"

    base: str
    """The configuration that all runs share, relative to this file."""
    overrides: list[str] = Field(default_factory=list)
    """key.sub=value, for all runs."""
    runs: dict[RunName, list[str]]
    """Name of each run → its own overrides."""


def read_sweep(path: Path) -> SweepFile:
    """The sweep in `path`.

    Raises:
        ConfigError: everything that is wrong with the file; what its runs make of it is not asked.
    """
    problems: list[Problem] = []
    tree = read_file(path, problems, start="base: FILE.yaml")
    if tree is None:
        raise ConfigError(problems)
    try:
        file = SweepFile.model_validate(tree.plain())
    except ValidationError as error:
        unreadable = {problem.key for problem in problems}
        problems += [p for p in problems_of(error, tree, root=SweepFile) if p.key not in unreadable]
        raise ConfigError(problems) from None
    if not file.runs:
        problems.append(Problem("runs", "must name at least one run", "add NAME: [key.sub=value]", where=str(path)))
    if problems:
        raise ConfigError(problems)
    return file
