"""`model: {from: FOLDER}`: the model section of a released model, from its config.json. Needs no torch.

`moesys.config.load` calls `expand` for files that have the key; `moesys import` writes the same as YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.config.differences import defaults
from moesys.config.schema import ModelConfig
from moesys.config.tree import Entry, merge, put, walk
from moesys.errors import FileError, Problem
from moesys.hub.derived import Derived
from moesys.hub.family import Family, decides, nested
from moesys.hub.fit import family_of
from moesys.hub.folder import CONFIG, Folder, open_folder

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Released:
    """A released model's folder and what its config.json means."""

    folder: Folder
    family: Family
    derived: Derived

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer's file, if it has one."""
        path = self.folder.path / TOKENIZER
        return path if path.is_file() else None

    @property
    def problems(self) -> list[Problem]:
        """What cannot be followed, of `model.from`."""
        where = self.folder.path / CONFIG
        return [Problem("model.from", f"{where}: {p.key} {p.rule}", p.remedy) for p in self.derived.problems]


def released(path: Path) -> Released:
    """The released model at `path`.

    Raises:
        FileError: it is no such folder, config.json is damaged, or of an unknown family.
    """
    folder = open_folder(path)
    family = family_of(folder)
    return Released(folder, family, family.read(folder.config, folder.tensors))


def expand(tree: Entry, problems: list[Problem]) -> Entry:
    """`tree` with the keys that `model.from` stands for, below those that are given; adds what is wrong.

    It also sets `train.init`, and `data.tokenizer` where the folder has one, unless they are given.
    """
    given = tree.section["model"].section["from"]
    if not isinstance(given.value, str) or not given.value:
        rule, remedy = "must be the path of a released model's folder", "name the folder that has its config.json"
        problems.append(Problem("model.from", rule, remedy, given.given(), given.where))
        return _without(tree)
    try:
        found = released(Path(given.value))
    except FileError as error:
        rule, _, remedy = str(error).partition("\n    remedy: ")
        problems.append(Problem("model.from", rule, remedy, where=given.where))
        return _without(tree)
    problems += [Problem(p.key, p.rule, p.remedy, where=given.where) for p in found.problems]
    own, place = _without(tree), str(found.folder.path / CONFIG)
    problems += _conflicts(own, found.derived.values, place)
    for key, value in _implied(found, given.value).items():
        if not _has(own, key):
            own = put(own, key.split("."), Entry(value, given.where))
    return _under(own, _entries(nested(found.derived.values), place))


def _implied(found: Released, path: str) -> dict[str, str]:
    tokenizer = {} if found.tokenizer is None else {"data.tokenizer": str(found.tokenizer)}
    return {"train.init": path, **tokenizer}


def _without(tree: Entry) -> Entry:
    """`tree` without model.from."""
    model = tree.section["model"]
    rest = {key: entry for key, entry in model.section.items() if key != "from"}
    return Entry({**tree.section, "model": Entry(rest, model.where)}, tree.where)


def _under(tree: Entry, derived: Entry) -> Entry:
    """`tree` whose model section lies over the derived one."""
    model = tree.section["model"]
    return Entry({**tree.section, "model": merge(derived, model)}, tree.where)


def _has(tree: Entry, key: str) -> bool:
    return any(key == found for found, _ in walk(tree))


def _conflicts(tree: Entry, values: Mapping[str, Any], place: str) -> list[Problem]:
    """Keys of the model that are given with another value than the released model has."""
    default = defaults(ModelConfig)
    found = []
    for key, entry in walk(tree.section["model"]):
        if isinstance(entry.value, dict) or not decides(key):
            continue
        meant, value = values.get(key, default.get(key)), entry.plain()
        if key in (*values, *default) and value != meant and not (value is None and key not in values):
            rule = f"the released model has {meant!r}, by {place}"
            remedy = "remove the key, or write the model section yourself: moesys import"
            found.append(Problem(f"model.{key}", rule, remedy, entry.given(), entry.where))
    return found


def _entries(value: Any, where: str) -> Entry:
    if isinstance(value, dict):
        return Entry({key: _entries(inner, where) for key, inner in value.items()}, where)
    if isinstance(value, (list, tuple)):
        return Entry([_entries(inner, where) for inner in value], where)
    return Entry(value, where, str(value))
