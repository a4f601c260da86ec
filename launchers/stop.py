"""Notes Ctrl-C and termination requests instead of raising, so that workers can be stopped in order."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

STOPPED = 130
"""Exit code of a run that was stopped on request."""


class StopRequests:
    """While open, SIGINT, SIGTERM and SIGHUP set `requested` and do nothing else.

    Must be opened in the main thread. An ignored SIGHUP (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if number is not signal.SIGHUP or before is not signal.SIG_IGN:
                self._before[number] = before
        self.install()
        return self

    def install(self) -> None:
        """Take the signals (again): libraries install handlers of their own while they start."""
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
