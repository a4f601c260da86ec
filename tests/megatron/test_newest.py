"""The plug-in's tests once more, with the newest megatron-core that it is made for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RELEASE = "0.19.2"

FOLDER = Path(os.environ.get("MOESYS_MEGATRON_NEWEST", Path(sys.prefix) / f"megatron-core-{RELEASE}"))
"""Where `make test` puts it; a variable of the environment may name another place."""

HERE = Path(__file__).parent

FILES = ("test_fields.py", "test_arguments.py", "test_router.py", "test_gpt_model.py", "test_scripts.py")


def test_with_the_newest_release() -> None:
    assert (FOLDER / "megatron/core").is_dir(), (
        f"megatron-core {RELEASE} is not in {FOLDER}\n    remedy: make test, which unpacks it there"
    )
    path = os.pathsep.join([str(FOLDER), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    # Its source has escape sequences that Python warns of when it is compiled.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        *(str(HERE / f) for f in FILES),
    ]
    check = "from megatron.core.package_info import __version__; print(__version__)"
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    named = subprocess.run([sys.executable, "-W", "ignore", "-c", check], env=env, capture_output=True, text=True)
    assert named.stdout.strip().startswith(RELEASE), named.stdout + named.stderr
    found = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert " passed" in found.stdout or "[100%]" in found.stdout
