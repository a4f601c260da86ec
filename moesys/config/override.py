"""`key.sub=value` of the command line."""

from __future__ import annotations

from collections.abc import Sequence

from moesys.config.read import parse, unwritable
from moesys.config.tree import Entry, put
from moesys.errors import Problem

PLACE = "command line"
"""What the places of overridden values start with."""

DEEPEST = 16
"""Names in one dotted key, at most: far more than the schema has."""


def apply(tree: Entry, overrides: Sequence[str], problems: list[Problem]) -> Entry:
    """`tree` with `overrides` in their order; values are YAML, a mapping is merged into a section."""
    for text in overrides:
        tree = _one(tree, text, problems)
    return tree


def _one(tree: Entry, text: str, problems: list[Problem]) -> Entry:
    where = f"{PLACE} {text!r}"
    key, equals, value = text.partition("=")
    path = [name.strip() for name in key.split(".")]
    if not equals or not all(path):
        problems.append(Problem("", "is no override", "write key.sub=value, such as train.steps=10", where=where))
    elif (rule := unwritable(text)) is not None:
        problems.append(Problem("", rule, "give text in UTF-8", where=where))
    elif len(path) > DEEPEST:
        rule = f"has {len(path)} names, and no key is that deep"
        problems.append(Problem("", rule, "write key.sub=value, such as train.steps=10", where=where[:100]))
    elif path[0] == "include":
        problems.append(Problem("include", "cannot be set here", "include it in the file", where=where))
    elif (entry := parse(value, lambda line: where, where, problems)) is not None:
        return put(tree, path, entry)
    return tree
