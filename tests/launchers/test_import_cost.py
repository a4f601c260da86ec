"""Nothing slow is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys


def test_launching_imports_neither_torch_nor_ray():
    code = "import sys, moesys.launchers.launch, moesys.launchers.local; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
