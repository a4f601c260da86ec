"""From YAML to `Config`: files, what they include, overrides; and all that is wrong, at once.

loaded = load(Path("configs/quickstart.yaml"), ["train.steps=10"])
loaded.config.train.steps            # 10
loaded.sources["train.steps"]        # "command line 'train.steps=10'"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from moesys.config import override
from moesys.config.include import read_tree
from moesys.config.schema import LONGEST_RUN_NAME, Config, Section
from moesys.config.translate import problems_of
from moesys.config.tree import Entry, put, walk
from moesys.config.write import dump as dump
from moesys.config.write import json_schema as json_schema
from moesys.errors import ConfigError, Problem


@dataclass(frozen=True)
class Loaded:
    """A configuration and where its values come from.

    `sources`: for each dotted key that was given, sections included, "file.yaml:LINE" or
    "command line 'key=value'"; "" is the file itself.
    """

    config: Config
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Attempt:
    """What came of reading a configuration: `config`, or None and what is wrong.

    `tree` holds all that could be read; None where part of a file could not, so that nobody knows what is
    missing.
    """

    config: Config | None
    problems: Sequence[Problem]
    tree: Entry | None
    sources: Mapping[str, str]


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """The configuration in `path` with all that it includes; `overrides` ("key.sub=value") win.

    Raises:
        ConfigError: everything that is wrong with the files, the overrides and each single key.
    """
    found = attempt(path, overrides)
    if found.config is None:
        raise ConfigError(found.problems)
    return Loaded(found.config, found.sources)


def attempt(path: Path, overrides: Sequence[str] = ()) -> Attempt:
    """As `load`, but returns what is wrong, for those who can say more."""
    problems: list[Problem] = []
    tree = read_tree(path, problems)
    unread = any(not problem.key or problem.key == "include" for problem in problems)
    whole = override.apply(tree or Entry({}, str(path)), overrides, problems)
    if "from" in whole.section.get("model", whole).section:
        whole = _expand(whole, problems)
        unread = unread or any(problem.key == "model.from" for problem in problems)
    if "name" not in whole.section:
        whole = put(whole, ["name"], Entry(run_name(path), str(path)))
    config, wrong = _validate(whole, with_missing=not unread)
    # What could not be read is not also illegal; what an override puts there may well be.
    unreadable = {problem.key for problem in problems}
    for problem in wrong:
        overridden = problem.where.startswith(override.PLACE)
        if overridden or (tree is not None and problem.key not in unreadable):
            problems.append(problem)
    sources = {"": str(path), **{key: entry.where for key, entry in walk(whole)}}
    readable = None if unread or tree is None else whole
    return Attempt(None if problems else config, in_order(problems), readable, sources)


def _expand(tree: Entry, problems: list[Problem]) -> Entry:
    """`tree` with the keys that `model.from` stands for. The module is imported by name: it is on a floor above."""
    found: Entry = import_module("moesys.hub.derive").expand(tree, problems)
    return found


def _validate(tree: Entry, with_missing: bool) -> tuple[Config | None, list[Problem]]:
    """The configuration or what is wrong; `with_missing`: also the keys that it lacks."""
    try:
        return Config.model_validate(tree.plain()), []
    except ValidationError as error:
        return None, problems_of(error, tree, with_missing)


def run_name(path: Path) -> str:
    """A run's name from its file's, with dashes for what a name cannot have, and not too long for one."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:LONGEST_RUN_NAME] or "run"


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """`problems` by file and line."""
    return sorted(problems, key=_position)


def _position(problem: Problem) -> tuple[str, int]:
    """File and line, for sorting."""
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)


def locate(problems: Sequence[Problem], sources: Mapping[str, str], config: Config | None = None) -> list[Problem]:
    """`problems` of rules between keys with their places, and the values in `config`, filled in.

    A key that was not given has the place of the section that it would stand in.
    """
    return [
        replace(p, where=p.where or _where(p.key, sources), given=p.given or _given(p.key, sources, config))
        for p in problems
    ]


def _where(key: str, sources: Mapping[str, str]) -> str:
    while key and key not in sources:
        key = key.rpartition(".")[0]
    return sources.get(key, "")


def _given(key: str, sources: Mapping[str, str], config: Config | None) -> str:
    if config is None:
        return ""
    value: object = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    if value is None or isinstance(value, (Section, dict)):
        return "null" if value is None and key in sources else ""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if key in sources else f"{text} (the default)"
