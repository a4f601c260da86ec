"""Two pretended hosts on one machine, with a slow link between them: what the measurements say of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import yaml
from support import changed

from moesys.cli import main
from moesys.launchers.hosts import Hosts, unavailable
from moesys.launchers.lock import locked
from moesys.measure.explain import explain
from moesys.measure.explanation import Breakdown
from moesys.measure.step import read_steps

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


def test_hierarchical_dispatch_is_faster_by_what_it_does_not_send_between_nodes(config: Path, tmp_path: Path) -> None:
    """Of four experts for each token two are on the other node: two rows cross, or one.

    In eight chunks: gloo lets two ranks send to each other at the same time only if several messages are under way.
    """
    found = tmp_path / "dispatch.json"
    words = ["--dispatch", "all_to_all", "hierarchical", "--tokens", "512", "--hidden", "512", "--top-k", "4"]
    changes = ["parallel.dispatch.chunks=8", "model.moe.experts=8"]
    factors = []
    for _ in range(5):
        assert main(["bench", "a2a", str(config), *changes, *words, "--iterations", "7", "--json", str(found)]) == 0
        flat, hierarchical = json.loads(found.read_text())["results"]
        predicted = flat["limiting_bytes"] / hierarchical["limiting_bytes"]
        assert predicted == pytest.approx(2.0, rel=0.05)
        factors.append(flat["out_of_place"]["time"] / hierarchical["out_of_place"]["time"] / predicted)
        if median(factors) == pytest.approx(1, rel=0.15):
            return
    pytest.fail(f"measured / predicted factors: {factors}")


def test_overlap_leaves_less_exposed(config: Path, tmp_path: Path) -> None:
    """Shared experts computed while tokens travel, or before. Runs are added while the machine's noise hides it."""
    moe = ["model.moe.shared_experts=1", "model.moe.shared_ffn_hidden=2048", "model.layers=2"]
    train = [
        "train.steps=7",
        "train.seq_len=128",
        "train.eval_sequences=1",
        "measure.every=1",
        "output.tensorboard=false",
    ]
    totals: dict[str, list[Breakdown]] = {"true": [], "false": []}
    for attempt in range(3):
        for overlap, seen in totals.items():
            name = f"overlap-{overlap}-{attempt}"
            changes = [f"parallel.dispatch.overlap_shared={overlap}", f"name={name}"]
            assert main(["launch", str(config), *moe, *train, *changes]) == 0
            seen += [explain([step]).total for step in read_steps(tmp_path / "runs" / name)[1:]]
        exposed = {overlap: median(t.exposed for t in seen) for overlap, seen in totals.items()}
        hidden = {overlap: median(t.hidden for t in seen) for overlap, seen in totals.items()}
        if exposed["true"] < 0.95 * exposed["false"] and hidden["true"] > hidden["false"]:
            return
    pytest.fail(f"seconds exposed {exposed} and hidden {hidden}, with overlap and without")
