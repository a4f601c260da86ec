"""What the check found, row by row, as the process of a part writes it and the check reads it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from moesys.files import json_objects, json_text

State = Literal["passed", "failed", "not run"]

Figures = Mapping[str, float | int | str | None]


@dataclass(frozen=True)
class Row:
    """One thing that was tried.

    `said` is the result in words: a failure's error, or why something was not run. `figures` are its numbers, by
    names that end in their units.
    """

    what: str
    state: State
    said: str
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class CheckTask:
    """What a part is to do.

    `dry`: without a GPU, at shrunken shapes. `folder`: for files of its own. `ends`: when it must have ended, on
    `monotonic`'s clock.
    """

    dry: bool
    folder: Path
    ends: float

    @property
    def device(self) -> str:
        """Where it computes, as torch calls it."""
        return "cpu" if self.dry else "cuda"

    def seconds_left(self) -> float:
        """Until it must have ended; never below 0."""
        return max(0.0, self.ends - monotonic())


Part = Callable[[CheckTask], Iterator[Row]]


def tried(work: Callable[..., Row], task: CheckTask, what: str, *given: Any) -> Row:
    """The row of `work(task, what, *given)`, or a failed one with its error; the traceback goes to stderr."""
    try:
        return work(task, what, *given)
    except Exception as error:
        traceback.print_exc()
        return Row(what, "failed", first_line(error))


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def append(path: Path, row: Row) -> None:
    """Add `row` to the file of a part."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(asdict(row), compact=True) + "\n")


def read(path: Path) -> list[Row]:
    """The rows in the file of a part, as many as are whole."""
    return [Row(**row) for row in json_objects(path)]
