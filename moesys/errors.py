"""Errors with a message for the user.

A command that ends in one of these prints its text and exits with `exit_code`; bad input prints nothing else. Any
other exception is a bug of this project and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.words import plural


class MoesysError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    `key` is dotted ("parallel.tp"); `rule` is the rule with its arithmetic; `remedy` says what to do. The loader
    fills in `given` and `where` ("file.yaml:12") if the rule itself does not know them.
    """

    key: str
    rule: str
    remedy: str = ""
    given: str = ""
    where: str = ""

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key) if part)
        given = f" is {self.given}" if self.given else ""
        remedy = f"\n    remedy: {self.remedy}" if self.remedy else ""
        return f"{head}{given}: {self.rule}{remedy}"


class ConfigError(MoesysError):
    """Everything that is wrong with a configuration, all at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = plural(len(self.problems), "problem")
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{count} in the configuration\n{lines}")


class DataError(MoesysError):
    """Data that is missing, unreadable or too small."""

    exit_code = 2


class CheckpointError(MoesysError):
    """A checkpoint that cannot be read or does not fit the model."""


class TrainingError(MoesysError):
    """Training that cannot go on because its numbers are not finite."""


class FileError(MoesysError):
    """A file that is missing, damaged or of another format."""

    exit_code = 2


class LaunchError(MoesysError):
    """Workers that could not be started or did not finish."""
