"""Two pretended hosts on one machine, with a slow link between them: what the measurements say of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from support import changed

from moesys.cli import main
from moesys.launchers.hosts import Hosts, unavailable

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
        ping = ["ip", "netns", "exec", hosts.namespace(0), "ping", "-c1", "-W2", hosts.address(1)]
        reached = subprocess.run(ping, capture_output=True).returncode if _has_ping() else 0
        assert hosts.namespace(1) in names()
        made = hosts.namespace(0)
    assert reached == 0
    assert made not in names()


def _has_ping() -> bool:
    return subprocess.run(["which", "ping"], capture_output=True).returncode == 0


def test_a_slow_link_shows_its_rate_between_nodes_and_not_inside(config: Path, tmp_path: Path, capsys) -> None:
    found, profile = tmp_path / "a2a.json", tmp_path / "links.yaml"
    words = ["--collectives", "send_recv", "--groups", "intra", "inter", "--min", "256K", "--max", "4M"]
    assert (
        main(
            ["bench", "a2a", str(config), *words, "--iterations", "5", "--json", str(found), "--profile", str(profile)]
        )
        == 0
    )
    results = {(r["group"], r["size"]): r for r in json.loads(found.read_text())["results"]}
    largest = {group: results[group, 4 * 2**20] for group in ("intra", "inter")}
    rate = {group: r["limiting_bytes"] / (r["transfer_us"] / 1e6) for group, r in largest.items()}
    assert rate["inter"] == pytest.approx(GBIT * 1e9 / 8, rel=0.1)
    assert rate["intra"] > 4 * rate["inter"]
    lines = yaml.safe_load(profile.read_text())["lines"]
    assert 1 / lines["send_recv inter"]["per_byte"] == pytest.approx(GBIT * 1e9 / 8, rel=0.1)
    assert "send_recv, inter groups of 2" in capsys.readouterr().out
