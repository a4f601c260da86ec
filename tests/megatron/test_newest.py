"""The plug-in's tests once more, with the newest megatron-core that it is made for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from early import Command, Early

RELEASE = "0.19.2"

FOLDER = Path(os.environ.get("MOESYS_MEGATRON_NEWEST", Path(sys.prefix) / f"megatron-core-{RELEASE}"))
"""Where `make test` puts it; a variable of the environment may name another place."""

HERE = Path(__file__).parent

FILES = ("test_fields.py", "test_arguments.py", "test_router.py", "test_gpt_model.py", "test_scripts.py")


def newest(_: Path) -> Command:
    """The files' tests, with that release before the installed one."""
    # Its source has escape sequences that Python warns of when it is compiled.
    words = [sys.executable, "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider"]
    return Command([*words, *(str(HERE / f) for f in FILES)], environment(), HERE.parents[1])


def environment() -> dict[str, str]:
    """In which that release is found first."""
    path = os.pathsep.join([str(FOLDER), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


EARLY = {"test_with_the_newest_release": newest}


def test_with_the_newest_release(early: Early) -> None:
    assert (FOLDER / "megatron/core").is_dir(), (
        f"megatron-core {RELEASE} is not in {FOLDER}\n    remedy: make test, which unpacks it there"
    )
    check = "from megatron.core.package_info import __version__; print(__version__)"
    words = [sys.executable, "-W", "ignore", "-c", check]
    named = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert named.stdout.strip().startswith(RELEASE), named.stdout + named.stderr
    found, _ = early.result("test_with_the_newest_release")
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert " passed" in found.stdout or "[100%]" in found.stdout
