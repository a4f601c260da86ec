"""The budgets of what a step does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from budgets import Budgets


@pytest.fixture(scope="session")
def budgets(pytestconfig: pytest.Config) -> Iterator[Budgets]:
    """The written budgets; with --write-budgets they are written anew."""
    found = Budgets(pytestconfig.getoption("--write-budgets"))
    yield found
    found.save()
