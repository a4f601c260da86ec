"""The check's results as a table for docs/benchmarks.md, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesys.measure.gpu_check.rows import Figures, Row
from moesys.words import plural


@dataclass(frozen=True)
class PartResult:
    """The rows of a part, its seconds and its limit."""

    part: str
    about: str
    rows: Sequence[Row]
    seconds: float
    limit_s: float


@dataclass(frozen=True)
class CheckReport:
    """The whole check: date, command, and the result of each part."""

    date: str
    command: str
    dry: bool
    found: Sequence[PartResult]

    @property
    def failures(self) -> list[Row]:
        """All failed rows."""
        return [row for part in self.found for row in part.rows if row.state == "failed"]

    def figures(self, what: str) -> Figures:
        """The figures of the row with this name in any part; empty without one."""
        return next((row.figures for part in self.found for row in part.rows if row.what == what), {})

    def as_json(self) -> dict[str, Any]:
        """All results, in builtin types."""
        parts = [
            {
                "part": found.part,
                "about": found.about,
                "seconds": round(found.seconds, 1),
                "limit_s": found.limit_s,
                "rows": [asdict(row) for row in found.rows],
            }
            for found in self.found
        ]
        head = {"format": 1, "date": self.date, "command": self.command, "dry_run": self.dry}
        passed = not self.failures
        return head | {
            "device": self.figures("device"),
            "software": self.figures("software"),
            "passed": passed,
            "parts": parts,
        }

    def markdown(self) -> str:
        """A heading, a line with device, versions and date, and one table of all rows."""
        device, software = self.figures("device"), self.figures("software")
        name = device.get("name") or "unknown device"
        title = f"### {'Dry run of the GPU check' if self.dry else 'GPU check'}: {name}, {self.date}"
        facts = [str(name), *(f"{key} {device[key]}" for key in ("driver", "power") if device.get(key))]
        named = {"torch": "torch", "triton": "Triton", "cuda": "CUDA", "nccl": "NCCL", "transformers": "transformers"}
        facts += [f"{said} {software.get(key) or 'missing'}" for key, said in named.items()]
        facts += [f"Python {software.get('python')}", f"commit {software.get('commit') or 'unknown'}", self.date]
        head = f"`{self.command}` — {', '.join(facts)}. {self.summary()}"
        if self.dry:
            head += " There was no GPU: shapes are shrunken, and no figure below is one of a GPU."
        lines = [title, "", head, "", "| part | what | state | result |", "|---|---|---|---|"]
        for found in self.found:
            lines += [f"| {found.part} | {cell(r.what)} | {r.state} | {cell(r.said)} |" for r in found.rows]
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """The numbers of rows that passed, failed and were not run, and the seconds."""
        states = [row.state for found in self.found for row in found.rows]
        counts = [f"{states.count(state)} {state}" for state in ("passed", "failed", "not run") if state in states]
        seconds = sum(found.seconds for found in self.found)
        return f"{plural(len(states), 'row')} in {seconds:.0f} s: {', '.join(counts)}."


def cell(text: str) -> str:
    """`text` on one line, safe for a table cell."""
    return " ".join(text.split()).replace("|", "\\|")
