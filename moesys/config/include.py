"""A file with everything that it includes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moesys.config import legal
from moesys.config.read import nearest_file, read_file
from moesys.config.schema import Config
from moesys.config.tree import Entry, merge
from moesys.errors import Problem


def read_tree(path: Path, problems: list[Problem]) -> Entry | None:
    """The mapping in `path` over the files that it includes, and these over theirs.

    Of several included files the later wins. None where `path` itself cannot be read; what is wrong
    with it and with included files is added to `problems`.
    """
    return _read(path, (), problems)


def _read(path: Path, chain: tuple[Path, ...], problems: list[Problem]) -> Entry | None:
    own = read_file(path, problems)
    if own is None:
        return None
    keys = dict(own.section)
    includes = _paths(keys.pop("include", None), problems)
    tree = _fill(Entry(keys, own.where), Config)
    under = Entry({}, own.where)
    for entry, name in includes:
        target = Path(os.path.normpath(path.parent / name))
        loop = (*chain, path, target)
        if target.resolve() in [p.resolve() for p in loop[:-1]]:
            rule = f"goes in a circle: {' → '.join(str(p) for p in loop)}"
            problems.append(Problem("include", rule, "remove one of these includes", entry.given(), entry.where))
        elif not target.is_file():
            problems.append(_absent(entry, target))
        elif (found := _read(target, loop[:-1], problems)) is not None:
            under = merge(under, found)
    return merge(under, tree)


def _paths(entry: Entry | None, problems: list[Problem]) -> list[tuple[Entry, str]]:
    """The included paths, each with its entry."""
    listed = [] if entry is None or entry.value is None else [entry]
    if listed and isinstance(listed[0].value, list):
        listed = listed[0].value
    paths = []
    for item in listed:
        if isinstance(item.value, str) and item.value:
            paths.append((item, item.value))
        else:
            rule = "must be the path of a file, or a list of paths"
            problems.append(Problem("include", rule, given=item.given(), where=item.where))
    return paths


def _absent(entry: Entry, target: Path) -> Problem:
    rule = f"{target} is a folder, not a file" if target.is_dir() else f"there is no file {target}"
    remedy = "" if target.is_dir() else nearest_file(target)
    remedy = remedy or "paths are relative to the file that includes"
    return Problem("include", rule, remedy, entry.given(), entry.where)


def _fill(entry: Entry, kind: Any) -> Entry:
    """`entry` with {} for each section that stands there without a key: everything default."""
    section = legal.section_of(kind)
    if entry.value is None and not legal.nullable(kind) and (section or legal.mapping_of(kind)):
        return Entry({}, entry.where)
    if section is None or not isinstance(entry.value, dict):
        return entry
    fields = section.model_fields
    keys = {k: _fill(v, legal.annotation(fields[k])) if k in fields else v for k, v in entry.value.items()}
    return Entry(keys, entry.where)
