"""Where the kernels' tests run: every implementation on CPU, on CUDA where there is one, Triton's interpreted on CPU.

Triton decides at import whether it interprets, so that the interpreted cases run in a process of their
own, which `test_interpreted.py` starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moesys.kernels import choose

PLACES = ("reference-cpu", "torch-cpu", "triton-cpu", "reference-cuda", "torch-cuda", "triton-cuda")


def _skip_unless_runnable(implementation: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if implementation != "triton":
        return
    pytest.importorskip("triton")
    if choose.interpreted() != (device == "cpu"):
        pytest.skip("Triton decides at import whether it interprets: test_interpreted.py runs these on CPU")


def _forced(place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    implementation, device = place.split("-")
    _skip_unless_runnable(implementation, device)
    monkeypatch.setenv(choose.VARIABLE, implementation)
    choose.forget()
    yield device
    choose.forget()


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device to test on, with one implementation of the kernels forced."""
    yield from _forced(request.param, monkeypatch)


@pytest.fixture(params=[place for place in PLACES if not place.startswith("reference")])
def fast_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`device` without the definitions: of what they leave to autograd."""
    yield from _forced(request.param, monkeypatch)


@pytest.fixture(params=["triton-cpu", "triton-cuda"])
def triton_device(request: pytest.FixtureRequest) -> str:
    """The device to call Triton's kernels on directly."""
    implementation, device = request.param.split("-")
    _skip_unless_runnable(implementation, device)
    return device


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No implementation forced; to set one, set the variable and `forget`."""
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    choose.forget()
    yield monkeypatch
    monkeypatch.undo()
    choose.forget()
