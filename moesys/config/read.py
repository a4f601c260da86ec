"""One YAML file, or the value of one override, read into entries that know their places.

Plain scalars are YAML 1.2's: `1e-4` is a number, `yes`, `on` and `04:00:00` are text.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from moesys.config.tree import Entry, Scalar
from moesys.errors import Problem

LARGEST = 2**20
"""Bytes: whatever is longer is no configuration and not worth parsing."""

LONGEST_NAME = 255
"""Characters of a file's name: what Linux's file systems allow."""

MOST_VALUES = 100_000
"""Values of one file, each alias counted as all that it stands for."""

_TAG = "tag:yaml.org,2002:"

CORE_SCHEMA = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
}
"""What plain scalars are besides text: pattern and first characters (YAML 1.2.2, section 10.3.2)."""

_SYNTAX = (
    (r"'\\t'", "a tab where spaces are needed", "indent with spaces"),
    (r"mapping values are not", "a colon where no key can be", "check the indentation, or quote text with ': '"),
    (r"expected ':'", "a key without its colon", "write key: value, here or in the line before"),
    (r"expected <block end>", "a line in a column of its own", "start the keys of a section in one column"),
    (r"expected ',' or", "a bracket that is not closed", "close it, or separate its parts by commas"),
    (r"end of stream|scanning a quoted", "quotes that are not closed", "close the quotes"),
    (r"cannot start any token", "text that starts with a special character", "put it in quotes"),
    (r"single document", "a second document", "keep one: remove the line ---"),
    (r"undefined alias", "a word that starts with *", "put it in quotes"),
    (r"sequence entries are not", "a list item where none can be", "start the list in a line of its own"),
)
"""PyYAML's words for wrong syntax, plain ones, and the remedy."""


class _Nodes(Reader, Scanner, Parser, Composer, BaseResolver):  # type: ignore[misc]
    """PyYAML down to nodes, which know their lines; with YAML 1.2's scalars."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        for base in (Scanner, Parser, Composer, BaseResolver):
            base.__init__(self)


for _name, (_pattern, _first) in CORE_SCHEMA.items():
    _Nodes.add_implicit_resolver(_TAG + _name, _pattern, _first)


def read_file(path: Path, problems: list[Problem], start: str = "the section model") -> Entry | None:
    """The mapping in `path`; None, with the reason added to `problems`, where there is none.

    `start`: what an empty file should be told to begin with.
    """
    text = _text(path, problems)
    if text is None:
        return None
    tree = parse(text, lambda line: f"{path}:{line}", str(path), problems)
    if tree is None:
        return None
    if tree.value is None:
        problems.append(Problem("", "the file is empty", f"give at least {start}", where=str(path)))
        return None
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else f"the text {tree.given()}"
        rule = f"must hold keys and values, such as `seed: 0`, and holds {kind}"
        problems.append(Problem("", rule, where=str(path)))
        return None
    return tree


def _text(path: Path, problems: list[Problem]) -> str | None:
    """The text of `path`, without a byte order mark."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise OSError(0, "is larger than 1 MiB: this is no configuration")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        rule, remedy, where = "no such file", nearest_file(path), str(path)
    except IsADirectoryError:
        inside = path / "config.yaml"
        remedy = f"did you mean {inside}?" if inside.exists() else "give a YAML file"
        rule, where = "is a folder, not a file", str(path)
    except UnicodeDecodeError as error:
        where = f"{path}:{data[: error.start].count(10) + 1}"
        rule, remedy = "is not text in UTF-8", "save it as UTF-8, or give another file"
    except (OSError, ValueError) as error:
        rule, remedy, where = getattr(error, "strerror", None) or str(error), "", str(path)
        rule = rule if rule.startswith("is ") else f"cannot be read: {rule}"
    problems.append(Problem("", rule, remedy, where=where))
    return None


def nearest_file(path: Path) -> str:
    """A remedy that names the file of nearest name in the same folder."""
    if not os.path.isdir(path.parent):
        return f"there is no folder {str(path.parent)[:1000]}"
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:  # a folder that this user may not list
        return ""
    near = difflib.get_close_matches(path.name, names, 1)
    return f"did you mean {path.parent / near[0]}?" if near else ""


def parse(text: str, place: Callable[[int], str], whole: str, problems: list[Problem]) -> Entry | None:
    """The entries in `text`. `place` names a line (from 1), `whole` the text; None on a syntax error."""
    try:
        root = _Nodes(text).get_single_node()
        if root is None:
            return Entry(None, whole)
        return _Convert(place, problems).entry(root, "", whole)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said, line = f"{error.context or ''} {error.problem or ''}".strip(), mark.line + 1 if mark else 1
        opened = error.context_mark.line + 1 if error.context_mark else line
    except ReaderError as error:
        said, line = "a control character", text[: error.position].count("\n") + 1
        opened = line
    except RecursionError:
        said, line, opened = "nested too deeply", 1, 1
    except _TooManyValues as error:
        rule = f"stands for more than {MOST_VALUES:,} values, aliases included"
        problems.append(Problem("", rule, "use fewer aliases (*name), or none", where=place(error.line)))
        return None
    plain, remedy = next(((p, r) for pattern, p, r in _SYNTAX if re.search(pattern, said)), (said, ""))
    since = f", in what starts in line {opened}" if opened != line else ""
    problems.append(Problem("", f"is not valid YAML: {plain}{since}", remedy, where=place(line)))
    return None


class _TooManyValues(Exception):
    """Aliases of aliases make more values than anyone can mean; `line` (from 1) holds the first of too many."""

    def __init__(self, line: int) -> None:
        self.line = line


class _Convert:
    """Nodes to entries, collecting what YAML allows and a configuration does not."""

    def __init__(self, place: Callable[[int], str], problems: list[Problem]) -> None:
        self.place, self.problems = place, problems
        self.open: list[Node] = []
        self.values = 0
        self.scalars: dict[Node, Scalar] = {}

    def entry(self, node: Node, key: str, where: str) -> Entry:
        """The entry of `node`, which is the value of the dotted `key` at `where`."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise _TooManyValues(node.start_mark.line + 1)
        if node in self.open:
            return self._refuse(key, where, "contains itself through its anchor", "remove the alias")
        if node in self.scalars:
            return Entry(self.scalars[node], where, node.value)
        if isinstance(node, ScalarNode) and (rule := unwritable(node.value)):
            return self._refuse(key, where, rule, "remove the escape")
        self.open.append(node)
        try:
            if isinstance(node, MappingNode) and node.tag == _TAG + "map":
                return Entry(self._mapping(node, key), where)
            if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
                return Entry([self.entry(n, key, self._place(n)) for n in node.value], where)
            if isinstance(node, ScalarNode):
                self.scalars[node] = _scalar(node)
                return Entry(self.scalars[node], where, node.value)
            raise KeyError(node.tag)
        except (KeyError, ValueError):
            tag = node.tag.replace(_TAG, "!!")
            if tag == "!!int" and len(node.value) > MOST_DIGITS:
                return self._refuse(key, where, f"has {len(node.value)} digits", "write a number that was meant")
            return self._refuse(key, where, f"cannot have the tag {tag} here", "remove the tag")
        finally:
            self.open.pop()

    def _mapping(self, node: MappingNode, key: str) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for name_node, value in node.value:
            where, name = self._place(name_node), str(name_node.value)
            dotted = f"{key}.{name}" if key else name
            if isinstance(name_node, ScalarNode) and (rule := unwritable(name)):
                self._refuse(key, where, f"has a key that {rule}", "remove the escape")
            elif not isinstance(name_node, ScalarNode):
                self._refuse(key, where, "has a key that is not a plain word", "quote text that starts with { or [")
            elif name == "<<" and name_node.style is None:
                self._refuse(dotted, where, "merging by << is not supported", "use include, or repeat the keys")
            elif name in entries:
                rule = f"is given twice, first at {entries[name].where}"
                self._refuse(dotted, where, rule, "keep one of them")
            else:
                entries[name] = self.entry(value, dotted, where)
        return entries

    def _place(self, node: Node) -> str:
        return self.place(node.start_mark.line + 1)

    def _refuse(self, key: str, where: str, rule: str, remedy: str) -> Entry:
        self.problems.append(Problem(key, rule, remedy, where=where))
        return Entry(None, where)


MOST_DIGITS = 4300
"""Of a whole number: Python itself reads no more."""


def unwritable(text: str) -> str | None:
    """What of `text`, if anything, cannot be written to a file or stand in a file's name."""
    if "\0" in text:
        return "holds a NUL character"
    half = re.search("[\ud800-\udfff]", text)
    return f"holds half a character, \\u{ord(half[0]):04x}" if half else None


def _scalar(node: ScalarNode) -> Scalar:
    """The value of a scalar by its tag. Raises KeyError or ValueError where the tag does not fit it."""
    text: str = node.value
    return _SCALARS[node.tag.removeprefix(_TAG)](text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Scalar]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    # int(text, 0) would refuse leading zeros
    "int": lambda text: int(text, 0) if text[:2] in ("0x", "0o") else int(text),
    "float": _float,
}
