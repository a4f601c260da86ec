"""Runs a command that dies with the process that started it, even if that is killed by SIGKILL.

    python -I -S die_with_parent.py PARENT_PID COMMAND ARGUMENTS...

It runs as a file, before anything is imported. It asks the Linux kernel for SIGKILL on the parent's death, and then
becomes the command. On other systems it only becomes the command.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl
        sys.exit(1)
    os.execvp(command[0], command)
