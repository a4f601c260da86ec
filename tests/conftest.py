"""Shared fixtures: a small real text, and a small configuration that trains on it."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import early as commands
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests start many processes on few cores


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "write what steps do to tests/distributed/budgets.json, instead of comparing"
    parser.addoption("--write-budgets", action="store_true", help=what)


EARLY = pytest.StashKey[commands.Early]()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[EARLY] = commands.begin(session)


def pytest_unconfigure(config: pytest.Config) -> None:
    if EARLY in config.stash:
        config.stash[EARLY].close()


@pytest.fixture(autouse=True)
def collectives_are_waited_for() -> Iterator[None]:
    """A test waits for every collective that it starts: torch would only warn, when the process ends."""
    before = _collectives()
    yield
    assert _collectives() <= before, "a collective was started and not waited for"


def _collectives() -> int:
    """How many collectives this process has started and not waited for."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    return 0 if c10d is None else c10d._get_work_registry_size()


@pytest.fixture(scope="session")
def early(pytestconfig: pytest.Config) -> commands.Early:
    """The results of long commands, which run beside the tests; see `early.py`."""
    return pytestconfig.stash[EARLY]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some of the standard library's sources."""
    folder = tmp_path_factory.mktemp("text")
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "heapq"):
        (folder / f"{name}.py").write_text((root / f"{name}.py").read_text())
    return folder


@pytest.fixture(scope="session")
def small(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A configuration with a small MoE model, as a mapping to change and validate."""
    cache = tmp_path_factory.mktemp("cache")
    return {
        "seed": 1,
        "model": {
            "hidden": 64,
            "layers": 4,
            "attention": {"heads": 4, "kv_heads": 2},
            "moe": {"experts": 4, "top_k": 2, "ffn_hidden": 32, "balance_loss": 0.02, "z_loss": 0.001},
        },
        "train": {"seq_len": 16, "global_batch": 8, "micro_batch": 1, "optimizer": {"lr": 1e-3, "clip": 0.5}},
        "data": {"kind": "text", "path": str(text), "heldout": 0.2, "cache": str(cache)},
        "cluster": {"device": "cpu"},
        "launch": {"timeout_s": 120.0},
    }
