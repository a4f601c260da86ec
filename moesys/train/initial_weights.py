"""`train.init`: where a new run's weights come from, and whether they fit. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesys.config.changes import Change, Kind
from moesys.config.schema import Config, ModelConfig
from moesys.data.corpus import vocab_size
from moesys.errors import CheckpointError, FileError
from moesys.hub import folder
from moesys.hub.derive import Released, released
from moesys.hub.family import differing, meant, nested
from moesys.hub.fit import Fit, fit
from moesys.train import manifest, resume, saved, saved_shapes


@dataclass(frozen=True)
class InitialWeights:
    """The place of a run's initial weights: a released model that fits, or a checkpoint that does."""

    path: Path
    released: Fit | None


def find(config: Config) -> InitialWeights | None:
    """What `train.init` names; None if it is null.

    Raises:
        FileError, CheckpointError: there is nothing, it is damaged, or of another model; says what differs.
    """
    if config.train.init is None:
        return None
    path = saved.find(Path(config.train.init))
    if folder.is_folder(path):
        return InitialWeights(path, _released(path, config))
    _require_same_model(manifest.read(path), config)
    return InitialWeights(path, None)


def _released(path: Path, config: Config) -> Fit:
    model = released(path)
    if unasked := [line for line in disagreements(model, config.model) if not _asked(line, config)]:
        lines = "".join(f"\n  {line}" for line in unasked)
        remedy = "remove these keys and write model: {from: FOLDER}, or name them in train.resume_changed"
        raise FileError(f"{path} is of another model:{lines}\n    remedy: {remedy}")
    return fit(model.folder, config.model, vocab_size(config))


def _asked(line: str, config: Config) -> bool:
    return line.partition(" ")[0] in config.train.resume_changed


def disagreements(found: Released, model: ModelConfig) -> list[str]:
    """A line for each key of the model that changes numbers and differs from the released model's."""
    if found.problems:
        return [f"{p.key} {p.rule}" for p in found.problems]
    theirs, ours = meant(ModelConfig.model_validate(nested(found.derived.values))), meant(model)
    return [f"model.{key} is {ours.get(key)!r}, and {theirs.get(key)!r} there" for key in differing(theirs, ours)]


def _require_same_model(meta: manifest.Meta, config: Config) -> None:
    """Raise CheckpointError if weights have other names or shapes, or a key of the model changes numbers."""
    manifest.require_files(meta)
    found = [change for change in resume.changes(meta, config) if change.key.startswith("model.")]
    if wrong := saved_shapes.misfits(saved_shapes.read(meta), config.model, vocab_size(config)):
        lines = "".join(f"\n  {line}" for line in (*_rows(found, Kind.WEIGHTS), *wrong[: resume.SHOWN]))
        remedy = "train.init must name a checkpoint of the same model"
        raise CheckpointError(f"{meta.path} is of another model:{lines}\n    remedy: {remedy}")
    unasked = [c for c in found if c.kind in (Kind.MEANT, Kind.WEIGHTS) and c.key not in config.train.resume_changed]
    if unasked:
        lines = "".join(f"\n  {change.row()}" for change in unasked)
        remedy = "restore these keys, or name them in train.resume_changed if this is meant"
        raise CheckpointError(f"{meta.path} is of a model that computes otherwise:{lines}\n    remedy: {remedy}")


def _rows(changes: list[Change], kind: Kind) -> list[str]:
    return [change.row() for change in changes if change.kind is kind]
