"""What a killed process leaves, and that only it is removed."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moesys import leftovers
from moesys.errors import FileError
from moesys.files import read_json, write_json
from moesys.launchers.lock import locked
from moesys.leftovers import OwnedResources, Owner

OWNER = """
import subprocess, sys
from pathlib import Path
from moesys import leftovers
leftovers._root = lambda: Path(sys.argv[1])
owned = leftovers.OwnedResources("ray")
owned.claim(Path(sys.argv[2]))
child = subprocess.Popen(["sleep", "600"], env=owned.environment)
print(owned.path, child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(leftovers, "_root", lambda: tmp_path / "root")
    return tmp_path / "root"


def kinds() -> list[str]:
    return sorted(path.name.partition("-")[0] for path in leftovers.root().iterdir())


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_next_start_removes_what_sigkill_left_and_nothing_else(tmp_path: Path, own_root: Path) -> None:
    claimed = tmp_path / "runs" / "ray"
    words = [sys.executable, "-c", OWNER, str(own_root), str(claimed)]
    killed = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path, child = killed.stdout.readline().split()
    (claimed / "kept.txt").touch()
    living = OwnedResources("bench")
    leftovers.remove()
    assert Path(path).is_dir() and claimed.is_dir() and runs(int(child))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert Path(path).is_dir() and claimed.is_dir() and runs(int(child))
    with locked(tmp_path / "run"):  # as `launch` and `sweep` start
        pass
    assert not Path(path).exists() and not claimed.exists()
    assert kinds() == ["bench"]
    assert not runs(int(child))
    killed.communicate()
    living.remove()
    assert kinds() == []


def test_folders_are_private(tmp_path: Path) -> None:
    owned = OwnedResources("ray")
    assert stat.S_IMODE(owned.path.stat().st_mode) == stat.S_IMODE(leftovers.root().stat().st_mode) == 0o700
    leftovers.root().chmod(0o777)
    assert stat.S_IMODE(leftovers.root().stat().st_mode) == 0o700
    owned.remove()


def test_what_is_not_ours_in_that_place_is_refused(own_root: Path) -> None:
    own_root.symlink_to("/")
    with pytest.raises(FileError, match="is not a folder of this user\n    remedy: have it removed"):
        leftovers.root()


def test_a_number_in_use_again_is_another_process() -> None:
    here = Owner.here()
    assert not here.is_dead()
    assert replace(here, start="1").is_dead()
    assert replace(here, boot="before").is_dead()
    assert not replace(here, host="elsewhere", boot="before").is_dead()
    assert not replace(here, space="pid:[1]", start="1").is_dead()
    assert replace(here, pid=2**22 + 1).is_dead()


def test_who_cannot_be_looked_at_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Owner.here()

    def refuse(*_: object, **__: object) -> str:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert not here.is_dead() and not replace(here, start="1").is_dead()


def test_a_folder_that_another_took_over_is_left_to_it(tmp_path: Path) -> None:
    first, second = OwnedResources("ray"), OwnedResources("ray")
    first.claim(tmp_path / "shared")
    second.claim(tmp_path / "shared")
    first.remove()
    assert (tmp_path / "shared").is_dir()
    second.remove()
    assert not (tmp_path / "shared").exists()


def test_damaged_marks_are_left_alone(tmp_path: Path) -> None:
    owned = OwnedResources("ray")
    mark = owned.path / leftovers.MARK
    dead = read_json(mark, "") | {"owner": {}}
    for text in ("", "[]", "{}", '{"owner": 3}', '{"owner": {"pid": 1}}'):
        mark.write_text(text)
        leftovers.remove()
    write_json(mark, dead)
    leftovers.remove()
    assert owned.path.is_dir()


def test_temporary_folders_end_with_their_block(tmp_path: Path) -> None:
    with leftovers.temporary("bench-", tmp_path) as folder, leftovers.temporary("proof") as own:
        assert folder.parent == tmp_path and own.parent == leftovers.root()
    assert not folder.exists() and not own.exists() and kinds() == []
