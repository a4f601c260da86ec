"""A configuration as it was written: every value with the place that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Scalar = str | int | float | bool | None


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
        """The value for an error message: 'two', 1e3, [4, 0], {tp: 2}."""
        if isinstance(self.value, dict):
            full = "{" + ", ".join(f"{key}: {entry.given()}" for key, entry in self.value.items()) + "}"
        elif isinstance(self.value, list):
            full = "[" + ", ".join(entry.given() for entry in self.value) + "]"
        elif isinstance(self.value, str):
            full = repr(self.value)
        else:
            full = self.text or "empty"
        return full if len(full) <= 60 else f"{full[:57]}..."


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
