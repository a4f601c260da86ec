"""What pydantic finds wrong, in the user's words: one problem per key."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from moesys.config import legal, suggest
from moesys.config.schema import Config, Section
from moesys.config.tree import Entry
from moesys.errors import Problem


def problems_of(
    error: ValidationError, tree: Entry, with_missing: bool = True, root: type[Section] = Config
) -> list[Problem]:
    """The problems in `tree`, which pydantic refused as a `root`; or all but its missing keys."""
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _keys([str(part) for part in detail["loc"]], root)
        if _other_member(detail, path, tree, root):
            continue
        if detail["type"] == "extra_forbidden":
            problem = _unknown(path, tree, root)
        elif detail["type"] == "missing" and legal.type_at(path, root) is not None:
            if not with_missing:
                continue
            problem = _missing(path, tree, root)
        else:
            problem = _illegal(detail, path, tree, root)
        found.setdefault(problem.key, problem)
    return list(found.values())


def _keys(loc: list[str], root: type[Section]) -> list[str]:
    """The keys in pydantic's place of a mistake, which also names the sections of unions."""
    path: list[str] = []
    for part in loc:
        section = legal.section_of(legal.type_at(path, root)) if legal.type_at(path, root) is not None else None
        if section is None or part != section.__name__:
            path.append(part)
    return path


def _other_member(detail: Any, path: list[str], tree: Entry, root: type[Section]) -> bool:
    """Whether a mapping was refused as a number or a word, where it could be a section, of which more is said."""
    while len(path) > 1 and legal.type_at(path, root) is None:
        path = path[:-1]
    kind, entry = legal.type_at(path, root), find(tree, path)[0]
    union = legal.section_of(kind) is not None and legal.accepts(kind, int)
    within = (
        entry is not None and isinstance(entry.value, dict) and detail["type"] not in ("missing", "extra_forbidden")
    )
    return union and within


def _illegal(detail: Any, path: list[str], tree: Entry, root: type[Section]) -> Problem:
    # pydantic appends the members of unions and the positions in lists
    while len(path) > 1 and legal.type_at(path, root) is None:
        path = path[:-1]
    key, kind = ".".join(path), legal.type_at(path, root)
    entry, where = find(tree, path)
    if entry is None and (word := find(tree, path[:-1])[0]) is not None and isinstance(word.value, str):
        entry = word  # one word that stands for a section is its kind
    given = entry.given() if entry is not None else ""
    if detail["type"] in ("value_error", "assertion_error"):
        return Problem(key, str(detail["ctx"]["error"]), given=given, where=where)
    if (most := _too_much(detail, kind)) is not None:
        return Problem(key, most, given=given, where=where)
    if detail["loc"][-1] == "[key]":
        names = legal.describe(legal.names_of(legal.type_at(path[:-1], root)))
        return Problem(key, f"a name here must be {names}", where=where)
    words = legal.describe(kind)
    if detail["type"] == "finite_number":
        words = words.replace("number", "finite number", 1)
    return Problem(key, f"must be {words}", _remedy(kind, entry) if entry is not None else "", given, where)


def _too_much(detail: Any, kind: Any) -> str | None:
    """The rule of an upper bound that `legal.describe` leaves out, where that is what is broken."""
    if detail["type"] == "string_too_long":
        return f"has {len(detail['input'])} characters, and must have at most {detail['ctx']['max_length']}"
    if detail["type"] == "less_than_equal" and detail["ctx"]["le"] in legal.limits(kind):
        return f"must be at most {detail['ctx']['le']:,}"
    return None


def find(tree: Entry, path: list[str]) -> tuple[Entry | None, str]:
    """The entry at `path`, if there is one, and the nearest place: its own or a parent's."""
    entry: Entry | None = tree
    where = tree.where
    for name in path:
        entry = entry.section.get(name) if entry is not None else None
        where = entry.where if entry is not None else where
    return entry, where


def _missing(path: list[str], tree: Entry, root: type[Section]) -> Problem:
    key, section, name = ".".join(path), ".".join(path[:-1]), path[-1]
    kind, where = legal.describe(legal.type_at(path, root)), find(tree, path)[1]
    if root is not Config:
        return Problem(key, f"is missing: needed is {kind}", f"add {name}:", where=where)
    if not section:
        remedy = f"write it, or include a file that has it, such as include: {name}s/NAME.yaml"
        return Problem(key, f"is missing: needed is {kind}", remedy, where=where)
    return Problem(key, f"is missing: section {section} needs it, {kind}", f"add {name}: to {section}", where=where)


def _unknown(path: list[str], tree: Entry, root: type[Section]) -> Problem:
    key, section, name = ".".join(path), ".".join(path[:-1]), path[-1]
    where = find(tree, path)[1]
    if root is Config and "." in name and legal.type_at(name.split(".")) is not None:
        nested = ": {".join(name.split(".")) + ": ..." + "}" * name.count(".")
        return Problem(key, "dots separate keys on the command line only", f"write {nested}", where=where)
    if name == "include" and root is Config:
        return Problem(key, "stands at the top of a file only", "move it out of the section", where=where)
    schema = legal.section_of(legal.type_at(path[:-1], root))
    fields = list(schema.model_fields) if schema is not None else []
    title = f"section {section}" if section else root.title
    like = suggest.keys_like(section, name, root)
    remedy = f"did you mean {' or '.join(like)}?" if like else "remove it"
    return Problem(key, f"unknown key; {title} has {', '.join(fields)}", remedy, where=where)


_YES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _remedy(kind: Any, entry: Entry) -> str:
    """What the user probably wanted to write."""
    value = entry.value
    numeric = legal.accepts(kind, int) or legal.accepts(kind, float)
    if isinstance(value, str):
        if legal.accepts(kind, bool) and (plain := _YES.get(value.lower(), value.lower())) in ("true", "false"):
            return f"write {plain}"
        if legal.nullable(kind) and value.lower() in ("none", "nil", "nan"):
            return "write null"
        if numeric and re.fullmatch(r"[-+]?[0-9][0-9_,]*(\.[0-9]+)?([eE][-+]?[0-9]+)?", value):
            return f"write {re.sub('[_,]', '', value)}, without quotes"
        near = suggest.choice(value, legal.choices(kind))
        return f"did you mean {near}?" if near else ""
    if legal.accepts(kind, str) and not isinstance(value, (list, dict)) and value is not None:
        return f'put it in quotes: "{entry.text}"'
    if isinstance(value, float) and value.is_integer() and legal.accepts(kind, int):
        return f"write {int(value)}"
    return ""
