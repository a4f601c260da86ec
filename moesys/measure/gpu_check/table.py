"""The check's results as a table for docs/benchmarks.md, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesys.measure.gpu_check.rows import Figures, Row
from moesys.words import plural


@dataclass(frozen=True)
class PartResult:
    """What a part found, in so many seconds of those that it might take."""

    part: str
    about: str
    rows: Sequence[Row]
    seconds: float
    limit_s: float


@dataclass(frozen=True)
class CheckReport:
    """The whole check: when, by which command, and what each part found."""

    date: str
    command: str
    dry: bool
    found: Sequence[PartResult]

    @property
    def failures(self) -> list[Row]:
        """All that failed."""
        return [row for part in self.found for row in part.rows if row.state == "failed"]

    def figures(self, what: str) -> Figures:
        """Of the row of that name in any part; empty where there is none."""
        return next((row.figures for part in self.found for row in part.rows if row.what == what), {})

    def as_json(self) -> dict[str, Any]:
        """Everything, of builtin types."""
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
        """A heading, a line that says on what and when, and one table of all rows."""
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
        """How many rows passed, failed and were not run, in how long."""
        states = [row.state for found in self.found for row in found.rows]
        counts = [f"{states.count(state)} {state}" for state in ("passed", "failed", "not run") if state in states]
        seconds = sum(found.seconds for found in self.found)
        return f"{plural(len(states), 'row')} in {seconds:.0f} s: {', '.join(counts)}."


def cell(text: str) -> str:
    """`text` on one line, without what ends a cell."""
    return " ".join(text.split()).replace("|", "\\|")
