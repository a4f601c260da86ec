"""A configuration as it was written: every value with the place that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Scalar = str | int | float | bool | None

SHOWN = 60
"""Characters of a value in an error message, at most."""


@dataclass(frozen=True)
class Entry:
    """One value of the YAML.

    `where` is "file.yaml:12", "file.yaml" (a whole file) or "command line 'key=value'"; `text` a
    scalar as it was written ("1e3").
    """

    value: Scalar | list[Entry] | dict[str, Entry]
    where: str
    text: str = ""

    @property
    def section(self) -> dict[str, Entry]:
        """The keys below it; none where it is no mapping."""
        return self.value if isinstance(self.value, dict) else {}

    def plain(self) -> object:
        """The value without its places: scalars, lists and dicts."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def given(self) -> str:
        """The value for an error message: 'two', 1e3, [4, 0], {tp: 2}; cut after 57 characters."""
        text = ""
        for part in self._parts():
            text += part[: SHOWN + 1]
            if len(text) > SHOWN:
                return f"{text[: SHOWN - 3]}..."
        return text

    def _parts(self) -> Iterator[str]:
        """The text of `given`, piece by piece: a value may be long, and its beginning is enough."""
        if isinstance(self.value, dict):
            for number, (key, entry) in enumerate(self.value.items()):
                yield f"{', ' if number else '{'}{key}: "
                yield from entry._parts()
            yield "}" if self.value else "{}"
        elif isinstance(self.value, list):
            for number, entry in enumerate(self.value):
                yield ", " if number else "["
                yield from entry._parts()
            yield "]" if self.value else "[]"
        else:
            yield repr(self.value) if isinstance(self.value, str) else self.text or "empty"


def merge(under: Entry, over: Entry) -> Entry:
    """Both together: `over` wins, mappings are merged key by key, anything else is replaced."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    both = {k: merge(under.value[k], v) if k in under.value else v for k, v in over.value.items()}
    return Entry({**under.value, **both}, over.where)


def put(tree: Entry, path: Sequence[str], entry: Entry) -> Entry:
    """`tree` with `entry` merged in at `path`; sections on the way keep their places."""
    if not path:
        return merge(tree, entry)
    name, *rest = path
    child = tree.section.get(name, Entry({}, entry.where))
    where = tree.where if isinstance(tree.value, dict) else entry.where
    return Entry({**tree.section, name: put(child, rest, entry)}, where)


def walk(tree: Entry, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Every dotted key below `tree` with its entry, sections included."""
    for name, entry in tree.section.items():
        yield prefix + name, entry
        yield from walk(entry, f"{prefix}{name}.")
