"""A file with everything that it includes: files beside it, and configurations that come with the package."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

from moesys import shipped
from moesys.config import legal, suggest
from moesys.config.read import LONGEST_NAME, nearest_file, read_file
from moesys.config.schema import Config
from moesys.config.tree import Entry, merge
from moesys.errors import Problem

MOST_FILES = 200
"""Files that one configuration is made of, each counted as often as it is included."""


def read_tree(path: Path, problems: list[Problem]) -> Entry | None:
    """The mapping in `path` over the files that it includes, and these over theirs.

    Of several included files the later wins. None where `path` itself cannot be read; what is wrong
    with it and with included files is added to `problems`.
    """
    return _read(path, (), problems, count())


def _read(path: Path, chain: tuple[Path, ...], problems: list[Problem], files: count[int]) -> Entry | None:
    """`read_tree` of a file that those in `chain` include, one the next; `files` counts what was read."""
    own = read_file(path, problems)
    if own is None:
        return None
    keys = dict(own.section)
    includes = _paths(keys.pop("include", None), problems)
    tree = _fill(Entry(keys, own.where), Config)
    under = Entry({}, own.where)
    for entry, name in includes:
        target = _target(path.parent, name)
        loop = (*chain, path, target)
        if not os.path.isfile(target):
            problems.append(_absent(entry, target))
        elif target.resolve() in [p.resolve() for p in loop[:-1]]:
            rule = f"goes in a circle: {' → '.join(str(p) for p in loop)}"
            problems.append(Problem("include", rule, "remove one of these includes", entry.given(), entry.where))
        elif (number := next(files)) >= MOST_FILES:
            if number == MOST_FILES:
                rule = f"makes more than {MOST_FILES} files, each counted as often as it is included"
                problems.append(Problem("include", rule, "include fewer", entry.given(), entry.where))
        elif (found := _read(target, loop[:-1], problems, files)) is not None:
            under = merge(under, found)
    return merge(under, tree)


def _target(folder: Path, name: str) -> Path:
    """The file that `name` includes: one in `folder`; or where there is none, a shipped one of this name."""
    beside = Path(os.path.normpath(folder / name))
    return beside if os.path.lexists(beside) else shipped.find(name) or beside


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
    if os.path.isdir(target):
        rule, remedy = f"{target} is a folder, not a file", ""
    elif len(target.name) > LONGEST_NAME:
        rule, remedy = f"a file's name has at most {LONGEST_NAME} characters, and this one {len(target.name)}", ""
    elif os.path.lexists(target):
        rule, remedy = f"{target} is no regular file, or may not be read", "include another file"
    else:
        rule, remedy = f"there is no file {str(target)[:1000]}", _nearest(entry, target)
    remedy = remedy or "paths are relative to the file that includes"
    return Problem("include", rule, remedy, entry.given(), entry.where)


def _nearest(entry: Entry, target: Path) -> str:
    """A remedy that names the file that was meant: the nearest beside the absent `target`, or a shipped one."""
    near = nearest_file(target)
    meant = suggest.nearest(Path(str(entry.value)).stem, shipped.names()) if "did you mean" not in near else None
    return near if meant is None else f"did you mean {meant}, which comes with moesys?"


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
