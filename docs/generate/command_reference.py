"""The reference of the command line, made from the parser of arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from moesys.command_line import EXIT_CODES, Parser, parser

PAGE = "reference/commands.md"


def parsers(found: Parser | None = None) -> Iterator[Parser]:
    """The parser of `moesys`, of each command, and of each command of a group, in the order of the help."""
    found = found or parser()
    yield found
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def page() -> str:
    """Every command with its usage, its options and an example."""
    codes = [f"| {code} | {_cell(text)} |" for code, text in re.findall(r"^  (\d+) +(.*)$", EXIT_CODES, re.MULTILINE)]
    lines = ["# Every command", "", "| exit code | meaning |", "|---|---|", *codes, ""]
    for sub in parsers():
        lines += _command(sub)
    return "\n".join(lines)


def anchor(sub: Parser) -> str:
    """The anchor of a command: "moesys-bench-a2a"."""
    return sub.prog.replace(" ", "-")


def _command(sub: Parser) -> Iterator[str]:
    usage = " ".join(sub.format_usage().removeprefix("usage: ").split())
    example = (sub.epilog or "").split("example:\n")[1].split("\n")[0].strip()
    yield from (f"## `{sub.prog}` {{ #{anchor(sub)} }}", "", sub.description or "", "")
    yield from ("```text", *_wrapped(usage), "```", "")
    rows = [row for action in sub._actions for row in [_row(sub, action)] if row]
    if rows:
        yield from ("| argument | meaning |", "|---|---|", *rows, "")
    yield from (f"Example: `{example}`", "")


def _wrapped(usage: str) -> Iterator[str]:
    """A usage in lines that a page can show, broken between options."""
    line = ""
    for part in re.findall(r"\[[^\]]*\](?: \.\.\.\])?|\S+", usage):
        if line and len(line) + len(part) > 78:
            yield line
            line = "   "
        line = f"{line} {part}" if line else part
    yield line


def _row(sub: Parser, action: argparse.Action) -> str:
    if isinstance(action, argparse._HelpAction):
        return ""
    if isinstance(action, argparse._SubParsersAction):
        listed = [(choice.dest, choice.help) for choice in action._choices_actions]
        return "\n".join(
            f"| [`{name}`](#{sub.prog.replace(' ', '-')}-{name}) | {_cell(text)} |" for name, text in listed
        )
    formatter = sub._get_formatter()
    names = action.option_strings or [str(action.metavar or action.dest)]
    value = formatter._format_args(action, str(action.dest).upper()) if action.option_strings else ""
    if action.choices and not action.metavar:
        value = "` \\| `".join(map(str, action.choices))
    text = formatter._expand_help(action) if action.help else ""
    return f"| `{', '.join(names)}`{f' `{value}`' if value else ''} | {_cell(text)} |"


def _cell(text: str | None) -> str:
    return re.sub(r"([*_<>|])", r"\\\1", text or "")
