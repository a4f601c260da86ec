"""A run folder belongs to one launch at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moesys.errors import LaunchError
from moesys.launchers.lock import locked

HOLD = "import sys, pathlib\nfrom moesys.launchers.lock import locked\n" + (
    "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
)


def test_a_second_launch_is_refused_and_told_by_whom(tmp_path):
    folder = tmp_path / "runs" / "one"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused = pytest.raises(LaunchError, match=rf"in use: another launch of this run \(process {holder.pid}\)")
        with refused, locked(folder):
            pass
        holder.kill()
        holder.wait()
    with locked(folder):  # a launch that was killed holds nothing
        assert (folder / "launch.lock").read_text() == str(os.getpid())
