"""What each rank of the test of overlap does: one step with overlap and one without, and when things happened."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from moesys.config.schema import Config
from moesys.data.corpus import open_corpus
from moesys.files import write_json
from moesys.train.engine import engine_of
from moesys.train.loop import Trainer
from moesys.train.worker import guarded


def run(config: Config, run_dir: Path) -> None:
    """Leave rank-N.json in the run's folder."""
    guarded(_steps, config, run_dir)


def _steps(config: Config, run_dir: Path) -> None:
    mesh = engine_of(config).connect(config)
    trainer = Trainer(config, mesh, open_corpus(config))
    (layer,) = trainer.engine.moe_layers().values()
    starts: list[float] = []
    layer.shared.register_forward_pre_hook(lambda *_: starts.append(perf_counter()))
    found = {}
    for overlap in (True, False):
        layer.dispatcher.overlap_shared = overlap
        trainer.train_step()
        events = [event for event in trainer.events if event.level and not event.tag.backward]
        facts = [{"part": e.tag.part, "begin": e.begin, "waited": e.waited, "sent": e.sent} for e in events]
        found[str(overlap)] = {"events": facts, "starts": starts.copy()}
        starts.clear()
    write_json(run_dir / f"rank-{mesh.rank}.json", found)
