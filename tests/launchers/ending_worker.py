"""A worker whose rank 1 ends in the way that MOESYS_TOY names, while rank 0 waits. Imports no torch.

python ending_worker.py RUN_DIR
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from moesys.errors import DataError
from moesys.train import rank


def run(mode: str, run_dir: Path) -> None:
    """End, or wait to be ended."""
    if os.environ["RANK"] == "0":
        time.sleep(600)
    if mode == "user":
        raise DataError("the corpus is empty\n    remedy: give it text")
    if mode == "bug":
        raise KeyError("x")
    if mode == "phrase":
        raise DataError("the server said: connection refused, address already in use")
    if mode == "import":
        import no_such_package  # noqa: F401
    if mode == "memory":
        bytearray(2**62)
    if mode == "disk":
        (run_dir / "logs" / "big").write_bytes(bytes(2**22))
    if mode == "folder":
        run_dir.read_text()
    if mode == "sysexit":
        sys.exit(5)
    if mode == "segv":
        ctypes.string_at(0)
    if mode == "quit":
        print("good bye", flush=True)
        os._exit(7)
    if mode == "143":
        os._exit(143)
    os.kill(os.getpid(), signal.Signals[mode])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank.leave(rank.process(lambda: run(os.environ["MOESYS_TOY"], folder), folder))
