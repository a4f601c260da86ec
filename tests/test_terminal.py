"""The command as a process: terminals that are not UTF-8, Ctrl-C at any moment, and no noise."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from moesys import terminal

ROOT = Path(__file__).parents[1]


def moesys(*words: str, path: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """`moesys WORDS` in a process of its own, `path` before everything else that Python imports from."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), **env}
    return subprocess.run([sys.executable, "-m", "moesys", *words], env=environment, capture_output=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_characters_gets_others(encoding: str) -> None:
    done = moesys("launch", str(ROOT / "configs/quickstart.yaml"), "--dry-run", PYTHONIOENCODING=encoding)
    text = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "+----" in text or "-----" in text
    assert not set("…─│") & set(text)


def test_every_character_of_a_table_has_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.forgive()
    table = Table("α … 3 × 4 · 5 ± 1 µs")
    table.add_row("loss → \udcff ⠋ 漢")
    Console(width=60).print(table)
    sys.stdout.flush()
    shown = raw.getvalue().decode("ascii")
    assert "alpha ... 3 x 4 . 5 +- 1 us" in shown and "loss -> ? * ?" in shown


def test_files_are_utf8_in_every_locale(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    base = ROOT / "configs/quickstart.yaml"
    path.write_text(f"# größer, 漢\ninclude: {base}\nlaunch: {{env: {{GREETING: Grüße}}}}\n", encoding="utf-8")
    done = moesys("config", str(path), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"GREETING: Gr??e" in done.stdout
    assert "GREETING: Grüße".encode() in moesys("config", str(path), PYTHONIOENCODING="utf-8").stdout


INTERRUPTED = "import os, signal\n"
KILL = "os.kill(os.getpid(), signal.SIGINT)\n"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("argparse", KILL),
        ("yaml", KILL),
        ("yaml", f"try:\n    {KILL}except BaseException:\n    raise ImportError('initialisation failed') from None\n"),
        ("yaml", f"class Dying:\n    def __del__(self):\n        {KILL}Dying()\n{KILL}"),
    ],
)
def test_ctrl_c_while_python_imports_is_no_traceback(tmp_path: Path, module: str, code: str) -> None:
    (tmp_path / f"{module}.py").write_text(INTERRUPTED + code)
    done = moesys("config", str(ROOT / "configs/quickstart.yaml"), path=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_torchs_profiler_is_silent() -> None:
    """It otherwise prints lines of its own ("USDT: … profiler_start") between those of `moesys bench layer`."""
    code = (
        "from moesys.cli import main\nmain(['config', '--schema'])\n"
        "import torch\nfrom moesys.measure.peak_memory import peak_bytes\n"
        "print(peak_bytes(lambda: torch.ones(99) + 1, torch.device('cpu')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
