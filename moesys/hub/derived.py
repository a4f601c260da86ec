"""What a config.json says of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moesys.errors import Problem


@dataclass
class Derived:
    """What a config.json says of a model.

    Attributes:
        values: dotted keys below "model." and their values.
        read: keys that were understood.
        notes: sentences on what it says that no number of the model hangs on here.
        problems: what would change numbers and cannot be followed; `Problem.key` is theirs.
    """

    values: dict[str, Any] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, key: str, rule: str, remedy: str = "use transformers for this model") -> None:
        """Note that the files' `key` cannot be followed."""
        self.problems.append(Problem(key, rule, remedy))
