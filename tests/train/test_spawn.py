"""Processes for proofs and benchmarks: how their failures are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from sabotage import failing

from moesys.errors import LaunchError
from moesys.train import spawn


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("user", 2, r"^process 1 failed: there is no text$"),
        ("bug", 1, r"^process 1 failed: KeyError: 'x'\nTraceback "),
        ("kill", 1, r"^process 1 was killed by SIGKILL$"),
    ],
)
def test_a_failure_is_told_in_a_sentence(how, code, told, tmp_path: Path):
    with pytest.raises(LaunchError, match=told) as raised, spawn.processes(failing, 2, how):
        pass
    assert raised.value.exit_code == code
