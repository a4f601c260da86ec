"""Records the routing of a run's first steps."""

from __future__ import annotations

from pathlib import Path

from moesys.data import routing_files
from moesys.data.routing_files import block
from moesys.moe.record import RoutingRecorder
from moesys.train.engine import Engine


class RoutingLog:
    """Writes the routing of a run's first `output.record_routing` steps: every rank its own tokens and layers.

    Files of steps after `resumed` are removed: those steps will be done again, perhaps by other ranks.
    """

    def __init__(self, engine: Engine, folder: Path, resumed: int):
        self.engine, self.folder = engine, folder
        self.steps = engine.config.output.record_routing
        self.recorder = RoutingRecorder(engine.moe_layers()) if self.steps > resumed else None
        if self.recorder is not None and engine.mesh.rank == 0:
            # No rank ends a step, and writes it, before this rank begins the step.
            routing_files.forget(folder, resumed)

    def write(self, step: int) -> None:
        """Write `step`, if it is among the first ones."""
        if self.recorder is None:
            return
        if step <= self.steps:
            moe = self.engine.config.model.moe
            assert moe is not None
            taken = self.recorder.take().items()
            layers = {block(name): (r.number_T.numpy(), r.expert_TK.numpy(), r.weight_TK.numpy()) for name, r in taken}
            routing_files.write(self.folder, step, self.engine.mesh.rank, layers, moe.experts)
        if step >= self.steps:
            self.recorder.close()
            self.recorder = None
