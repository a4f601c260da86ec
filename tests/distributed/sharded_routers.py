"""The two ranks of `test_sharded_routers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor, Shard

from moesys.config import Config
from moesys.data.corpus import open_corpus
from moesys.parallel import data, gradients
from moesys.train.engine import engine_of
from moesys.train.loop import Trainer


def written(rank: int, config: Config, folder: Path) -> dict[str, Any]:
    """Two steps of a run whose routers FSDP shards, with a checkpoint between them, as earlier versions did."""
    with patch.object(data, "routers", _none), patch.object(gradients, "routers", _none):
        trainer = _trainer(config)
        trainer.train_step()
        trainer.save(folder)
        return _told(trainer)


def loaded(rank: int, config: Config, folder: Path) -> dict[str, Any]:
    """The step after that checkpoint in a run whose routers are replicated."""
    trainer = _trainer(config)
    trainer.resume(folder)
    return _told(trainer)


def _none(model: Any) -> tuple[()]:
    return ()


def _trainer(config: Config) -> Trainer:
    return Trainer(config, engine_of(config).connect(config), open_corpus(config))


def _told(trainer: Trainer) -> dict[str, Any]:
    """How routers lie, every tensor of a checkpoint as a whole, and the loss of the next step."""
    state = trainer.engine._state()  # type: ignore[attr-defined]
    whole = {f"{part}.{name}": _whole(value) for part, held in state.items() for name, value in held.items()}
    routers = [value for name, value in state["model"].items() if ".gate.projection." in name]
    sharded = [isinstance(value, DTensor) and value.placements[-1] == Shard(0) for value in routers]
    return {"sharded": sharded, "tensors": whole, "loss": trainer.train_step()["loss"]}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()
