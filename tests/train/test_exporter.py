"""Metrics as Prometheus' own parser reads them, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch.distributed as dist
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from support import changed

from moesys.config.schema import Config
from moesys.errors import MoesysError
from moesys.train import worker
from moesys.train.exporter import Exporter
from moesys.train.metric_table import CAUSES, LATER, METRICS, PARTS, families

DASHBOARD = Path(__file__).parents[2] / "configs" / "grafana-dashboard.json"

UNITS = "ratio seconds nats byte total info second"
"""Last words of names that are units, or stand for one."""

COUNTS = "steps experts layers assignments norm rate imbalance loss"
"""Last words of names of what has no unit."""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def exporter(port: int) -> Iterator[Exporter]:
    exporter = Exporter("tiny", port, "127.0.0.1", {"version": "1", "engine": "native", "parallel": "ep=2"})
    yield exporter
    exporter.close()


def read(port: int) -> dict[str, Family]:
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300).read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(families: dict[str, Family]) -> dict[str, list[tuple[dict[str, str], float]]]:
    samples = (s for family in families.values() for s in family.samples)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for s in samples:
        labels = {name: value for name, value in s.labels.items() if name != "run"}
        assert s.labels["run"] == "tiny"
        found.setdefault(s.name, []).append((labels, s.value))
    return found


def test_the_latest_metrics_are_served_and_then_no_longer(port: int) -> None:
    exporter = Exporter("tiny", port, "127.0.0.1")
    exporter.set_metrics({"loss": 3.5, "seconds/exposed all-to-all": 0.25, "seconds/all-to-all late": 0.2, "step": 3})
    exporter.set_metrics({"loss": 3.25, "step": 4, "z": 2.0, "load_loss": 0.5, "eta_s": 1.0, "of another version": 1.0})
    exporter.set_metrics({"heldout_loss": 3.0})
    exporter.set_load([1, 3], [[4.0, 0.0], [1.0, 3.0]])
    assert values(read(port)) == {
        "moesys_run_info": [({}, 1.0)],
        "moesys_loss_nats": [({}, 3.25)],
        "moesys_heldout_loss_nats": [({}, 3.0)],
        "moesys_step_part_seconds": [({"part": "exposed all-to-all"}, 0.25)],
        "moesys_waiting_seconds": [({"cause": "late"}, 0.2)],
        "moesys_steps_total": [({}, 4.0)],
        "moesys_auxiliary_loss": [({"kind": "z"}, 2.0), ({"kind": "load"}, 0.5)],
        "moesys_expert_assignments": [
            ({"layer": layer, "expert": expert}, count)
            for layer, expert, count in (("1", "0", 4.0), ("1", "1", 0.0), ("3", "0", 1.0), ("3", "1", 3.0))
        ],
        "moesys_layer_imbalance": [({"layer": "1"}, 2.0), ({"layer": "3"}, 1.5)],
    }
    with pytest.raises(
        MoesysError, match=rf"metrics_port: 127.0.0.1:{port}: address already in use\n    remedy: choose another port"
    ):
        Exporter("other", port, "127.0.0.1")
    exporter.close()
    with pytest.raises(OSError):
        read(port)


@pytest.fixture
def everything(exporter: Exporter, port: int) -> dict[str, Family]:
    """What is served when every metric has a value."""
    texts = [f"eval/wiki/{figure}" for figure in ("loss", "bits_per_byte")]
    exporter.set_metrics(dict.fromkeys([*METRICS, *texts, f"{CAUSES}late", f"{PARTS}compute", f"{LATER}1"], 1.0))
    exporter.set_load([0], [[1.0, 1.0]])
    return read(port)


def test_it_is_served_until_the_run_ends(
    small: dict, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the report is drawn, which is the last thing that a run does, and for which no other rank waits."""
    model = {"hidden": 16, "layers": 2, "attention": {"heads": 2, "kv_heads": 2}}
    train = {"steps": 1, "global_batch": 2, "eval_sequences": 2}
    changes = {"name": "tiny", "model": model, "train": train, "measure": {"metrics_port": port}}
    found: list[dict[str, Family]] = []

    def write(*_: Any) -> Path:
        found.append(read(port))
        assert not dist.is_initialized()
        return tmp_path / "report.html"

    monkeypatch.setattr(worker.report, "write", write)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | place).items():
        monkeypatch.setenv(name, value)
    worker.run(Config.model_validate(changed(small, changes)), tmp_path)
    told = values(found[0])
    assert told["moesys_steps_total"] == [({}, 1.0)] and told["moesys_tokens_total"] == [({}, 2.0 * 16)]
    assert sum(count for _, count in told["moesys_expert_assignments"]) == 2 * 2 * 16 * 2
    assert told["moesys_heldout_loss_nats"][0][1] > 0
    with pytest.raises(OSError):
        read(port)


def test_names_types_and_helps_are_as_prometheus_wants_them(everything: dict[str, Family]) -> None:
    """The rules of `promtool check metrics`, and of Prometheus' page on names."""
    assert set(everything) == set(families())
    for name, family in everything.items():
        samples = {s.name for s in family.samples}
        assert re.fullmatch(r"moesys(_[a-z]+)+", name), name
        assert samples == ({f"{name}_total"} if family.type == "counter" else {name})
        assert not name.endswith(("_total", "_count", "_sum", "_bucket")), name
        assert not re.search(r"_(ms|milliseconds|minutes|percent|kb|gauge|counter)(_|$)", name), name
        assert name.rpartition("_")[2] in (UNITS + " " + COUNTS).split() or family.type == "counter", name
        words = family.documentation
        assert words.endswith(".") or name == "moesys_run_info"
        assert len(words) > 15 and words not in METRICS, name
        for sample in family.samples:
            assert {"le", "quantile", "job", "instance"}.isdisjoint(sample.labels)


def test_the_dashboard_shows_what_is_served_and_nothing_else(everything: dict[str, Family]) -> None:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"moesys_[a-z_]+", target["expr"])
    }
    assert asked == {s.name for family in everything.values() for s in family.samples}
    labels = {
        name
        for panel in board["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"{{(\w+)}}", target["legendFormat"])
    }
    assert labels <= {label for family in everything.values() for s in family.samples for label in s.labels}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places) and len({p["id"] for p in board["panels"]}) == len(places)
