"""Reads the file of `moesys bench a2a --json` for reports, and checks what they draw. Needs no torch."""

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
    """Bandwidths in 10⁹ bytes per second, and the number of wrong elements."""

    alg_bw: Number
    bus_bw: Number
    nwrong: Count


@dataclass(frozen=True)
class Times:
    """Times in microseconds."""

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
    """Results, fitted links by name, and the circumstances of the measurement."""

    results: tuple[ResultEntry, ...]
    links: Mapping[str, _Link]
    config: Mapping[str, Any]

    @property
    def lines(self) -> dict[str, LinkModel]:
        """The link models by name."""
        return {name: LinkModel(**vars(link)) for name, link in self.links.items()}


@cache
def _schema() -> TypeAdapter[ResultFile]:
    return TypeAdapter(ResultFile)


def read(path: Path) -> ResultFile:
    """The file at `path`.

    Raises:
        FileError: it cannot be read, or --json did not write it. The message names the first wrong key.
    """
    value = read_json(path, REMEDY)
    links = value.get("links")
    if isinstance(links, dict):  # older versions wrote an unknown bandwidth as 0 seconds per byte
        known = {k: v for k, v in links.items() if not (isinstance(v, dict) and v.get("per_byte") == 0)}
        value = {**value, "links": known}
    try:
        return _schema().validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        rule = f"was not written by moesys bench a2a --json: {place}: {first['msg'].lower()}"
        raise FileError(f"{path} {rule}\n    remedy: {REMEDY}") from None
