"""Routing as it was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesys.config.section import Section
from moesys.errors import Problem
from moesys.models.parts.gate import FIXED, GateKind

if TYPE_CHECKING:
    from moesys.moe.gates import Gate


class ReplayKeys(Section):
    """Keys of replay."""

    path: str | None = None
    """replay: the folder of the recording, runs/NAME/routing; relative to the working directory."""


class Replay(GateKind):
    """Each token goes where `output.record_routing` saw it go."""

    kind = "replay"
    summary = "as recorded by output.record_routing"
    aliases = ("record", "recorded")
    keys = ReplayKeys
    ignores = FIXED
    recorded = True

    def check(self) -> list[Problem]:
        """There is something to replay."""
        if self.moe.gate.path is not None:
            return []
        rule = "gate replay needs a recording"
        return [Problem("model.moe.gate.path", rule, "set it to the folder runs/NAME/routing")]

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.replay import ReplayGate

        m = self.moe
        return ReplayGate(hidden, m.experts, m.normalize, m.scale, m.z_loss)
