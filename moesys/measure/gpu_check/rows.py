"""The rows of the check. The process of a part writes them; the check reads them."""

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
    """The result of one trial.

    Attributes:
        said: the result in words: the error of a failure, or the reason why something did not run.
        figures: numbers, by names that end in their units.
    """

    what: str
    state: State
    said: str
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class CheckTask:
    """The task of a part.

    Attributes:
        dry: without a GPU, at shrunken shapes.
        folder: for files of its own.
        ends: time limit on `monotonic`'s clock.
    """

    dry: bool
    folder: Path
    ends: float

    @property
    def device(self) -> str:
        """The device for its computations, as torch calls it."""
        return "cpu" if self.dry else "cuda"

    def seconds_left(self) -> float:
        """Seconds until its time limit; at least 0."""
        return max(0.0, self.ends - monotonic())


Part = Callable[[CheckTask], Iterator[Row]]


def tried(work: Callable[..., Row], task: CheckTask, what: str, *given: Any) -> Row:
    """The row of `work(task, what, *given)`, or a failed row with its error. The traceback goes to stderr."""
    try:
        return work(task, what, *given)
    except Exception as error:
        traceback.print_exc()
        return Row(what, "failed", first_line(error))


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def append(path: Path, row: Row) -> None:
    """Add a row to the file of a part."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(asdict(row), compact=True) + "\n")


def read(path: Path) -> list[Row]:
    """The complete rows in the file of a part."""
    return [Row(**row) for row in json_objects(path)]
