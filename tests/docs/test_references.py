"""The references that are made from the code leave nothing out."""

from __future__ import annotations

import re
from typing import Literal

import api_reference
import command_reference
import yaml_reference

from moesys.command_line import parser
from moesys.config import legal
from moesys.config.schema import Config, Kinds, Positive, Section


def test_every_key_has_a_place_and_a_meaning():
    pages = yaml_reference.pages()
    anchors = [name for text in pages.values() for name in re.findall(r"\{ #([\w.]+) |<span id='([\w.]+)'", text)]
    found = [one or other for one, other in anchors]
    keys = set(legal.keys())
    assert len(found) == len(set(found)) and keys <= set(found), keys - set(found)
    assert yaml_reference.unexplained() == []
    for key in keys:
        page = pages[yaml_reference.page_of(key)]
        assert f"{{ #{key} " in page or f"<span id='{key}'></span>" in page


class Even(Section):
    kind: Literal["even"] = "even"
    """even: shares."""
    size: Positive
    """Its size."""


class Odd(Section):
    kind: Literal["odd"] = "odd"
    """odd: leaves."""
    rest: dict[str, list[Even]] | None = None
    """By name."""


class Root(Section):
    how: Even | Odd | None = None
    """How it is cut."""
    word: Literal["one", "two"] = "one"
    """one: a *single* `x*y`. two: a pair."""


def test_sections_are_found_in_unions_lists_and_mappings():
    entries = {entry.key: entry for entry in yaml_reference.entries(Root)}
    assert list(entries) == ["how", "how.kind", "how.size", "how.rest", "word"]
    assert entries["how.rest"].same_as == "how" and entries["how.rest"].sections == (Even,)
    assert entries["how.size"].default is None and entries["how"].default == "null"
    assert entries["how.size"].legal == "a whole number of at least 1; at most 1,000,000,000,000,000"
    assert yaml_reference.explained(entries["word"]) == "- `one`: a \\*single\\* `x*y`.\n- `two`: a pair."


def test_a_word_stands_for_a_section_only_where_the_schema_takes_it():
    class Word(Kinds):
        kind: Literal["a", "b"] = "a"

    class Whole(Section):
        one: Word = Word()
        other: Even | None = None

    one, _, other, *_ = yaml_reference.entries(Whole)
    assert one.legal == "a section, or one of its kinds as a word" and other.legal == "a section, or null"


def test_every_command_and_every_option_is_listed():
    page = command_reference.page()
    subs = list(command_reference.parsers(parser()))
    assert {"moesys launch", "moesys bench a2a"} <= {sub.prog for sub in subs}
    for sub in subs:
        section = page.split(f"{{ #{command_reference.anchor(sub)} }}")[1].split("\n## ")[0]
        assert all(
            f"`{option}" in section or f", {option}" in section for option in set(sub.options()) - {"-h", "--help"}
        )


def test_every_public_name_of_the_library_is_documented():
    page = api_reference.page()
    assert api_reference.undocumented() == []
    assert all(f"moesys.{name}" in page for name in api_reference.exported())


def test_a_name_without_a_docstring_is_seen(monkeypatch):
    class Bare:
        def method(self):
            pass

        def _private(self):
            pass

    monkeypatch.setattr(api_reference, "exported", lambda: {"Bare": Bare})
    assert api_reference.undocumented() == ["moesys.Bare", "moesys.Bare.method"]


def test_defaults_are_shown_as_yaml():
    defaults = {entry.key: entry.default for entry in yaml_reference.entries(Config)}
    assert defaults["train.optimizer.betas"] == "[0.9, 0.95]" and defaults["parallel.dp"] == "auto"
    assert defaults["model.hidden"] is None and defaults["model.moe"] == "null" and defaults["train.compile"] == "false"
