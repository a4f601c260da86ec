"""The reference of every YAML key, made from the schema alone.

entries(Config)                      # every key with its legal values, default and meaning
pages()                              # the pages of the site: path → Markdown

No section is named here: pages follow the fields of the root, so a section that is added or split has its page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from moesys.config import changes, legal, registry
from moesys.config.meanings import meanings
from moesys.config.schema import Config, Section
from moesys.config.sweep import SweepFile
from moesys.config.write import json_schema

INDEX = "reference/yaml.md"
SWEEP = "reference/yaml-sweep.md"
BOOST = "---\nsearch: {boost: 3}\n---\n"
"""A key that is searched for is found before the pages that mention it."""


@dataclass(frozen=True)
class Entry:
    """One key.

    Attributes:
        key: its dotted name, which is its anchor too.
        legal: its legal values in words.
        default: its default as YAML; None where it must be given.
        meaning: its docstring in the schema.
        words: the words among its legal values.
        sections: the classes of sections that it may hold.
        same_as: the key under which the keys of its section are listed, where that is another.
        users: the kinds of its section that use it; () where all do.
        change: what it decides, so what follows if it changes between a checkpoint and its resumption; "" for sections.
    """

    key: str
    legal: str
    default: str | None
    meaning: str
    words: tuple[str, ...] = ()
    sections: tuple[type[Section], ...] = ()
    same_as: str = ""
    users: tuple[str, ...] = ()
    change: str = ""


def entries(
    root: type[Section] = Config, prefix: str = "", listed: dict[type[Section], str] | None = None
) -> Iterator[Entry]:
    """Every key of `root` and of all sections under it, each before those under it.

    Kinds of one section may share a key: it comes once, as the first kind has it. So do the keys of a section that
    stands under a second key: that one names the first (`same_as`). `listed`: the first key of each section so far.
    """
    listed = {root: prefix.removesuffix(".")} if listed is None else listed
    for name, field in root.model_fields.items():
        entry = _entry(prefix + name, field, meanings(root).get(name, ""), listed)
        yield entry
        seen: set[str] = set()
        for section in entry.sections:
            if section not in listed:
                listed[section] = entry.key
                below = [e for e in entries(section, f"{entry.key}.", listed) if e.key not in seen]
                seen |= {e.key for e in below}
                yield from below


def _entry(key: str, field: FieldInfo, meaning: str, listed: dict[type[Section], str]) -> Entry:
    kind = legal.annotation(field)
    inner = tuple(dict.fromkeys(sections(kind)))
    change = changes.KINDS.get(key)
    return Entry(
        key,
        _legal(kind, inner),
        None if field.is_required() else _default(field.get_default(call_default_factory=True)),
        meaning or next((_docstring(section) for section in inner if _docstring(section)), ""),
        tuple(legal.choices(kind)),
        inner,
        next((listed[section] for section in inner if section in listed), ""),
        _users(key),
        change.value if change else "",
    )


def _users(key: str) -> tuple[str, ...]:
    """The kinds that use a key, where its section takes kinds and some do not use it."""
    section, _, name = key.rpartition(".")
    for slot in vars(registry).values():
        if isinstance(slot, registry.Slot) and slot.key == section:
            found = registry.users(slot, name)
            return tuple(found) if len(found) < len(registry.kinds(slot)) else ()
    return ()


def sections(kind: Any) -> Iterator[type[Section]]:
    """The sections in a type: those of its union, of its lists' and mappings' members."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
    if get_origin(kind) is not Literal:
        for inner in get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind):
            yield from sections(inner)


def _legal(kind: Any, inner: tuple[type[Section], ...]) -> str:
    """Legal values, and the upper bounds that messages leave out."""
    text = re.sub(r"a section with the keys [^|]*?(?=, or null|$)", "a section", legal.describe(kind))
    if text.startswith("a section") and any(map(_word_stands_for, inner)):
        text = f"a section, or one of its kinds as a word{text.removeprefix('a section')}"
    bounds = [f"{limit:,.0f}" for limit in sorted(legal.limits(kind))]
    return f"{text}; at most {' or '.join(bounds)}" if bounds else text


def _word_stands_for(section: type[Section]) -> bool:
    """Whether the section's kind alone, as a word, may stand in its place."""
    try:
        section.model_validate(section.model_fields["kind"].default)
    except (KeyError, ValidationError):
        return False
    return True


def _default(value: Any) -> str:
    """A default as YAML in one line."""
    if isinstance(value, Section):
        return "{}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _docstring(section: type[Section]) -> str:
    return " ".join((section.__dict__.get("__doc__") or "").split())


def escaped(text: str) -> str:
    """Plain words of a docstring as Markdown: what stands in backticks stays."""
    parts = text.split("`")
    return "`".join(
        part if number % 2 else re.sub(r"([*_<>\[\]|])", r"\\\1", part) for number, part in enumerate(parts)
    )


def explained(entry: Entry) -> str:
    """The meaning of a key; a list, where it explains the words of the key one by one."""
    text = " ".join(entry.meaning.split())
    word = "|".join(map(re.escape, sorted(entry.words, key=len, reverse=True)))
    parts = re.split(rf"(?:^|(?<=[.;] ))({word}): ", text) if word else [text]
    if len(parts) < 5:
        return escaped(text)
    lead, rest = parts[0].strip(), list(zip(parts[1::2], parts[2::2], strict=True))
    items = [f"- `{name}`: {escaped(said.strip().removesuffix(';'))}" for name, said in rest]
    return "\n".join([*([escaped(lead), ""] if lead else []), *items])


def _heading(entry: Entry) -> str:
    """A key's heading, a level below its section's."""
    label, level = entry.key.rpartition(".")[2], min(2 + max(0, entry.key.count(".") - 1), 4)
    return f'{"#" * level} `{entry.key}` {{ #{entry.key} data-toc-label="{label}" }}'


def _body(entry: Entry) -> list[str]:
    facts = [escaped(entry.legal)]
    if entry.default is None:
        facts.append("required")
    elif not entry.sections or entry.default != "{}":
        facts.append(f"default `{entry.default}`")
    if entry.same_as:
        facts.append(f"keys as in [`{entry.same_as}`](#{entry.same_as})")
    if entry.users:
        facts.append(f"used by {', '.join(f'`{kind}`' for kind in entry.users)}")
    if entry.change:
        facts.append(f"[{entry.change}](../launching.md#stopping-failing-resuming)")
    return [f"<p class='facts' markdown>{' · '.join(facts)}</p>", "", explained(entry), ""]


@cache
def pages() -> dict[str, str]:
    """Every page of the reference, by its path in the site: an index, one page per section of the root, sweeps."""
    every = list(entries())
    tops = [entry for entry in every if "." not in entry.key]
    found = {INDEX: _index(every, tops)}
    for top in tops:
        if top.sections:
            found[page_of(top.key)] = _section(top, [e for e in every if e.key.startswith(f"{top.key}.")])
    keys = [line for entry in entries(SweepFile) for line in [_heading(entry), "", *_body(entry)]]
    text = "The keys of a sweep's file, which `moesys sweep` runs."
    found[SWEEP] = "\n".join(["# A sweep's file", "", text, "", *keys])
    return {path: f"{BOOST}{text}" for path, text in found.items()}


def page_of(key: str) -> str:
    """The page that explains `key`."""
    top = key.partition(".")[0]
    return f"reference/yaml-{top}.md" if legal.section_of(legal.type_at([top])) else INDEX


def _index(every: list[Entry], tops: list[Entry]) -> str:
    include = [
        Entry(key, "a path, or a list of paths", "[]", said["description"])
        for key, said in json_schema()["properties"].items()
        if key not in Config.model_fields
    ]
    plain = [*include, *(entry for entry in tops if not entry.sections)]
    lines = [
        "# Every YAML key",
        "",
        "This reference is made from the schema that checks a file, so it is never behind. `moesys config FILE` prints",
        "every key with the value that a run would use, and `moesys config --schema` prints the schema for editors.",
        "The last fact of a key says what it decides: the [guide](../launching.md#stopping-failing-resuming) says what",
        "follows from a change of it when a run goes on from its checkpoint.",
        "",
        *(line for entry in plain for line in [_heading(entry), "", *_body(entry)]),
        f"## All {len(every) + len(include)} keys",
        "",
    ]
    for entry in every:
        depth = entry.key.count(".")
        first = escaped(_first_sentence(entry))
        page = page_of(entry.key).removeprefix("reference/")
        lines.append(f"{'    ' * depth}- [`{entry.key}`]({page}#{entry.key}){': ' if first else ''}{first}")
    return "\n".join(lines)


def _first_sentence(entry: Entry) -> str:
    """The first sentence of a key's meaning; its legal words, where the meaning is a list of them."""
    if explained(entry).startswith("- "):
        return entry.legal
    first = re.split(r"(?<=[^A-Z.]\.) |(?<=;) ", " ".join(entry.meaning.split()))[0].rstrip(".;")
    return first if len(first) < 110 else f"{first[:100].rpartition(' ')[0]} …"


def _section(top: Entry, below: list[Entry]) -> str:
    lines = [f"# {top.key}", "", f"<span id='{top.key}'></span>", explained(top), ""]
    for entry in below:
        lines += [_heading(entry), "", *_body(entry)]
    return "\n".join(lines)


def unexplained() -> list[str]:
    """Keys without a meaning."""
    every = [*entries(), *entries(SweepFile)]
    return [entry.key for entry in every if not entry.meaning.strip() and not entry.sections]
