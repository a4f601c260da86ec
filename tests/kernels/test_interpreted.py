"""Runs this folder's tests of Triton kernels in a process whose Triton interprets."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy
import pytest
from early import Command

from moesys.kernels import choose


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def interpreted(_: Path) -> Command | None:
    """This folder's tests where Triton interprets; None where it cannot."""
    if choose.interpreted() or importlib.util.find_spec("triton") is None:
        return None
    words = [str(Path(sys.executable).with_name("pytest")), "-k", "triton-cpu", "-p", "no:cacheprovider"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    return Command([*words, "--durations=5", str(Path(__file__).parent)], env, Path(__file__).parents[2])


EARLY = {"test_triton_kernels_interpreted_on_cpu": interpreted}


@pytest.mark.skipif(choose.interpreted(), reason="Triton interprets in this very process")
def test_triton_kernels_interpreted_on_cpu(early):
    triton = pytest.importorskip("triton")
    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        pytest.skip("before 3.7 Triton's interpreter has no loops under NumPy 2.4")
    result, _ = early.result("test_triton_kernels_interpreted_on_cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
