"""The base of all sections of the YAML, and the types of their values. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

try:
    import pydantic
    from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
except ModuleNotFoundError:  # a machine with torch alone (`moesys.measure.gpu_check`): sections hold defaults only
    from moesys.config.plain import BaseModel, ConfigDict, Field, model_validator  # type: ignore[assignment, no-redef]


@dataclass(frozen=True)
class AtMost:
    """An upper bound beyond any real use, of numbers that are looped over, allocated by, or added up.

    Messages name it where a number is above it, and nowhere else.
    """

    most: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "le": self.most}


@dataclass(frozen=True)
class LongestText:
    """A text's most characters: file systems allow 255 in a name, to which endings are added."""

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "max_length": self.most}


LONGEST_RUN_NAME = 200

LARGEST = 10**15
"""Of every whole number: a product of some still fits in 64 bits of a counter."""

Positive = Annotated[int, Field(ge=1), AtMost(LARGEST)]
NonNegative = Annotated[int, Field(ge=0), AtMost(LARGEST)]
Seed = Annotated[int, Field(ge=0), AtMost(2**63 - 1)]
Layers = Annotated[int, Field(ge=1), AtMost(1024)]
"""Blocks of a model; stages are chosen among all their divisions."""
Dim = Annotated[int, Field(ge=1), AtMost(2**24)]
"""Size of one dim of a tensor."""
Experts = Annotated[int, Field(ge=1), AtMost(2**15)]
"""Experts of a layer: recordings hold their numbers in 16 bits."""
FewExperts = Annotated[int, Field(ge=0), AtMost(2**15)]
Ranks = Annotated[int, Field(ge=1), AtMost(2**18)]
"""Processes along one axis, or in all."""
Pieces = Annotated[int, Field(ge=1), AtMost(2**15)]
"""Parts that one computation is cut into, one after another."""
Batch = Annotated[int, Field(ge=1), AtMost(2**24)]
"""Sequences of a step: a pipeline's schedule lists their micro-batches."""
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=0), AtMost(2**15)]
"""Of a capacity; as many as there can be experts drops nothing."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable."""
SlurmOption = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
"""A long option of sbatch without its dashes."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)
    title: ClassVar[str] = "a section"
    """What the section is called in messages, where it is a whole file."""
    keys_of_kinds: ClassVar[Mapping[str, type[Section]]] = {}
    """Of a section that takes kinds: the sections that its keys come from, by kind; the first to have a key first."""


class Kinds(Section):
    """Base of sections whose kind alone, as a word, stands for the section."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        section = handler(core)
        words = handler.resolve_ref_schema(section)["properties"]["kind"]["enum"]
        return {"anyOf": [{"enum": words, "type": "string"}, section]}


def field(default: Any, description: str) -> Any:
    """A field that is made, not written, with its default and its meaning."""
    return Field(default=default, description=description)


def create_model(name: str, base: type[Section], fields: dict[str, Any]) -> type[Section]:
    """A section of `fields`: by key, (type, field)."""
    return pydantic.create_model(name, __base__=base, __module__=base.__module__, **fields)
