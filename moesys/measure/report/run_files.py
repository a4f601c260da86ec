"""Reads files of a run's folder for reports. Damaged lines are left out; damaged files are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import Field, TypeAdapter, ValidationError

from moesys.errors import FileError
from moesys.files import json_objects, read_json
from moesys.measure.explain.explanation import LayerPhase
from moesys.measure.predict.links import Profile, ProfileError
from moesys.measure.predict.what_if import Prediction

REMEDY = "remove it, and launch the run again: it writes it anew"


def summary_of(folder: Path) -> dict[str, Any]:
    """The content of summary.json; empty without the file. Raises FileError if it is damaged."""
    path = folder / "summary.json"
    return read_json(path, REMEDY) if path.exists() else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e15


@dataclass(frozen=True)
class _Load:
    """A line of load.jsonl."""

    step: Annotated[int, Field(ge=0, le=10**15)]
    load: list[list[Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e15)]]]


@cache
def _load_schema() -> TypeAdapter[_Load]:
    return TypeAdapter(_Load)


@cache
def _prediction_schema() -> TypeAdapter[list[Prediction]]:
    return TypeAdapter(list[Prediction])


def loads(path: Path) -> list[dict[str, Any]]:
    """The lines of load.jsonl with as many layers and experts as the last line. Damaged lines are left out."""
    found = []
    for value in json_objects(path):
        try:
            found.append(vars(_load_schema().validate_python(value)))
        except ValidationError:
            continue
    shapes = [list(map(len, each["load"])) for each in found]
    usual = bool(found) and bool(shapes[-1]) and min(shapes[-1]) > 0
    return [each for each, shape in zip(found, shapes, strict=True) if usual and shape == shapes[-1]]


def profile_of(asked: Path | None, summary: Mapping[str, Any]) -> Profile | None:
    """The links of the profile that was asked for, else of the one that the run names; None if unreadable."""
    if asked is not None:
        return Profile.load(asked)
    named = summary.get("profile")
    try:
        return Profile.load(Path(named)) if isinstance(named, str) and named else None
    except ProfileError:
        return None  # the file may be gone since the run


def share_of_links(profile: Profile, phase: LayerPhase) -> str:
    """Seconds that the links need / seconds that the phase took; "" if the profile lacks the links."""
    try:
        return f"{profile.seconds(phase.inside, phase.between) / phase.each:.2f}" if phase.each else ""
    except ProfileError:
        return ""


def predictions(path: Path) -> list[Prediction]:
    """The predictions that `moesys what-if` wrote.

    Raises:
        FileError: the file holds something else.
    """
    try:
        return _prediction_schema().validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "was not written by moesys what-if"
        raise FileError(f"{path}: {why}\n    remedy: remove it, or predict again: moesys what-if RUN") from None
