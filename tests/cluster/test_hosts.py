"""Two emulated hosts on one machine, with a slow link between them: what crosses it, when, and how it fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from support import changed

from moesys.cli import main
from moesys.config.load import dump, load
from moesys.launchers.hosts import Hosts, HostWorkers, unavailable
from moesys.launchers.launch import run
from moesys.launchers.lock import locked
from moesys.launchers.progress import LiveDisplay
from moesys.launchers.spec import RunSpec
from moesys.launchers.stop import StopRequests

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

GBIT = 0.2

TWO_HOSTS = {
    "cluster": {"nodes": 2, "ranks_per_node": 2},
    "launch": {"launcher": "hosts", "link_gbit": GBIT, "timeout_s": 60.0},
    "parallel": {"ep": 4},
    "train": {"global_batch": 8, "micro_batch": 1},
}


@pytest.fixture
def config(small: dict, tmp_path: Path) -> Path:
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump(changed(small, TWO_HOSTS, {"output": {"runs": str(tmp_path / "runs")}})))
    return path


def names() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_hosts_reach_each_other_and_leave_nothing() -> None:
    with Hosts(2) as hosts:
        ping = ["ip", "netns", "exec", hosts.namespace(0), "ping", "-c1", "-W60", hosts.address(1)]
        reached = subprocess.run(ping, capture_output=True).returncode if _has_ping() else 0
        assert hosts.namespace(1) in names()
        made = hosts.namespace(0)
    assert reached == 0
    assert made not in names()


KEPT = """
import sys
from moesys.launchers.hosts import Hosts
with Hosts(2) as hosts:
    print(hosts.namespace(0), flush=True)
    sys.stdin.read()
"""


def test_the_next_start_of_any_kind_removes_the_hosts_of_a_killed_launch(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KEPT]
    killed = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    made = killed.stdout.readline().strip()
    bridge = made.removesuffix("h0")
    killed.kill()
    killed.wait()
    assert made in names() and bridge in links()
    with locked(tmp_path / "run"):
        assert bridge not in names() and bridge not in links()
    killed.communicate()


def links() -> str:
    return subprocess.run(["ip", "link"], capture_output=True, text=True).stdout


def _has_ping() -> bool:
    return subprocess.run(["which", "ping"], capture_output=True).returncode == 0


def crossed(hosts: Hosts, host: int) -> int:
    """Bytes that a host has sent through its link."""
    inside = ["ip", "netns", "exec", hosts.namespace(host)]
    counted = subprocess.run(
        [*inside, "ip", "-s", "-j", "link", "show", "dev", "eth0"], capture_output=True, check=True
    )
    return json.loads(counted.stdout)[0]["stats64"]["tx"]["bytes"]


SEND = """
import socket, sys, threading
server = socket.create_server((sys.argv[1], 0))
def take():
    with server.accept()[0] as taken:
        while taken.recv(2**20): pass
thread = threading.Thread(target=take); thread.start()
with socket.create_connection(server.getsockname()) as sender:
    sender.sendall(bytes(2**20))
thread.join()
"""


def test_what_stays_inside_a_host_does_not_cross_its_link() -> None:
    with Hosts(2, GBIT) as hosts:
        inside = ["ip", "netns", "exec", hosts.namespace(0)]
        shown = subprocess.run([*inside, "tc", "qdisc", "show", "dev", "eth0"], capture_output=True, text=True).stdout
        assert f"rate {round(GBIT * 1000)}Mbit" in shown
        subprocess.run([*inside, sys.executable, "-c", SEND, hosts.address(0)], check=True)
        assert crossed(hosts, 0) < 2**16


def test_a_slow_link_is_measured_and_becomes_a_line(config: Path, tmp_path: Path, capsys) -> None:
    found, profile = tmp_path / "a2a.json", tmp_path / "links.yaml"
    words = ["--collectives", "send_recv", "--groups", "intra", "inter", "--min", "256K", "--max", "4M"]
    files = ["--json", str(found), "--profile", str(profile)]
    assert main(["bench", "a2a", str(config), *words, "--iterations", "3", *files]) == 0
    results = json.loads(found.read_text())["results"]
    assert {(r["group"], r["size"]) for r in results} == {(g, 2**s) for g in ("intra", "inter") for s in (18, 20, 22)}
    (largest,) = [r for r in results if (r["group"], r["size"]) == ("inter", 2**22)]
    # Both ranks of a node send to the other node at once, through one link.
    assert largest["limiting_bytes"] == 2 * 2**22 and largest["transfer_us"] > 0
    assert yaml.safe_load(profile.read_text())["lines"].keys() == {"send_recv inter", "send_recv intra"}
    assert "send_recv, inter groups of 2" in capsys.readouterr().out


def test_hierarchical_dispatch_sends_half_of_the_bytes_between_nodes(config: Path, tmp_path: Path) -> None:
    """Of four experts for each token two are on the other node: two rows cross, or one."""
    found = tmp_path / "dispatch.json"
    words = ["--dispatch", "all_to_all", "hierarchical", "--tokens", "512", "--hidden", "64", "--top-k", "4"]
    words += ["--iterations", "1", "--warmup", "0", "--json", str(found)]
    assert main(["bench", "a2a", str(config), "model.moe.experts=8", *words]) == 0
    flat, hierarchical = json.loads(found.read_text())["results"]
    assert flat["limiting_bytes"] / hierarchical["limiting_bytes"] == pytest.approx(2.0, rel=0.05)


def started(config: Path, tmp_path: Path, program: str, *changes: str) -> tuple[HostWorkers, RunSpec]:
    """Workers of that configuration on hosts, not started, which will run a program of the tests."""
    spec = RunSpec.of(load(config, changes).config, tmp_path / "runs" / "run")
    spec.run_dir.mkdir(parents=True)
    (spec.run_dir / "config.yaml").write_text(dump(spec.config))
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "launchers")]
    env = {**spec.env, "PYTHONPATH": os.pathsep.join([spec.env["PYTHONPATH"], *tests])}
    spec = replace(spec, env=env)
    return HostWorkers(spec, [sys.executable, "-m", "moesys.train.rank", program, str(spec.run_dir)]), spec


def test_shared_experts_start_while_tokens_travel(config: Path, tmp_path: Path) -> None:
    changes = ["model.moe.shared_experts=1", "model.layers=1", "train.global_batch=4"]
    workers, spec = started(config, tmp_path, "overlap_program", *changes)
    with StopRequests() as stop, LiveDisplay(spec.run_dir, Console(file=io.StringIO())) as progress:
        outcome = run(workers, spec, progress, stop)
    assert outcome.exit_code == 0, outcome
    for rank in range(4):
        found = json.loads((spec.run_dir / f"rank-{rank}.json").read_text())
        during = {}
        for overlap, facts in found.items():
            (start,) = facts["starts"]
            during[overlap] = {e["part"] for e in facts["events"] if e["begin"] < start < e["waited"]}
        assert during == {"True": {"dispatch"}, "False": set()}
        parts = [[e["part"] for e in facts["events"]] for facts in found.values()]
        assert parts[0] == parts[1] and {"dispatch", "combine"} <= set(parts[0])


class Cutter(LiveDisplay):
    """Cuts the link of the second host once workers take steps."""

    hosts: Hosts
    done = False

    def refresh(self) -> None:
        super().refresh()
        if self.step and not self.done:
            self.done = True
            inside = ["ip", "netns", "exec", self.hosts.namespace(1)]
            subprocess.run([*inside, "ip", "link", "set", "eth0", "down"], check=True)


def test_a_cut_link_is_told_as_such(config: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MOESYS_TOY", "wait")
    monkeypatch.setenv("MOESYS_TOY_TIMEOUT", "8")
    changes = ["cluster.ranks_per_node=1", "parallel.ep=2", "launch.timeout_s=8"]
    workers, spec = started(config, tmp_path, "toy_worker", *changes)
    with StopRequests() as stop, Cutter(spec.run_dir, Console(file=io.StringIO())) as progress:
        progress.hosts = workers.hosts
        outcome = run(workers, spec, progress, stop)
    assert progress.done and outcome.exit_code == 1
    told = "all 2 ranks run, and waited 8 s for each other (launch.timeout_s): the network between "
    assert outcome.message.startswith(f"{told}10.213.0.1, 10.213.0.2 is cut or too slow"), outcome.message
    assert "\n  rank 1: step " in outcome.message
