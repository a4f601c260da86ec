"""Pages of HTML in one file without external resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

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
svg.wide, svg.narrow { display: block; width: 100%; height: auto } svg.wide { display: none }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 } th:first-child, td:first-child { text-align: left }
td.text { white-space: normal; overflow-wrap: anywhere; text-align: left }
td.sub { padding-left: 1.6rem; color: var(--soft) }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
pre { background: var(--mark); padding: .8rem; border-radius: .5rem; overflow-x: auto; font-size: .82rem }
@media (min-width: 44rem) { svg.wide { display: block } svg.narrow { display: none } }
@media (max-width: 43.99rem) {
  th, td { padding: .25rem .4rem; white-space: normal }
  table.cards, .cards tbody, .cards tr, .cards td { display: block } .cards thead { display: none }
  .cards tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  .cards td { border: 0; display: inline-block; padding: .05rem .4rem; text-align: left }
  .cards td:first-child { display: block; font-weight: 600 } .cards td:empty { display: none }
  .cards td:not(:first-child)::before { content: attr(data-head) " "; color: var(--soft) } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    width = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{width}<title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>\n{body}\n</main></body></html>\n'


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading, its content, and a note."""
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{remark}{''.join(parts)}</section>"


def sentence(text: str) -> str:
    """The summary of a page."""
    return f'<p class="sentence">{escape(text)}</p>'


def figure(svg: str) -> str:
    """A picture in two widths; the width of the page chooses one."""
    return f'<div class="figure">{svg}</div>'


def folded(title: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


CARDS = 4
"""Number of columns from which a narrow page shows each row of a table as a list."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    """A table. A row whose first cell begins with blanks belongs to the row before.

    On a narrow page a table of many columns becomes a list; others scroll. `text`: the last column holds text.
    """
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(f"<tr>{_cells(heads, row, text)}</tr>" for row in rows)
    head = f"<thead><tr>{top}</tr></thead>" if heads else ""
    kind = ' class="cards"' if len(heads) >= CARDS else ""
    return f'<div class="scroll" tabindex="0"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _cells(heads: Sequence[str], row: Sequence[str], text: bool) -> str:
    cells = []
    for i, cell in enumerate(row):
        kind = "sub" if i == 0 and cell.startswith(" ") else "text" if text and i == len(row) - 1 else ""
        marks = f' class="{kind}"' if kind else ""
        if len(heads) >= CARDS:
            marks += f' data-head="{escape(heads[i])}"'
        cells.append(f"<td{marks}>{escape(cell.strip())}</td>")
    return "".join(cells)
