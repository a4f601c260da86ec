"""Processes for proofs and benchmarks: how their failures are told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from moesys.errors import DataError, LaunchError
from moesys.train import here


def failing(rank: int, world: int, how: str, folder: str) -> None:
    """End as `how` says, rank 1 first."""
    if rank == 0:
        signal.pause()
    if how == "user":
        raise DataError("there is no text")
    if how == "bug":
        raise KeyError("x")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("user", 2, r"^process 1 failed: there is no text$"),
        ("bug", 1, r"^process 1 failed: KeyError: 'x'\nTraceback "),
        ("kill", 1, r"^process 1 was killed by SIGKILL$"),
    ],
)
def test_a_failure_is_told_in_a_sentence(how, code, told, tmp_path: Path):
    with pytest.raises(LaunchError, match=told) as raised, here.started(failing, 2, how):
        pass
    assert raised.value.exit_code == code
