"""One launch at a time for each run folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesys import leftovers
from moesys.errors import LaunchError
from moesys.launchers import folder


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make `run_dir` and hold its lock, which the end of this process releases. Removes what killed runs left.

    Raises:
        LaunchError: another process holds it.
        FileError: it cannot be made or written to.
    """
    leftovers.remove()
    folder.make(run_dir)
    with (run_dir / "launch.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LaunchError(
                f"{run_dir} is in use: another launch of this run (process {holder}) has not ended\n"
                "    remedy: wait for it or stop it, or give this run another name=NAME"
            ) from None
        except OSError:
            pass  # some clusters' file systems have no locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
