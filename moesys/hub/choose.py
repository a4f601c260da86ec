"""The family whose files can hold a model. Needs no torch."""

from __future__ import annotations

from moesys.config.schema import ModelConfig
from moesys.errors import MoesysError
from moesys.hub.family import Family, families

KNOWN = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3", "llama", "qwen3", "mistral")
"""Families that most other tools read; they are tried first."""
SHOWN = 6


class NoFamily(MoesysError):
    """No family's files can hold a model."""

    exit_code = 2


def choose(model: ModelConfig, wanted: str | None = None) -> Family:
    """The family `wanted`, or the first one whose files say everything of `model`.

    Raises:
        NoFamily: there is none; says what the nearest one lacks.
    """
    every = families()
    if wanted is not None:
        if wanted not in every:
            raise NoFamily(f"no family is called {wanted!r}\n    remedy: one of {', '.join(every)}")
        if lacks := every[wanted].differences(model):
            raise NoFamily(_lacking(every[wanted], lacks))
        return every[wanted]
    nearest: tuple[Family, list[str]] | None = None
    for kind in dict.fromkeys((*KNOWN, *every)):
        if kind not in every or kind in every[kind].also:
            continue
        lacks = every[kind].differences(model)
        if not lacks:
            return every[kind]
        if nearest is None or _distance(lacks) < _distance(nearest[1]):
            nearest = every[kind], lacks
    assert nearest is not None
    raise NoFamily(_lacking(*nearest))


def _distance(lacks: list[str]) -> tuple[int, int]:
    """For comparing families: first by what their files cannot be, then by the model's keys that differ."""
    return sum(not line.startswith("model.") for line in lacks), len(lacks)


def _lacking(family: Family, lacks: list[str]) -> str:
    lines = "".join(f"\n  {line}" for line in lacks[:SHOWN])
    more = f"\n  and {len(lacks) - SHOWN} more" if len(lacks) > SHOWN else ""
    remedy = "moesys generate and moesys eval read the checkpoint itself; other tools cannot"
    rule = f"no family's files can hold this model; {family.kind} is the nearest, but for{lines}{more}"
    return f"{rule}\n    remedy: {remedy}"
