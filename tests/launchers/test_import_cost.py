"""Nothing slow is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

CONFIG = "from moesys.cli import main; main(['config', 'configs/quickstart.yaml'])"


def last_line(code: str) -> str:
    """The last line that a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_launching_imports_neither_torch_nor_ray():
    code = "import sys, moesys.launchers.launch, moesys.launchers.local; print({'torch', 'ray'} & set(sys.modules))"
    assert last_line(code) == "set()"


def test_checking_a_file_imports_nothing_slow():
    """Nor does it parse the source for the meanings of keys."""
    slow = "{'torch', 'ray', 'numpy', 'rich', 'moesys.config.meanings'}"
    assert last_line(f"import sys; {CONFIG}; print({slow} & set(sys.modules))") == "set()"
