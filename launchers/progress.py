"""The live display of a run: its phase, then loss, speed and balance, and the output of rank 0.

It reads files that rank 0 writes in the run's folder (metrics.jsonl, logs/rank-0.log, its heartbeat). So it costs the
workers nothing and is the same for every launcher.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from moesys.files import json_objects
from moesys.launchers.outcome import log_file
from moesys.launchers.tail import Tail
from moesys.measure.report.facts import TEXTS, texts
from moesys.train.heartbeat import heartbeat_file
from moesys.train.rank import LOG_ONLY

Metrics = dict[str, Any]
"""One line of metrics.jsonl. A logged step has "step", "steps", "loss", "grad_norm", "tokens_per_second",
"imbalance", "all_to_all_share" and "eta_s"; an evaluation has "step", "heldout_loss", and "eval/NAME/loss" of other
texts; a warning "step" and "warning"."""

FIELDS = (
    ("loss", "loss", "{:.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("grad_norm", "grad norm", "{:.3f}"),
    ("imbalance", "imbalance", "{:.2f}"),
    ("all_to_all_share", "exposed a2a", "{:.1%}"),
)
"""Key, label and format of the figures shown."""

FAULTS = (("skipped", "skipped"), ("dead_experts", "dead experts"), ("collapsed_layers", "collapsed layers"))
"""Key and label of counts that are shown where there are any."""

LOST, NOT_FINITE = ("loss", "grad_norm"), "not finite"
"""Figures that every step has. JSON has no NaN: a null in a record is shown in these words."""


class LiveDisplay:
    """Shows a run while it goes on; call `refresh` several times a second.

    On a terminal a bar that is redrawn in place; elsewhere a plain line for the first and the last step,
    every tenth of the run or every `interval_s` seconds, whichever comes first.
    """

    def __init__(self, run_dir: Path, console: Console | None = None, interval_s: float = 10.0):
        self.console = console or Console()
        self.interval_s = interval_s
        self._metrics = Tail(run_dir / "metrics.jsonl")
        self._heartbeat = heartbeat_file(run_dir, 0)
        self._output = Tail(log_file(run_dir, 0))
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._phase, self._since = "", time.monotonic()
        self._latest: Metrics | None = None
        """The step that is shown; None while a phase is."""
        self._last: Metrics | None = None
        self._printed_step, self._printed_at = 0, time.monotonic()
        self.step = 0
        """The last step that was logged."""
        self.failed = False
        """True once the run has failed. The rest of rank 0's output, mostly about lost peers, then stays in its log."""

    def __enter__(self) -> LiveDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.failed:
            self._show_output(self._output.last())
        self._show_metrics()
        if self.console.is_terminal:
            self._live.stop()
            if self._last:
                self._print(line_of(self._last))

    def phase(self, text: str) -> None:
        """Show what the run waits for, until the next phase or the first step."""
        if text == self._phase:
            return
        self._phase, self._since, self._latest = text, time.monotonic(), None
        if self.console.is_terminal:
            self._draw()
        else:
            self._print(f"{text} …")

    def tell(self, lines: Iterable[str]) -> None:
        """Print lines, above the bar where there is one."""
        for line in lines:
            self._print(line)

    def refresh(self) -> None:
        """Show what has been written since the last call."""
        self._show_output(self._output.lines())
        self._show_metrics()
        heartbeat = next(json_objects(self._heartbeat), {})
        if heartbeat.get("shown"):
            self.phase(heartbeat["at"])
        if self.console.is_terminal:
            self._draw()

    def _show_output(self, lines: Iterable[str]) -> None:
        """Print rank 0's output, without the lines that are for its log alone."""
        self.tell(line for line in lines if not line.startswith(LOG_ONLY))

    def _show_metrics(self) -> None:
        for line in self._metrics.lines():
            try:
                self._show_record(json.loads(line))
            except ValueError:
                self._print(line)

    def _show_record(self, metrics: Metrics) -> None:
        if "warning" in metrics:
            self._print(f"step {metrics['step']}: {metrics['warning']}")
        elif "heldout_loss" in metrics:
            self._print(evaluation(metrics))
        elif "loss" in metrics:
            self._latest = self._last = metrics
            self.step = metrics["step"]
            if not self.console.is_terminal and self._due(metrics):
                self._printed_step, self._printed_at = metrics["step"], time.monotonic()
                self._print(line_of(metrics))

    def _due(self, metrics: Metrics) -> bool:
        step, steps = metrics["step"], metrics["steps"]
        tenth = step * 10 // steps > self._printed_step * 10 // steps
        return not self._printed_step or tenth or time.monotonic() - self._printed_at >= self.interval_s

    def _print(self, line: str) -> None:
        self.console.print(Text.from_ansi(line), soft_wrap=True)

    def _draw(self) -> None:
        self._live.update(bar(self._latest) if self._latest else self._waiting(), refresh=True)

    def _waiting(self) -> Spinner:
        return Spinner("dots", f"{self._phase} … {time.monotonic() - self._since:.0f} s")


def bar(metrics: Metrics) -> Group:
    """Two lines: the progress bar, and the figures of the latest step."""
    step, steps = metrics["step"], metrics["steps"]
    line = Table.grid(padding=(0, 1))
    done = ProgressBar(total=steps, completed=step, width=40)
    line.add_row(f"step {step}/{steps}", done, time_left(metrics))
    return Group(line, Text("  ".join(figures(metrics))))


def line_of(metrics: Metrics) -> str:
    """One plain line: "step 10/100  loss 5.1234  tokens/s 1,234  …  left 1:05"."""
    parts = [f"step {metrics['step']}/{metrics['steps']}", *figures(metrics), time_left(metrics)]
    return "  ".join(parts).rstrip()


def evaluation(metrics: Metrics) -> str:
    """ "step 100: held-out loss 2.0866 (3.0104 bits per byte), wiki 2.5"; without bits where bytes are not known."""
    found = [_figure("held-out loss", metrics, "heldout_")]
    found += [_figure(name, metrics, f"{TEXTS}{name}/") for name in texts(metrics)]
    return f"step {metrics['step']}: {', '.join(found)}"


def _figure(label: str, metrics: Metrics, key: str) -> str:
    """A loss with its label: "wiki 2.0866 (3.0104 bits per byte)"."""
    loss, bits = metrics[f"{key}loss"], metrics.get(f"{key}bits_per_byte")
    line = f"{label} {NOT_FINITE if loss is None else f'{loss:.4f}'}"
    return line if bits is None else f"{line} ({bits:.4f} bits per byte)"


def figures(metrics: Metrics) -> list[str]:
    """The figures of a step, each with its label; those that a run does not have are left out."""
    found = []
    for key, label, form in FIELDS:
        value = metrics.get(key)
        if value is not None:
            found.append(f"{label} {form.format(value)}")
        elif key in LOST and key in metrics:
            found.append(f"{label} {NOT_FINITE}")
    return found + [f"{label} {metrics[key]}" for key, label in FAULTS if metrics.get(key)]


def time_left(metrics: Metrics) -> str:
    """ "left 0:12:05", or "" where there is no estimate."""
    if metrics.get("eta_s") is None:
        return ""
    minutes, seconds = divmod(round(metrics["eta_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"left {hours}:{minutes:02}:{seconds:02}" if hours else f"left {minutes}:{seconds:02}"
