"""Fills an engine's weights from `train.init`: each rank reads the parts that it holds, straight into them."""

from __future__ import annotations

from time import perf_counter

import torch

from moesys.hub.fit import Fit
from moesys.hub.weights import ReleasedWeights
from moesys.train import heartbeat, manifest, storage
from moesys.train.engine import Engine
from moesys.train.finite import nonfinite
from moesys.train.initial_weights import InitialWeights
from moesys.words import size_text

SHOWN_EVERY_S = 5.0
"""Seconds between two lines of progress."""


def fill(engine: Engine, source: InitialWeights) -> str:
    """Give the engine the weights of `source`; returns a sentence about it. Collective over the world.

    Raises:
        FileError, CheckpointError: a file is damaged; a weight is not finite.
    """
    said = _from_checkpoint(engine, source) if source.released is None else _from_folder(engine, source.released)
    bad = nonfinite({name: part for name, part, _ in engine.held()})
    rule = f"{source.path}: {bad[0]} is not finite\n    remedy: copy it again" if bad else None
    storage.agree(rule)
    return said


def _from_folder(engine: Engine, fit: Fit) -> str:
    begin = perf_counter()
    source = ReleasedWeights(fit)
    read_released(engine, source)
    seconds = max(perf_counter() - begin, 1e-9)
    rate = size_text(source.bytes_read / seconds)
    read = f"{size_text(source.bytes_read)} on this rank in {seconds:.1f} s, {rate}/s"
    left = f"; left out: {', '.join(fit.left_out)}" if fit.left_out else ""
    return f"starting from the weights of {fit.folder.path} ({fit.family.summary}): {read}{left}"


@torch.no_grad()
def read_released(engine: Engine, source: ReleasedWeights) -> None:
    """Read a released model's weights into the parts that this rank holds. Not collective."""
    shown = perf_counter()
    parts = [found for found in engine.held() if found[0] in source.fit.stored]
    size, done = sum(part.nbytes for _, part, _ in parts), 0
    for name, part, place in parts:
        if part.numel():
            source.read_into(part, name, tuple((at.start, at.stop) for at in place))
        done += part.nbytes
        if perf_counter() - shown > SHOWN_EVERY_S:
            shown = perf_counter()
            heartbeat.phase(f"loading weights: {done / size:.0%} of {size_text(size)} on this rank", shown=True)
    engine.written()


def _from_checkpoint(engine: Engine, source: InitialWeights) -> str:
    meta = manifest.read(source.path)
    mesh = engine.mesh
    if wrong := manifest.verify(source.path, meta.files, mesh.rank, mesh.degrees.world):
        wrong = f"{source.path} is damaged: {wrong}\n    remedy: name another checkpoint"
    storage.agree(wrong)
    fresh = engine.load_weights(source.path)
    new = f"; not in it, thus new: {', '.join(sorted(fresh))}" if fresh else ""
    return f"starting from the weights of {source.path}, of step {meta.step}, with a new optimizer{new}"
