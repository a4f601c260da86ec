"""Runs this folder's tests of Triton kernels in a process whose Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from moesys.kernels import choose


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(choose.interpreted(), reason="Triton interprets in this very process")
def test_triton_kernels_interpreted_on_cpu():
    triton = pytest.importorskip("triton")
    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        pytest.skip("before 3.7 Triton's interpreter has no loops under NumPy 2.4")
    command = [Path(sys.executable).with_name("pytest"), "-k", "triton-cpu", "-p", "no:cacheprovider", "--durations=5"]
    result = subprocess.run(
        [*command, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
