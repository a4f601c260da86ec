"""Checkpoints: complete or absent, and independent of the layout they were written under.

The engine writes its tensors beside the checkpoint's final name, which they get when all ranks are done.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moesys.config.schema import Config
from moesys.errors import CheckpointError
from moesys.files import write_json
from moesys.parallel.freeze import frozen_names
from moesys.train.engine import Engine

META = "moesys.json"


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, if any."""
    complete = sorted(path for path in folder.glob("step-*") if (path / META).exists())
    return complete[-1] if complete else None


def save(folder: Path, engine: Engine, step: int, samples: int, extra: dict[str, Any] | None = None) -> Path:
    """Write `folder`/step-N and remove what is `surplus`. Collective over the world.

    `extra`: what else is to be found again by `kept`; "skips" counts skipped steps, "consecutive" and "total".
    """
    config = engine.config
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    first = dist.get_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left)
        partial.mkdir()
    dist.barrier()
    engine.save(partial)
    dist.barrier()
    if first:
        meta = {"step": step, "samples": samples, "model": config.model.model_dump(), "seed": config.seed}
        meta |= {"freeze": config.train.freeze, **(extra or {})}
        write_json(partial / META, meta)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in surplus(folder, config.output.keep):
            shutil.rmtree(old)
    dist.barrier()
    return final


def surplus(folder: Path, keep: int) -> list[Path]:
    """Checkpoints that are no longer needed, the oldest first: all but the newest `keep` good ones and the newest.

    A good one was written after a step that updated. One that was written while steps were being skipped is good for
    going on, but takes the place of no good one: whether training recovers is not known then.
    """
    complete = sorted(path for path in folder.glob("step-*") if (path / META).exists())
    good = [path for path in complete if not kept(path, "skips").get("consecutive")]
    needed = {*good[-keep:], *complete[-1:]}
    return [path for path in complete if path not in needed]


def kept(path: Path, key: str) -> dict[str, Any]:
    """What a checkpoint keeps under `key` beside what it is of; {} where it is older than that, or unreadable."""
    try:
        found = json.loads((path / META).read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def load(path: Path, engine: Engine) -> tuple[int, int]:
    """Restore the engine from a checkpoint: (step, samples seen). Collective over the world.

    Raises:
        CheckpointError: as `check`.
    """
    meta = check(path, engine.config)
    engine.load(path)
    return meta["step"], meta["samples"]


def check(path: Path, config: Config) -> dict[str, Any]:
    """The metadata of a checkpoint, if it fits the model.

    Raises:
        CheckpointError: unreadable, or of another model; names the keys that differ.
    """
    try:
        meta = json.loads((path / META).read_text())
        saved, asked = _flat(meta["model"]), _flat(config.model.model_dump())
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it, or choose another run name") from None
    different = sorted(key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key))
    if different:
        rows = "".join(f"\n  model.{key}: saved {saved.get(key)}, now {asked.get(key)}" for key in different)
        raise CheckpointError(
            f"{path} is of another model:{rows}\n    remedy: restore these keys, or choose another run name"
        )
    thawed = frozen_names(config.model, meta.get("freeze", [])) - frozen_names(config.model, config.train.freeze)
    if thawed:
        raise CheckpointError(
            f"{path} has no optimizer state of {min(thawed)}, which was frozen when it was written"
            f"\n    remedy: restore train.freeze: {meta['freeze']}, or choose another run name"
        )
    return meta


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
