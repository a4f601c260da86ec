"""The contents of a run's folder, for reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.errors import MoesysError
from moesys.files import json_objects
from moesys.measure.explain.averages import explain_run
from moesys.measure.explain.explanation import Explanation
from moesys.measure.predict.links import Profile
from moesys.measure.record.step_files import recorded
from moesys.measure.report.run_files import is_number, loads, profile_of, summary_of


class ReportError(MoesysError):
    """A folder holds nothing to report."""

    exit_code = 2


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder. `explanation` is None without recorded steps."""

    folder: Path
    records: list[dict[str, Any]]
    loads: list[dict[str, Any]]
    summary: dict[str, Any]
    explanation: Explanation | None
    profile: Profile | None

    @classmethod
    def read(cls, folder: Path, summary: dict[str, Any] | None = None, profile: Path | None = None) -> Run:
        """The run in a folder. `summary` replaces its summary.json, `profile` its measure.profile.

        Raises:
            ReportError: there is no run, or it ended before its first step.
        """
        records = list(json_objects(folder / "metrics.jsonl"))
        if not records and (config := folder / "config.yaml").is_file():
            raise ReportError(
                f"{folder}: the run has no step yet: there is nothing to report\n    remedy: moesys launch {config}"
            )
        if not records:
            raise ReportError(f"{folder} holds no metrics.jsonl of a run: give the folder that moesys launch made")
        if summary is None:
            summary = summary_of(folder)
        links = profile_of(profile, summary)
        return cls(folder, records, loads(folder / "load.jsonl"), summary, explain_run(recorded(folder)), links)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric."""
        return [(r["step"], r[key]) for r in self.records if is_number(r.get(key)) and is_number(r.get("step"))]
