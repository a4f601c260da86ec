"""The report of a run: its figures, and its look in a browser."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moesys.cli import main
from moesys.launchers.command import command_line
from moesys.measure.explain.explanation import Breakdown
from moesys.measure.predict.links import LinkModel, Profile
from moesys.measure.record.step_files import steps_file
from moesys.measure.report import communication, compare, figures
from moesys.measure.report import run as report
from moesys.measure.report.contents import Run
from moesys.measure.report.facts import bits_per_byte
from moesys.measure.report.figures import COLOURS, SERIES
from moesys.measure.step import CollectiveSpan, RankStep, Step

LAYERS = ("layers.0", "layers.1")


def step(number: int, slow: float, hosts: Sequence[str]) -> Step:
    """Two ranks of 100 ms. Rank 1 comes to each dispatch so many ms after rank 0."""
    ranks = []
    for rank in (0, 1):
        collectives = []
        for i, layer in enumerate(LAYERS):
            begin = (10 + 40 * i + slow * rank) / 1e3
            end = (10 + 40 * i + slow + 5) / 1e3
            there = CollectiveSpan(
                "all_to_all",
                "expert",
                (0, 1),
                2 * i,
                begin,
                begin,
                end,
                2000,
                (800, 1200),
                layer,
                "dispatch",
                False,
                "flat",
            )
            back = CollectiveSpan(
                "all_to_all",
                "expert",
                (0, 1),
                2 * i + 1,
                end + 0.01,
                end + 0.01,
                end + 0.012,
                2000,
                (900, 1100),
                layer,
                "combine",
                False,
                "flat",
            )
            collectives += [there, back]
        ranks.append(RankStep(rank, hosts[rank], 0.0, 0.1, tuple(collectives)))
    return Step(number, tuple(ranks), {layer: [30.0, 10.0] for layer in LAYERS})


def write_run(folder: Path, slow: float, hosts: Sequence[str] = ("a", "a")) -> Path:
    (folder / "measure").mkdir(parents=True)
    steps = [step(n, slow, hosts) for n in (10, 20, 30)]
    steps_file(folder).write_text("".join(s.to_json() + "\n" for s in steps))
    metrics = [
        {"step": n, "loss": 5 - n / 10, "tokens_per_second": 1000, "imbalance": 1.5, "all_to_all_share": 0.2}
        for n in range(1, 31)
    ]
    metrics.append({"step": 30, "heldout_loss": 2.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + '{"cut sh')
    loads = [{"step": n, "load": [[30, 10], [20, 20]]} for n in range(1, 31)]
    (folder / "load.jsonl").write_text("".join(json.dumps(m) + "\n" for m in loads))
    summary = {"unigram_loss": 3.3, "bigram_loss": 2.5, "checkpoint": "/a/long/" * 30, "steps": 30}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "one", 20)


class Balanced(HTMLParser):
    """Fails if a tag is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_figures_are_the_same_everywhere(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", str(run), "--json", str(tmp_path / "x.json"), "--perfetto", str(tmp_path / "p.json")]) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    # In both layers rank 0 waits 20 ms, and everyone's bytes move for 5 + 2 ms.
    assert content["exposed_share"] == pytest.approx((40 + 4 * 7) / 2 / 100)
    assert content["wait_share"] == pytest.approx(40 / (40 + 4 * 7))
    assert content["total"]["exposed"] == pytest.approx(0.034)
    phases = {(phase["layer"], phase["part"]): phase for phase in content["phases"]}
    assert phases["layers.1", "dispatch"]["causes"]["late"] == pytest.approx(0.010)
    assert phases["layers.0", "combine"]["bytes_intra"] == 900 + 1100
    assert content["bytes"] == [[0, 2 * (1200 + 1100)], [2 * (800 + 900), 0]]
    text = (run / "report.html").read_text()
    assert content["sentence"] in text
    assert "rank 1, which arrives late" in text
    assert "<td>34.00</td><td>34.0%</td>" in text
    assert "34.0%" in capsys.readouterr().out
    Balanced().feed(text)


def test_what_moved_is_set_beside_the_links(run: Path, tmp_path: Path) -> None:
    """1,200 bytes at 10⁵ a second take 12 ms; dispatch took 5."""
    links = tmp_path / "links.yaml"
    Profile({"all_to_all intra": LinkModel(0.0, 1e-5, 0.0, 0.0, 1, 1e6)}, {"backend": "gloo"}).save(links)
    text = report.write(run, profile=links).read_text()
    assert '<td data-head="of links">2.40</td></tr>' in text
    assert "fitted bandwidth of all-to-all" in text
    assert "KiB</text>" in text
    assert "math" not in text


def test_nothing_comes_from_a_network_and_nothing_is_unescaped(tmp_path: Path) -> None:
    text = report.write(write_run(tmp_path / "one", 20, hosts=("node<0>", "node<1>"))).read_text()
    links = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text))
    assert not [link for link in links if not link.startswith(("#", "data:"))]
    assert "node<1>" not in text
    assert "node&lt;1&gt;" in text


def test_a_run_without_recorded_steps_has_a_report_too(run: Path) -> None:
    steps_file(run).unlink()
    text = report.write(run).read_text()
    assert "loss, nats per token" in text
    assert "Where a step goes" not in text


def test_two_runs_are_compared(run: Path, tmp_path: Path, capsys) -> None:
    other = write_run(tmp_path / "two", 5)
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    _, rows = compare.steps(Run.read(run), Run.read(other))
    assert ("exposed all-to-all", "34.00", "19.00", "-15.00") in rows
    text = (tmp_path / "both.html").read_text()
    assert "one: Exposed all-to-all is 34% of the step of 100 ms (mean of 3 recorded steps)." in text
    assert "two: Exposed all-to-all is 19%" in text
    assert "-15.00" in capsys.readouterr().out


def test_a_run_that_went_on_with_other_ranks_is_reported(run: Path, tmp_path: Path, capsys) -> None:
    """Ten steps of four ranks came before. The report covers the two ranks that recorded last, and says so."""
    steps = steps_file(run).read_text()
    rows = CollectiveSpan("all_to_all", "expert", (0, 1, 2, 3), 0, 0.1, 0.1, 0.9, 4, (1,) * 4, "layers.0", "dispatch")
    four = [Step(n, tuple(RankStep(r, "a", 0.0, 1.0, (rows,)) for r in range(4))) for n in range(10)]
    steps_file(run).write_text("".join(s.to_json() + "\n" for s in four) + steps)
    perfetto = tmp_path / "p.json"
    assert main(["report", str(run), "--json", str(tmp_path / "x.json"), "--perfetto", str(perfetto)]) == 0
    content = json.loads((tmp_path / "x.json").read_text())
    assert (content["steps"], content["ranks"]) == ([10, 20, 30], [0, 1])
    note = "This is of 2 ranks; 10 recorded steps with 4 ranks are left out."
    assert content["sentence"].endswith(note)
    assert note in (run / "report.html").read_text()
    assert {e["pid"] for e in json.loads(perfetto.read_text())["traceEvents"]} == {0, 1}


def test_a_bar_shows_parts_that_the_first_bar_lacks() -> None:
    first = Breakdown(0.1, 0.1, 0.0, {}, 0.0, 0.0, None)
    second = Breakdown(0.2, 0.1, 0.0, {"tensor": 0.1}, 0.0, 0.0, None)
    drawn = figures.stacked("two", ["one", "two"], [first, second])
    assert "tensor communication" in drawn
    assert COLOURS["tensor communication"] in drawn
    assert "exposed all-to-all" not in drawn


def test_links_without_a_time_are_not_drawn(run: Path, tmp_path: Path) -> None:
    links = tmp_path / "links.yaml"
    good, nothing = LinkModel(0.0, 1e-5, 0.0, 0.0, 1, 1e6), LinkModel(0.0, 0.0, 0.0, 0.0, 0, 0)
    Profile({"all_to_all intra": good, "all_to_all inter": nothing}, {"backend": "gloo"}).save(links)
    drawn = report.write(run, profile=links).read_text()
    assert "all_to_all intra" in drawn and "all_to_all inter" not in drawn


def test_causes_stand_below_exposed_all_to_all(run: Path) -> None:
    e = Run.read(run).explanation
    assert e is not None
    names = [name for name, _, _ in communication.part_rows(e)]
    below = names[names.index("exposed all-to-all") + 1 :]
    assert below[:3] == ["  of all-to-all: transfer", "  of all-to-all: late", "  of all-to-all: uneven"]
    without = replace(e, total=replace(e.total, exposed=0.0))
    assert not [name for name, _, _ in communication.part_rows(without) if "all-to-all" in name]


def test_what_is_no_run_is_said(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "metrics.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 2
    assert f"no step yet: there is nothing to report\n    remedy: moesys launch {tmp_path}" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "give one run's folder" in capsys.readouterr().err


BROWSER = os.environ.get("CHROME") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

COPY = """<script>addEventListener("load", () => document.documentElement.setAttribute("data-told",
  document.querySelector("iframe").contentDocument.documentElement.getAttribute("data-told")));</script>"""

PROBE = """<script>
window.problems = []; window.onerror = (m) => window.problems.push(m);
addEventListener("load", () => {
  const root = document.documentElement, p = document.querySelector("p.sentence");
  const style = getComputedStyle(document.body);
  const ink = getComputedStyle(document.querySelector("svg text")).fill;
  root.setAttribute("data-told", JSON.stringify({problems: window.problems, page: root.scrollWidth,
    window: innerWidth, sentence: p.getBoundingClientRect().height, paper: style.backgroundColor, ink: style.color,
    drawn: ink, cut: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
    pictures: [...document.querySelectorAll("svg[role=img]")].map(s => s.getBoundingClientRect()).filter(b => b.height)
      .map(b => [b.height, b.right])}));
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_errors(run: Path, width: int, dark: bool) -> None:
    page = report.write(run)
    page.write_text(page.read_text().replace("<head>", "<head>" + PROBE, 1))
    # A window cannot be as narrow as a phone; a frame can.
    frame = run / "frame.html"
    frame.write_text(f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>{COPY}')
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom"]
    words += ["--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    done = subprocess.run([str(BROWSER), *words, frame.as_uri()], capture_output=True, text=True, timeout=600)
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    content = json.loads(found.group(1).replace("&quot;", '"'))
    assert content["problems"] == []
    assert content["window"] == width
    assert content["page"] <= width
    assert content["sentence"] > 20
    assert len(content["pictures"]) >= 8
    assert min(height for height, _ in content["pictures"]) > 50
    assert max(right for _, right in content["pictures"]) <= width
    assert content["cut"] == 0
    assert content["drawn"] == content["ink"]
    bright = [sum(map(int, re.findall(r"\d+", content[key])[:3])) for key in ("paper", "ink")]
    assert (bright[0] < bright[1]) == dark


def describe(folder: Path, tokenizer: str, bytes_per_token: float) -> None:
    """Give a run the configuration, summary and launch record of `moesys launch`."""
    (folder / "config.yaml").write_text(f"name: {folder.name}\ndata: {{tokenizer: {tokenizer}}}\n")
    facts = {"heldout_loss": 2.0, "heldout_bytes_per_token": bytes_per_token, "parameters": 1000, "profile": None}
    (folder / "summary.json").write_text(json.dumps(facts))
    launch = {"time": "2026-01-02T03:04:05+00:00", "command": "moesys launch x.yaml", "versions": {"torch": "2.13.0"}}
    (folder / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    places = [{"rank": r, "host": "a", "device": "cpu", "pp": r // 2, "dp_shard": r % 2, "ep": r % 2} for r in range(4)]
    (folder / "ranks.json").write_text(json.dumps(places))


def test_the_page_says_what_was_never_tried_on_a_gpu(run: Path) -> None:
    describe(run, "bytes", 1.0)
    assert "simulated streams" not in report.write(run).read_text()
    places = json.loads((run / "ranks.json").read_text())
    (run / "ranks.json").write_text(json.dumps([place | {"device": "NVIDIA H100"} for place in places]))
    assert "tested on simulated streams" in report.write(run).read_text()


def test_the_page_says_how_the_run_was_made(run: Path) -> None:
    describe(run, "bytes", 1.0)
    text = report.write(run).read_text()
    for content in (
        "moesys launch x.yaml",
        "2026-01-02",
        "torch 2.13.0",
        "pp 2 × dp 2; experts: ep 2",
        "tokenizer: bytes",
    ):
        assert content in text
    assert "None" not in text
    assert "dropped" not in text


def test_damaged_surroundings_do_not_cost_the_report(run: Path) -> None:
    for name in ("config.yaml", "ranks.json", "launches.jsonl"):
        (run / name).write_bytes(b"\xff{[: \x00")
    assert "Where a step goes" in report.write(run).read_text()


def test_runs_of_other_tokenizers_are_compared_in_bits_per_byte(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "two", 5)
    describe(run, "bytes", 1.0)
    describe(other, "words.json", 4.0)
    compare.write(run, other, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "loss, bits per byte" in text
    assert "loss, nats per token" not in text
    assert compare.differences(Run.read(run), Run.read(other))[1] == [("data.tokenizer", "bytes", "words.json")]


def test_a_run_has_one_colour_in_every_chart(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "two", 5)
    compare.write(run, other, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    training = text[text.index("Training") :]
    drawn = set(re.findall(r"stroke: (#[0-9a-f]{6})", training))
    assert drawn <= {*SERIES[:2], "#000000"}
    assert set(SERIES[:2]) <= drawn


def test_two_runs_of_one_name_are_both_reported(tmp_path: Path, capsys) -> None:
    """Their names have brackets, which are no markup."""
    a, b = (write_run(tmp_path / place / "[red]run", slow) for place, slow in (("old", 20), ("new", 5)))
    out, content = tmp_path / "both.html", tmp_path / "both.json"
    assert main(["report", str(a), str(b), "--out", str(out), "--json", str(content)]) == 0
    shares = {name: found["exposed_share"] for name, found in json.loads(content.read_text()).items()}
    assert shares == {"old/[red]run": pytest.approx(0.34), "new/[red]run": pytest.approx(0.19)}
    assert "old/[red]run" in capsys.readouterr().out


def test_names_that_look_like_mathematics_are_text(tmp_path: Path) -> None:
    odd = write_run(tmp_path / r"c$\frac$d", 20)
    compare.write(odd, write_run(tmp_path / "two", 5), tmp_path / "both.html")
    assert r"c$\frac$d" in (tmp_path / "both.html").read_text()


def test_secrets_are_not_part_of_a_noted_command() -> None:
    secret = ["launch.env.WANDB_API_KEY=abc", "launch={env: {A: b}}", "launch.env.PROXY=http://me:abc@host"]
    plain = ["launch.env.NCCL_DEBUG=INFO", "launch.env.HF_TOKEN=$MINE", "model.layers=2"]
    noted = command_line(["/usr/bin/moesys", "launch", "a b.yaml", *secret, *plain])
    hidden = ["launch.env.WANDB_API_KEY=$WANDB_API_KEY", "launch=…", "launch.env.PROXY=$PROXY"]
    assert shlex.split(noted) == ["moesys", "launch", "a b.yaml", *hidden, *plain]


def test_bits_per_byte_follow_their_definition() -> None:
    """A uniform guess among 256 bytes costs 8 bits for each byte, with any tokenizer."""
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    assert bits_per_byte(4 * math.log(256), 4.0) == pytest.approx(8)
