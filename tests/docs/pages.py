"""The pages of the documentation, and what stands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command that a page shows, with the lines that it is shown to print."""

    where: str
    words: list[str]
    output: list[str]


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2])


def commands() -> Iterator[Command]:
    """Every line of a block without a language that runs `moesys`, with what follows it after a prompt."""
    for page in PAGES:
        for block in blocks(page):
            if not block.language:
                yield from _commands(block)


def _commands(block: Block) -> Iterator[Command]:
    lines = block.text.replace("\\\n", " ").splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"(\$ )?moesys (?!\w*:|\w+:)", line)]
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(lines)
        prompt = lines[start].startswith("$ ")
        words = shlex.split(lines[start].removeprefix("$ "), comments=True)
        yield Command(str(block), words[1:], lines[start + 1 : end] if prompt else [])


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
