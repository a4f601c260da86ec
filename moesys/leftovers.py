"""Removes what killed processes left: folders, emulated hosts, child processes.

A process that ends in order removes its own resources. One that is killed by SIGKILL cannot. So each resource is noted
beforehand, with its owner, in /tmp/moesys-UID, and every start removes the resources of dead owners. Nothing else is
touched: a process number may belong to another process by now, so the note has the start time of the owner, the boot of
the machine, and the namespace of process numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesys.errors import FileError
from moesys.files import read_json, write_json

MARK = "owner.json"
"""The file in every folder below `root()` that names its owner and its other resources."""

CLAIM = ".owner"
"""The file in a claimed folder elsewhere that names the folder below `root()` that it belongs to."""

VARIABLE = "MOESYS_OWNED"
"""The variable of processes that belong to a folder below `root()`: its path."""


@dataclass(frozen=True)
class Owner:
    """A process, distinct from every other that has or had its number."""

    pid: int
    start: str | None
    """Clock ticks from the machine's boot to the process's start; None if the system does not say."""
    boot: str | None
    space: str | None
    """The namespace of process numbers."""
    host: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(pid, _started(pid), _boot(), _space(), os.uname().nodename)

    def is_dead(self) -> bool:
        """True if it certainly runs no more; False if that cannot be known on this machine."""
        if self.host != os.uname().nodename:
            return False
        if None not in (self.boot, boot := _boot()) and self.boot != boot:
            return True
        if self.space != _space():
            return False
        try:
            if self.start is not None:
                return _started(self.pid) != self.start
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


def _started(pid: int) -> str | None:
    """The start of a running process; None if there is none (or only one that waits to be reaped).

    Raises:
        OSError: the system does not say.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else words[19]


def _boot() -> str | None:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _space() -> str | None:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def root() -> Path:
    """The folder of this user, made if need be, that nobody else can read.

    It is not under $TMPDIR: the next process must find it, and the paths of Unix sockets inside must stay below 107
    characters.

    Raises:
        FileError: something of another user has its name.
    """
    path = _root()
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise FileError(f"{path} is not a folder of this user\n    remedy: have it removed")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)
    return path


def _root() -> Path:
    base = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    return base / f"moesys-{os.getuid()}"


class OwnedResources:
    """A folder of this process, `path`, and the other resources that it would leave if it were killed.

    `kind` begins the folder's name. Resources of dead processes are removed first.
    """

    def __init__(self, kind: str):
        remove()
        self._mark: dict[str, Any] = {"owner": asdict(Owner.here()), "folders": [], "networks": []}
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=root()))
        write_json(new / MARK, self._mark)
        self.path = new.with_name(f"{kind}-{new.name.removeprefix('.new-')}")
        new.rename(self.path)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for processes that belong to this one."""
        return {VARIABLE: str(self.path)}

    def claim(self, folder: Path) -> None:
        """Make `folder`, or take the one that is there, to be removed with all that will be in it."""
        self._note("folders", str(folder.absolute()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CLAIM).write_text(self.path.name)

    def network(self, name: str) -> None:
        """Note emulated hosts that will be made: a bridge `name`, and namespaces with names that begin with it."""
        self._note("networks", name)

    def end_processes(self) -> None:
        """Send SIGKILL to every process that was started with `environment`, and to its children."""
        _end_processes(self.path)

    def remove(self) -> None:
        """Remove all of it. Harmless twice."""
        _clear(self.path, self._mark)

    def _note(self, key: str, value: str) -> None:
        self._mark[key].append(value)
        write_json(self.path / MARK, self._mark)


@contextmanager
def temporary(prefix: str, folder: Path | None = None) -> Iterator[Path]:
    """A new folder inside `folder` (default: this user's own), removed at the end, or after this process's death."""
    owned = OwnedResources(prefix.rstrip("-"))
    try:
        if folder is None:
            yield owned.path
        else:
            made = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
            owned.claim(made)
            yield made
    finally:
        owned.remove()


def remove() -> None:
    """Remove the resources of this user's dead processes. It never fails: what cannot be removed stays."""
    with suppress(OSError):
        if _root().lstat().st_uid == os.getuid():
            for path in sorted(_root().iterdir()):
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    try:
        mark = read_json(path / MARK, "")
        owner = Owner(**mark["owner"])
    except (FileError, KeyError, TypeError):
        return  # another process makes or removes it
    if owner.is_dead():
        _clear(path, mark)


def _clear(path: Path, mark: dict[str, Any]) -> None:
    if not (path / MARK).exists():
        return
    _end_processes(path)
    for name in mark["networks"]:
        remove_network(name)
    for folder in map(Path, mark["folders"]):
        with suppress(OSError):
            if (folder / CLAIM).read_text() == path.name:
                _remove_tree(folder)
    _remove_tree(path)


def _remove_tree(path: Path) -> None:
    """Remove a folder into which processes that are just ending may still write."""
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)


def _end_processes(path: Path) -> None:
    """Send SIGKILL to every process that belongs to `path`."""
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) != os.getpid() and _belongs(process, path):
            with suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)


def _belongs(process: Path, path: Path) -> bool:
    """True if a process, given by its folder in /proc, was started for `path` or has a file open inside.

    Open files are needed as a sign because Ray's agents overwrite their environment with their titles.
    """
    with suppress(OSError):
        if f"{VARIABLE}={path}".encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(descriptor).startswith(f"{path}/"):
                    return True
    return False


def remove_network(name: str) -> None:
    """Remove the bridge `name` and the network namespaces of its hosts, if they exist; links go with them."""
    if shutil.which("ip") is None:
        return
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    for namespace in (line.split()[0] for line in listed.stdout.splitlines() if line.strip()):
        if namespace.startswith(f"{name}h"):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
    # The end of a link in a namespace disappears a moment after the namespace.
    shown = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    for link in re.findall(rf"^\d+: ({re.escape(name)}(?:v\d+)?)[@:]", shown, re.MULTILINE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True)
