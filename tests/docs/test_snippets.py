"""What the pages show is what the program takes and says: YAML, commands, messages, dry runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_reference import parsers
from pages import PAGES, ROOT, Block, Command, blocks, commands, prose

from moesys import cli
from moesys.command_line import parser, strange
from moesys.config import legal, load
from moesys.config.read import read_file
from moesys.config.schema import Config
from moesys.parallel import dimension

BASE: dict[str, Any] = {
    "model": {"hidden": 64, "layers": 4, "attention": {"heads": 4}, "moe": {"experts": 16, "ffn_hidden": 64}},
    "train": {"seq_len": 64, "global_batch": 64},
    "cluster": {"nodes": 2, "ranks_per_node": 8},
}
"""A run on sixteen ranks, which a section that stands alone in a page completes."""
NOT_KEYS = ("data.py", "train.step", "parallel.tpp", "model.from")
"""Not keys of the schema: a file, and keys that a page shows as misspelt."""
YAML = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
COMMANDS = list(commands())


def read(path: Path) -> dict[str, Any]:
    """The YAML of a file, as the program reads it."""
    problems: list[Any] = []
    tree = read_file(path, problems)
    assert tree is not None and problems == []
    plain: dict[str, Any] = tree.plain()
    return plain


def documents(block: Block, folder: Path) -> Iterator[dict[str, Any]]:
    """The YAML of a block: one document; or several, where one of its top-level keys comes again."""
    parts = re.split(r"^(?=\w)", block.text, flags=re.MULTILINE)
    together: dict[str, Any] = {}
    for part in parts:
        (folder / "part.yaml").write_text(part)
        new = read(folder / "part.yaml") if re.match(r"\w", part) else {}
        if not together.keys().isdisjoint(new):
            yield together
            together = {}
        together |= new
    yield together


def placed(document: dict[str, Any]) -> dict[str, Any]:
    """A document as it stands in a whole file: a section that stands alone goes to its place."""
    tree: dict[str, Any] = {}
    for key, value in document.items():
        (path,) = [key] if key in (*Config.model_fields, "include") else _places(key)
        at = tree
        *above, last = path.split(".")
        for name in above:
            at = at.setdefault(name, {})
        at[last] = value
    return tree


def _places(name: str) -> list[str]:
    every = list(legal.keys())
    return [key for key in every if key.endswith(f".{name}") and legal.section_of(legal.type_at(key.split(".")))]


def merged(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}
    return over


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_legal(block, tmp_path):
    for document in documents(block, tmp_path):
        tree = placed(document)
        jsonschema.validate(tree, load.json_schema())
        includes = [read(ROOT / path) for path in tree.pop("include", [])]
        model = tree.get("model", {})
        model.pop("from", None)  # a released model's folder, which is not here, gives the rest
        complete = "hidden" in model and "moe" not in document
        whole: dict[str, Any] = {} if includes or complete else BASE
        for part in (*includes, tree):
            whole = merged(whole, part)
        config = Config.model_validate(whole)
        assert [str(problem) for problem in dimension.check(config)] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where} {' '.join(command.words)[:60]}")
def test_a_command_is_understood(command: Command):
    words = [word for word in command.words if word not in ("…", "FILE")]
    known, rest = parser().parse_known_args([*words, *(["x"] if "FILE" in command.words else [])])
    assert strange(known.parser, rest, known.takes_overrides) is None
    told = any(line.startswith("moesys ") for line in command.output)
    for override in [word for word in [*known.overrides, *rest] if "=" in word and not told]:
        assert legal.type_at(override.partition("=")[0].split(".")) is not None, override
    if isinstance(file := getattr(known, "config", None), Path) and file.parts[0] == "configs":
        assert (ROOT / file).is_file()


def shown(kind: str) -> list[Command]:
    """Commands on shipped configurations that print a message, or a dry run, at once."""
    at_once = {"error": lambda c: c.output[0].startswith("moesys "), "dry run": lambda c: "--dry-run" in c.words}
    return [c for c in COMMANDS if c.output and "configs/" in " ".join(c.words) and at_once[kind](c)]


@pytest.mark.parametrize("kind", ["error", "dry run"])
def test_what_a_command_prints_is_what_the_page_shows(kind, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    for command in shown(kind):
        cli.main(command.words)
        printed = "".join(capsys.readouterr()).splitlines()
        at = 0
        for line in filter(None, command.output):
            if line != "…":
                left = [said.rstrip() for said in printed[at:]]
                assert line in left, f"{command.where} shows {line!r}; now it says\n" + "\n".join(printed)
                at += left.index(line) + 1
    assert shown(kind)


def test_commands_and_keys_in_sentences_exist():
    wrong = []
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            if re.fullmatch(r"moesys [a-z].*", code):
                wrong += [f"{page.name}: {code}"] if not understood(code) else []
            elif re.fullmatch(rf"({'|'.join(Config.model_fields)})\.[a-z_.0-9]+", code) and code not in NOT_KEYS:
                wrong += [f"{page.name}: {code}"] if legal.type_at(code.split(".")) is None else []
    assert wrong == []


def understood(code: str) -> bool:
    """Whether the command and the options of `code` exist; what stands for values is not read."""
    commands = {sub.prog: sub for sub in parsers(parser())}
    words = code.split()
    found = max((name for name in commands if code == name or code.startswith(f"{name} ")), key=len)
    options = [word.partition("=")[0].strip("[]") for word in words if word.strip("[").startswith("--")]
    beyond = words[len(found.split())] if len(words) > len(found.split()) else ""
    is_command = not any(name.startswith(f"{found} ") for name in commands) or beyond.startswith("--") or not beyond
    return is_command and set(options) <= set(commands[found].options())
