"""The meaning of each key: the text that stands below it in the class of its section.

meanings(TrainConfig)["steps"]      # "Optimizer steps."

The source is read when somebody asks: for the JSON schema, or the reference of keys. Checking a file needs no meanings,
and reading the source would take a fifth of its time.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from moesys.config.section import Section


def meanings(section: type[Section]) -> dict[str, str]:
    """The meaning of each key of `section` that has one, by key: its own, inherited ones, those of its kinds."""
    found: dict[str, str] = {}
    for keys_of_kind in reversed(list(section.keys_of_kinds.values())):
        found |= meanings(keys_of_kind)
    for base in reversed(section.__mro__):
        found |= _classes(base.__module__).get(base.__name__, {})
    written = {key: field.description for key, field in section.model_fields.items() if field.description}
    return {key: text for key, text in (found | written).items() if key in section.model_fields}


def for_editors(section: type[Section]) -> dict[str, str]:
    """The same, each after the kinds that use the key, where others do not: "hash: The experts of an id"."""
    found = meanings(section)
    for key, text in found.items():
        users = [kind for kind, keys in section.keys_of_kinds.items() if key in keys.model_fields]
        words = f"{', '.join(users)}: "
        if 0 < len(users) < len(section.keys_of_kinds) and not text.startswith(words):
            found[key] = words + text
    return found


@cache
def _classes(module: str) -> dict[str, dict[str, str]]:
    """The texts below the annotated names of each class of `module`, by the class's name; {} without a source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return {}
    return {node.name: dict(_texts(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for name, text in pairwise(node.body):
        if not (isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            yield name.target.id, inspect.cleandoc(text.value.value)
