"""Processes that are started and ended together, and the port they meet at."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from moesys.launchers.port import KERNEL_RANGE, ReservedPort, is_free
from moesys.launchers.processes import ExitStatus, Processes

SLEEP = "import time; time.sleep(60)"


def start(tmp_path: Path, code: str, count: int = 1) -> Processes:
    environments = [{**os.environ, "NUMBER": str(number)} for number in range(count)]
    return Processes([sys.executable, "-c", code], environments, [tmp_path / f"{n}.log" for n in range(count)])


def wait_for_end(processes: Processes, count: int) -> dict[int, ExitStatus]:
    while len(processes.ended()) < count:
        time.sleep(0.01)
    return processes.ended()


def test_ends_are_told_apart(tmp_path):
    code = "import os, signal; n = int(os.environ['NUMBER']); n < 2 and exit(n * 3); os.kill(0, signal.SIGKILL)"
    processes = start(tmp_path, code, 3)
    ended = wait_for_end(processes, 3)
    processes.end()
    assert ended == {0: ExitStatus(0), 1: ExitStatus(3), 2: ExitStatus(137, signal.SIGKILL)}
    assert str(ended[1]) == "exited with code 3"
    assert str(ended[2]) == "was killed by SIGKILL"
    assert processes.ended() == ended


def test_output_goes_to_the_log(tmp_path):
    processes = start(tmp_path, "import os, sys; print('out', flush=True); os.write(2, b'err')")
    wait_for_end(processes, 1)
    processes.end()
    assert (tmp_path / "0.log").read_text() == "out\nerr"


def test_what_a_process_started_ends_with_it(tmp_path):
    child = tmp_path / "child"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
    code += f"open({str(child)!r}, 'w').write(str(p.pid)); exit(1)"
    processes = start(tmp_path, code)
    wait_for_end(processes, 1)
    pid = int(child.read_text())
    os.kill(pid, 0)
    processes.end()
    deadline = time.monotonic() + 600
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG_S = 600.0
"""A grace that ends on no machine before a process that hears SIGTERM."""


def test_ending_is_gentle_first_and_harmless_twice(tmp_path):
    processes = start(tmp_path, SLEEP, 2)
    processes.end(LONG_S)
    processes.end(LONG_S)
    assert {end.signal for end in processes.ended().values()} == {signal.SIGTERM}


def on_sigterm(tmp_path: Path, handler: str) -> Processes:
    """Two processes that have set this handler."""
    code = f"import os, signal; from pathlib import Path; signal.signal(signal.SIGTERM, {handler}); "
    code += f"Path({str(tmp_path)!r}, 'set-' + os.environ['NUMBER']).touch(); {SLEEP}"
    processes = start(tmp_path, code, 2)
    while len(list(tmp_path.glob("set-*"))) < 2:
        time.sleep(0.01)
    return processes


def test_who_hears_sigterm_ends_by_itself(tmp_path):
    processes = on_sigterm(tmp_path, "lambda *_: os._exit(3)")
    processes.end(LONG_S)
    assert set(processes.ended().values()) == {ExitStatus(3)}


def test_who_is_deaf_to_sigterm_is_killed_after_the_grace(tmp_path):
    processes = on_sigterm(tmp_path, "signal.SIG_IGN")
    processes.end(0.1)
    assert set(processes.ended().values()) == {ExitStatus(137, signal.SIGKILL)}


def test_a_missing_program_is_an_exit_not_a_hang(tmp_path):
    processes = Processes(["/no/such/program"], [dict(os.environ)], [tmp_path / "log"])
    ended = wait_for_end(processes, 1)
    processes.end()
    assert ended[0].code == 1 and "No such file" in (tmp_path / "log").read_text()


def test_a_reserved_port_is_nobody_elses():
    ports = [ReservedPort() for _ in range(50)]
    assert len({port.number for port in ports}) == 50
    below = int(KERNEL_RANGE.read_text().split()[0])
    assert all(20000 <= port.number < max(below, 21000) for port in ports)
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports[0].number))
        server.listen()
        assert not is_free(ports[0].number)
    for port in ports:
        port.close()
