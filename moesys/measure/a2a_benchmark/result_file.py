"""Reads what `moesys bench a2a --json` wrote back for reports, and checks what of it is drawn. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from moesys.errors import FileError
from moesys.files import read_json
from moesys.measure.predict.links import LinkModel

Number = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**60)]

REMEDY = "give a file that moesys bench a2a --json wrote"


@dataclass(frozen=True)
class Rates:
    """10⁹ bytes per second, and wrong elements."""

    alg_bw: Number
    bus_bw: Number
    nwrong: Count


@dataclass(frozen=True)
class Times:
    """Microseconds."""

    p50_us: Number
    min_us: Number
    p95_us: Number
    max_us: Number


@dataclass(frozen=True)
class ResultEntry:
    """One of the results."""

    collective: str
    group: str
    type: str
    ranks: Count
    size: Count
    limiting_bytes: Number
    wait_us: Number
    transfer_us: Number
    out_of_place: Rates
    out_of_place_per_iter: Times
    also: tuple[str, ...] = ()

    @property
    def names(self) -> str:
        """All names of its groups."""
        return " = ".join((self.group, *self.also))


@dataclass(frozen=True)
class _Link:
    alpha: Number
    per_byte: Positive
    error: Number
    worst: Number
    smallest: Positive
    largest: Positive


@dataclass(frozen=True)
class ResultFile:
    """Results, fitted lines by name, and where they were measured."""

    results: tuple[ResultEntry, ...]
    links: Mapping[str, _Link]
    config: Mapping[str, Any]

    @property
    def lines(self) -> dict[str, LinkModel]:
        return {name: LinkModel(**vars(link)) for name, link in self.links.items()}


@cache
def _schema() -> TypeAdapter[ResultFile]:
    return TypeAdapter(ResultFile)


def read(path: Path) -> ResultFile:
    """The file at `path`.

    Raises:
        FileError: it cannot be read, or is not what --json writes; names the first key that is wrong.
    """
    value = read_json(path, REMEDY)
    links = value.get("links")
    if isinstance(links, dict):  # a bandwidth that could not be told was written as 0 seconds per byte
        told = {k: v for k, v in links.items() if not (isinstance(v, dict) and v.get("per_byte") == 0)}
        value = {**value, "links": told}
    try:
        return _schema().validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        rule = f"was not written by moesys bench a2a --json: {place}: {first['msg'].lower()}"
        raise FileError(f"{path} {rule}\n    remedy: {REMEDY}") from None
