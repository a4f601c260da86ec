"""Legal values in the place of illegal ones, so that rules between the other keys can be asked all the same.

A rule whose words are the same whatever stands in the place of the keys in error does not depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from moesys.config import legal, override, suggest
from moesys.config.schema import Config
from moesys.config.tree import Entry
from moesys.errors import Problem

ROUNDS = 12
"""Configurations to ask: as many as the longest list of words that a key can have."""

NUMBERS = (1, 2, 3, 5, 4, 16, 64, 1000)


def independent(
    tree: Entry, problems: Sequence[Problem], rules: Callable[[Config], list[Problem]]
) -> tuple[list[Problem], Config | None]:
    """What `rules` find in `tree` whatever the keys in error may be, and a configuration of all other keys.

    `problems` are those of single keys. (none, None) where no configuration can be made of the rest.
    """
    keys = affected(problems)
    found: list[Problem] | None = None
    first = None
    for number in range(ROUNDS):
        config = with_placeholders(tree, keys, number)
        if config is None:
            return [], None
        first = first or config
        told = [p for p in rules(config) if not any(p.key == key or p.key.startswith(f"{key}.") for key in keys)]
        found = told if found is None else [p for p in found if p in told]
        if not found:
            break
    return found or [], first


def affected(problems: Sequence[Problem]) -> list[str]:
    """The keys of the schema that `problems` leave open: in error, or likely meant by what is no key."""
    keys: list[str] = []
    for problem in problems:
        key = problem.key
        if not key and problem.where.startswith(override.PLACE):
            key = (re.findall(r"[\w.-]+", problem.where.removeprefix(override.PLACE)) or [""])[0]
        section, _, name = key.rpartition(".")
        known = legal.type_at(key.split(".")) is not None
        keys += [key] if known else suggest.keys_like(section, name) if key else []
    return [key for key in dict.fromkeys(keys) if legal.type_at(key.split(".")) is not None]


def with_placeholders(tree: Entry, keys: Sequence[str], number: int) -> Config | None:
    """The configuration `tree` with the `number`-th stand-in for each of `keys`, and without unknown keys."""
    plain = _known(tree.plain(), Config)
    for offset, key in enumerate(keys):
        *path, name = key.split(".")
        section = plain
        for step in path:
            inner = section.get(step)
            section[step] = inner if isinstance(inner, dict) else {"kind": inner} if isinstance(inner, str) else {}
            section = section[step]
        values = _values(legal.type_at([*path, name]), number)
        section[name] = values[(number + offset) % len(values)]
    try:
        return Config.model_validate(plain)
    except ValidationError:
        return None


def _known(value: Any, kind: Any) -> Any:
    section = legal.section_of(kind)
    if section is None or not isinstance(value, dict):
        return value
    fields = section.model_fields
    return {key: _known(inner, legal.annotation(fields[key])) for key, inner in value.items() if key in fields}


def _values(kind: Any, number: int) -> list[Any]:
    """Legal values of a type, as different as can be."""
    values: list[Any] = []
    members = legal.alternatives(kind)
    if legal.accepts(kind, int):  # a number stands for the section beside it
        members = [each for each in members if legal.section_of(each) is None]
    for each in members:
        bare = get_args(each)[0] if get_origin(each) is Annotated else each
        if (section := legal.section_of(bare)) is not None:
            fields = {name: legal.annotation(field) for name, field in section.model_fields.items()}
            choices = {name: _values(inner, number) for name, inner in fields.items()}
            values.append({name: some[number % len(some)] for name, some in choices.items()})
        elif bare is type(None):
            values.append(None)
        elif get_origin(bare) is Literal:
            values += get_args(bare)
        elif bare is bool:
            values += [False, True]
        elif bare in (int, float):
            numbers = [n for n in (0, 0.5, *NUMBERS) if isinstance(n, bare) or bare is float]
            values += [n for n in map(bare, numbers) if legal.fits(each, n)]
        elif bare is str:
            values += ["a", "b"]
        elif get_origin(bare) is list:
            values += [[inner] * length for length in (1, 2, 3) for inner in _values(get_args(bare)[0], number)[:2]]
        elif get_origin(bare) is tuple:
            inner = _values(get_args(bare)[0], number)
            values.append([inner[number % len(inner)]] * len(get_args(bare)))
        else:  # a mapping of names
            values.append({})
    return values
