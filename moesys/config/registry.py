"""Kinds of mixers, gates, dispatchers and families of released models: each is one class, here or in a plug-in.

kinds(MIXERS)["gqa"]            # the class that describes grouped-query attention
section(MIXERS, "gqa")          # the YAML section of all mixers: `kind`, and the keys of every kind

A plug-in is a distribution with entry points of a slot's group, each the class of a new kind:

    [project.entry-points."moesys.gates"]
    nearest = "my_package.nearest:Nearest"

Descriptions need no torch. A plug-in may import it all the same: commands then start as slowly as torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal

from moesys.config.section import Kinds, Section, create_model, field
from moesys.errors import MoesysError


class Described:
    """Base of all descriptions: a word, what it means, and the keys that it uses.

    Attributes:
        kind: the word that stands for it in YAML.
        summary: its meaning in one sentence, for the reference of keys.
        aliases: other words for it, for suggestions.
        keys: the section of its keys. A key that several kinds use is the same key: they inherit it.
        decides: by key, what hangs on it, by the names of `moesys.config.changes.Kind`.
        decides_by_default: the same of its other keys, and of the choice of this kind.
    """

    kind: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[type[Section]] = Section
    decides: ClassVar[Mapping[str, str]] = {}
    decides_by_default: ClassVar[str] = "MEANT"


@dataclass(frozen=True)
class Slot:
    """A place that takes kinds.

    Attributes:
        name: plural word for its kinds.
        package: name of the package whose modules hold the kinds that moesys brings.
        group: group of the entry points of plug-ins.
        key: the section of the YAML that has this slot's keys.
    """

    name: str
    package: str
    group: str
    key: str


MIXERS = Slot("mixers", "moesys.models.parts.mixers", "moesys.parts", "model.attention")
GATES = Slot("gates", "moesys.models.parts.gates", "moesys.gates", "model.moe.gate")
DISPATCHERS = Slot("dispatchers", "moesys.parallel.dispatchers.kinds", "moesys.dispatchers", "parallel.dispatch")
FAMILIES = Slot("families of released models", "moesys.hub.families", "moesys.families", "model.from")


@cache
def kinds(slot: Slot) -> dict[str, type[Any]]:
    """Every kind of `slot` by its word, those of moesys first, each in the order of their words.

    Raises:
        MoesysError: a plug-in cannot be imported, describes nothing, or takes a word that is taken.
    """
    own = {c.kind: c for c in _own(slot)}
    found = dict(sorted(own.items()))
    for entry in sorted(_plug_ins().select(group=slot.group), key=lambda e: e.name):
        described = _load(entry, slot)
        if described.kind in found:
            other = found[described.kind]
            rule = f"{_source(entry)} brings {slot.name} {described.kind}, as {other.__module__}:{other.__name__} does"
            raise MoesysError(f"{rule}\n    remedy: uninstall one of them")
        found[described.kind] = described
    return found


@cache
def _plug_ins() -> Any:
    """The entry points of all distributions, which are read once: that takes some tens of milliseconds."""
    return entry_points()


def _own(slot: Slot) -> Iterator[type[Described]]:
    package = import_module(slot.package)
    for module in pkgutil.iter_modules(package.__path__, f"{slot.package}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Described) and value.__module__ == module.name:
                yield from [value] if value.kind else []


def _load(entry: EntryPoint, slot: Slot) -> type[Described]:
    try:
        described = entry.load()
    except Exception as error:  # whatever a plug-in does at its import
        reason = f"{type(error).__name__}: {error}"
        raise MoesysError(f"{_source(entry)} cannot be imported: {reason}\n    remedy: mend or uninstall it") from error
    if not (isinstance(described, type) and issubclass(described, Described) and described.kind):
        rule = f"{_source(entry)} names no description: {slot.group} takes classes with a word `kind`"
        raise MoesysError(f"{rule}, such as those in {slot.package}\n    remedy: mend or uninstall it")
    return described


def _source(entry: EntryPoint) -> str:
    """A plug-in as messages name it."""
    dist = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    return f"plug-in {entry.group}: {entry.name} = {entry.value}{dist}"


def section(slot: Slot, default: str, name: str, common: type[Section] | None = None) -> type[Any]:
    """The class `name` of the YAML section of `slot`: `kind`, the keys of `common`, and those of every kind.

    Raises:
        MoesysError: two kinds mean different things by one key.
    """
    every = kinds(slot)
    words = " ".join(f"{kind}: {described.summary}." for kind, described in every.items())
    fields: dict[str, Any] = {"kind": (Literal[tuple(every)], field(default, words))}
    owners: dict[str, type[Described]] = {}
    for described in every.values():
        for key, info in described.keys.model_fields.items():
            if key in owners and not _same(owners[key].keys.model_fields[key], info):
                other = owners[key]
                rule = f"{slot.name} {other.kind} ({other.__module__}) and {described.kind} ({described.__module__})"
                raise MoesysError(f"{rule} mean different things by the key {key}\n    remedy: rename one of them")
            if key not in owners:
                owners[key] = described
                fields[key] = (info.annotation, copy(info))
    made = create_model(name, common or Kinds, fields)
    made.__module__ = "moesys.config.schema"  # where it is to be found, for pickle
    made.keys_of_kinds = {kind: described.keys for kind, described in every.items()}
    made.__doc__ = f"The section {slot.key}: the kind alone, as a word, stands for it."
    return made


def _same(one: Any, other: Any) -> bool:
    return (one.annotation, one.default, one.metadata) == (other.annotation, other.default, other.metadata)


def used(slot: Slot, kind: str) -> set[str]:
    """The keys that `kind` uses of its section."""
    return set(kinds(slot)[kind].keys.model_fields)


def users(slot: Slot, key: str) -> list[str]:
    """The kinds that use `key`."""
    return [kind for kind, described in kinds(slot).items() if key in described.keys.model_fields]
