"""Routing as it was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesys.config.section import Section
from moesys.errors import Problem
from moesys.models.parts.gates.kind import FIXED, GateKind

if TYPE_CHECKING:
    import torch

    from moesys.data.corpus import Corpus
    from moesys.moe.gates import Gate


class ReplayKeys(Section):
    """Keys of replay."""

    path: str | None = None
    """The folder of the recording, runs/NAME/routing; relative to the working directory."""


class Replay(GateKind):
    """Each token goes where `output.record_routing` saw it go."""

    kind = "replay"
    summary = "as recorded by output.record_routing"
    aliases = ("record", "recorded")
    keys = ReplayKeys
    ignores = FIXED | {"normalize_min"}
    recorded = True

    def check(self) -> list[Problem]:
        """There is something to replay."""
        if self.moe.gate.path is not None:
            return []
        rule = "gate replay needs a recording"
        return [Problem("model.moe.gate.path", rule, "set it to the folder runs/NAME/routing")]

    def check_files(self, layers: Sequence[int]) -> list[Problem]:
        """The recording is there, and fits the model."""
        from moesys.data import routing_files

        if self.moe.gate.path is None:
            return []
        rule = routing_files.wrong(Path(self.moe.gate.path), layers, self.moe.experts)
        remedy = "record a run of this model with output.record_routing"
        return [Problem("model.moe.gate.path", rule, remedy)] if rule else []

    def build(self, hidden: int, layer: int) -> Gate:
        """The gate."""
        from moesys.moe.gates.replay import ReplayGate

        m = self.moe
        return ReplayGate(hidden, m.experts, m.normalize, m.scale, m.z_loss)

    def prepare(self, gates: Mapping[int, Gate], corpus: Corpus, device: torch.device) -> None:
        """Each gate has the recording of its block."""
        import torch

        from moesys.data import routing_files
        from moesys.moe.gates.replay import ReplayGate

        for layer, gate in gates.items():
            assert isinstance(gate, ReplayGate)  # as it was built
            first, table_NK = routing_files.read(Path(self.moe.gate.path), layer)
            gate.load(first, torch.from_numpy(table_NK).to(device))
