"""The link model: recovered from noisy points, predictions of byte matrices, its file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moesys.measure.a2a_benchmark import traffic
from moesys.measure.explain.link_load import limits
from moesys.measure.predict.links import LinkModel, Profile, ProfileError, fit


def test_a_noisy_line_is_recovered_from_small_and_large_messages() -> None:
    draw = random.Random(0)
    points = [(2.0**n, (50e-6 + 2.0**n / 2e9) * draw.uniform(0.95, 1.05)) for n in range(10, 31) for _ in range(3)]
    line = fit(points)
    assert line.alpha == pytest.approx(50e-6, rel=0.05)
    assert line.bandwidth == pytest.approx(2e9, rel=0.05)
    assert line.error < 0.05
    assert line.worst < 0.12
    assert (line.smallest, line.largest) == (2.0**10, 2.0**30)


@pytest.mark.parametrize("points", [[(100, 2.0)], [(100, 3.0), (200, 2.0)], [(100, 1.0), (300, 9.0)]])
def test_neither_latency_nor_bandwidth_is_negative(points: list[tuple[float, float]]) -> None:
    line = fit(points)
    assert line.alpha >= 0
    assert line.per_byte >= 0


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        fit([])


def line(alpha: float, bandwidth: float) -> LinkModel:
    return LinkModel(alpha, 1 / bandwidth, 0.01, 0.02, 1, 1e9)


LINKS = Profile({"all_to_all intra": line(0, 100), "all_to_all inter": line(1, 10), "all_reduce inter": line(0, 5)}, {})


def test_an_exchange_takes_as_long_as_its_slowest_link() -> None:
    sent = [[9, 1, 2, 3], [1, 9, 4, 5], [0, 0, 9, 300], [0, 0, 0, 9]]
    nodes = ["a", "a", "b", "b"]
    assert limits(sent, nodes) == (300, 2 + 3 + 4 + 5)
    assert LINKS.exchange(sent, nodes) == pytest.approx(3.0)
    assert LINKS.faster(2).exchange(sent, nodes) == pytest.approx(3.0)
    sent[2][3] = 0
    assert LINKS.exchange(sent, nodes) == pytest.approx(1 + 14 / 10)
    assert LINKS.faster(2).exchange(sent, nodes) == pytest.approx(1 + 14 / 20)
    assert LINKS.exchange([[5]], ["a"]) == 0


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(ProfileError, match=r"no 'all_gather intra'.*moesys bench a2a"):
        LINKS.collective("all_gather", 10, ["a", "a"])
    assert LINKS.collective("all_reduce", 10, ["a", "b"]) == pytest.approx(2)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    Profile(LINKS.lines, {"backend": "gloo", "hosts": ["a", "b"]}).save(path)
    assert Profile.load(path) == Profile(LINKS.lines, {"backend": "gloo", "hosts": ["a", "b"]})
    line = "{alpha: ALPHA, per_byte: 0, error: 0, worst: 0, smallest: 1, largest: 2}"
    damaged = {
        b"lines: 3": "",
        b"\xff\xfe": "",
        b"[" * 1000: "",
        f"lines: {{all_to_all intra: {line.replace('ALPHA', '-1')}}}".encode(): "alpha is -1",
        f"lines: {{x: {line.replace('ALPHA', '.nan')}}}".encode(): "alpha is nan",
    }
    for content, said in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ProfileError, match=rf"(?s){said}.*remedy: write one: moesys bench a2a"):
            Profile.load(path)
    with pytest.raises(ProfileError, match="No such file"):
        Profile.load(tmp_path / "absent.yaml")


def test_uneven_traffic_has_the_bytes_it_should(tmp_path: Path) -> None:
    assert traffic.even(4, 64, 4) == [[16] * 4] * 4
    assert traffic.zipf(3, 110, 1, 1.0) == [[60, 30, 20]] * 3
    path = tmp_path / "bytes.txt"
    path.write_text("# from, to\n0, 30\n10 0\n")
    assert traffic.read(path, 2) == [[0, 30], [10, 0]]
    assert traffic.scaled([[0, 30], [10, 0]], 120, 4) == [[0, 120], [40, 0]]
    for text, rule in (("1 2 3\n", "write 2 × 2"), ("1 x\n2 3\n", "whole numbers"), ("0 0\n0 0\n", "must be above 0")):
        path.write_text(text)
        with pytest.raises(traffic.TrafficError, match=rule):
            traffic.read(path, 2)
