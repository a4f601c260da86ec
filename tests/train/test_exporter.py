"""Metrics as Prometheus' own parser reads them."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesys.errors import MoesysError
from moesys.train.exporter import Exporter


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read(port: int) -> dict[str, tuple[dict[str, str], float]]:
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {s.name: (s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples}


def test_the_latest_metrics_are_served_and_then_no_longer(port: int) -> None:
    exporter = Exporter("tiny", port, "127.0.0.1")
    exporter.tell({"loss": 3.5, "seconds/exposed all-to-all": 0.25, "step": 3})
    exporter.tell({"loss": 3.25, "step": 4})
    assert read(port) == {
        "moesys_loss": ({"run": "tiny"}, 3.25),
        "moesys_seconds_exposed_all_to_all": ({"run": "tiny"}, 0.25),
        "moesys_step": ({"run": "tiny"}, 4.0),
    }
    with pytest.raises(
        MoesysError, match=rf"metrics_port: 127.0.0.1:{port}: address already in use\n    remedy: choose another port"
    ):
        Exporter("other", port, "127.0.0.1")
    exporter.close()
    with pytest.raises(OSError):
        read(port)
