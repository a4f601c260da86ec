"""What a step of each case may do, written in budgets.json: no collective and no wait more, or fewer.

`pytest tests/distributed --write-budgets` writes what was found; its difference is to be read before it is committed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ran import Ran

FILE = Path(__file__).with_name("budgets.json")


class Budgets:
    """The budgets of all cases; with `write`, whatever is checked becomes the budget."""

    def __init__(self, write: bool = False):
        self.write = write
        self.written: dict[str, dict] = json.loads(FILE.read_text()) if FILE.exists() else {}

    def check(self, name: str, ran: Ran) -> None:
        """Fail with every line that is not as written."""
        if self.write:
            self.written[name] = asdict(ran)
            return
        budget = self.written[name]
        lines = [line for kind, found in asdict(ran).items() for line in differences(budget[kind], found)]
        assert not lines, "\n".join([f"{name} did not do what budgets.json says:", *lines])

    def save(self) -> None:
        """Write the file, if that was asked for."""
        if self.write:
            FILE.write_text(json.dumps(self.written, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def differences(budget: dict, found: dict) -> list[str]:
    """A line for each entry that is not the same in both."""
    names = sorted(budget.keys() | found.keys())
    return [
        f"    {name}: {found.get(name, 'none')}, and the budget is {budget.get(name, 'none')}"
        for name in names
        if budget.get(name) != found.get(name)
    ]
