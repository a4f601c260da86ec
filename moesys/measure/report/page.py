"""A page of HTML that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --paper: #fff; --line: #d9dee3; --mark: #f2f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ad; --paper: #15181b; --line: #343a40; --mark: #1f2428 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
p.sentence { font-size: 1.2rem; line-height: 1.45; background: var(--mark); padding: 1rem; border-radius: .5rem }
p.note { color: var(--soft); font-size: .9rem; margin: .3rem 0 }
.scroll { overflow-x: auto; margin: .6rem 0 1rem }
.scroll > svg { display: block; max-width: none; min-width: 36rem; height: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 } th:first-child, td:first-child { text-align: left }
td.text { white-space: normal; overflow-wrap: anywhere; text-align: left }
@media (min-width: 44rem) { .scroll > svg { width: 100%; min-width: 0 } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    width = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{width}<title>{_(title)}</title><style>{STYLE}</style>'
    body = "\n".join((f"<h1>{_(title)}</h1>", *parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>\n{body}\n</main></body></html>\n'


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading, what is under it, and a remark."""
    remark = f'<p class="note">{_(note)}</p>' if note else ""
    return f"<section><h2>{_(title)}</h2>{remark}{''.join(parts)}</section>"


def sentence(text: str) -> str:
    """The summary."""
    return f'<p class="sentence">{_(text)}</p>'


def figure(svg: str) -> str:
    """A picture, which scrolls by itself where the page is narrow."""
    return f'<div class="scroll" tabindex="0">{svg}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    """A table, which scrolls by itself where the page is narrow; `text`: the last column holds text."""
    top = "".join(f'<th scope="col">{_(h)}</th>' for h in heads)
    body = ""
    for row in rows:
        cells = [f"<td>{_(c)}</td>" for c in row]
        if text:
            cells[-1] = f'<td class="text">{_(row[-1])}</td>'
        body += f"<tr>{''.join(cells)}</tr>"
    head = f"<thead><tr>{top}</tr></thead>" if heads else ""
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


_ = html.escape
