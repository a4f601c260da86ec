"""The checkpoint that a run goes on from, and whether it may under this configuration. Needs no torch.

What must be equal is compared: the weights' names and shapes, and the keys that change numbers. A key that the
checkpoint lacks, as an older version knew none, has its default there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from moesys.config.changes import Change, Kind
from moesys.config.differences import differences, saved_form
from moesys.config.load import attempt
from moesys.config.schema import Config
from moesys.data.corpus import vocab_size
from moesys.data.tokenizers import build_tokenizer
from moesys.errors import CheckpointError, ConfigError
from moesys.files import read_json
from moesys.parallel.freeze import frozen_names
from moesys.train import saved_shapes
from moesys.train.manifest import Meta, newest, read, require_files

FIRST_FORMAT = ("model.", "seed", "train.freeze")
"""The keys that checkpoints kept before they kept the whole configuration."""

SHOWN = 3
"""Weights that do not fit which a message names; it counts the others."""


def saved_configuration(config: Config) -> dict[str, Any]:
    """The configuration as checkpoints keep it. Raises DataError as `vocab_size`."""
    model = config.model.model_copy(update={"vocab_size": vocab_size(config)})
    return saved_form(config.model_copy(update={"model": model}))


def changes(meta: Meta, config: Config) -> list[Change]:
    """Every key that has an effect and another value in the checkpoint. A tokenizer that only moved is no change."""
    found = _resolved_differences(meta.config, config)
    if not meta.whole:
        found = [c for c in found if c.key.startswith(FIRST_FORMAT)]
    if not meta.tokenizer:
        return found
    identity = build_tokenizer(config.data).identity
    found = [c for c in found if c.key != "data.tokenizer"]
    if meta.tokenizer.get("identity") != identity:
        saved = f"{meta.tokenizer.get('name')} ({str(meta.tokenizer.get('identity'))[:8]})"
        found.append(Change("data.tokenizer", saved, f"{config.data.tokenizer} ({identity[:8]})", Kind.MEANT))
    return found


def _resolved_differences(saved: Mapping[str, Any], config: Config) -> list[Change]:
    """The differences; a vocabulary's size that was not resolved when it was saved is none."""
    found = differences(saved, saved_configuration(config))
    if saved.get("model", {}).get("vocab_size") is None:
        found = [c for c in found if c.key != "model.vocab_size"]
    return found


def require_compatible(
    meta: Meta, config: Config, data: Mapping[str, Any] | None = None, shapes: bool = False
) -> list[Change]:
    """The changes under which a run goes on from a checkpoint, for the user to read.

    Args:
        data: the fingerprint of the tokens, `Corpus.fingerprint`; None: not compared.
        shapes: compare the weights' shapes even if no key that decides them has changed.

    Raises:
        CheckpointError: a weight does not fit; a key must be named in `train.resume_changed`, or is unknown to this
            version; or no step is left to train, and the steps that were trained had other settings.
    """
    found = changes(meta, config)
    if data is not None and meta.data and data != meta.data:
        found = _with_content(found, meta.data, data)
    wrong = []
    if shapes or any(c.kind is Kind.WEIGHTS for c in found):
        wrong = saved_shapes.misfits(saved_shapes.read(meta), config.model, vocab_size(config))
    if wrong:
        raise CheckpointError(_other_model(meta.path, found, wrong))
    found = [replace(c, given=Kind.MEANT) if c.kind is Kind.WEIGHTS else c for c in found]
    if any(c.kind is Kind.UNKNOWN for c in found):
        raise CheckpointError(_other_version(meta, found))
    unasked = [c for c in found if c.kind is Kind.MEANT and c.key not in config.train.resume_changed]
    if unasked:
        raise CheckpointError(_other_computation(meta.path, found, unasked))
    _require_state(meta, config)
    _require_work(meta, config, found)
    return found


def _with_content(found: list[Change], saved: Mapping[str, Any], data: Mapping[str, Any]) -> list[Change]:
    """`found` with the change of the tokens, unless a key that must be named explains it."""
    if any(c.kind is Kind.MEANT and c.key.startswith("data.") for c in found):
        return found
    content = Change("data.path", _content(saved), _content(data), Kind.MEANT)
    return [*(c for c in found if c.key != "data.path"), content]


def _content(data: Mapping[str, Any]) -> str:
    return f"{data.get('train_tokens')} + {data.get('heldout_tokens')} tokens ({str(data.get('digest'))[:8]})"


def _rows(refused: Sequence[Change], found: Sequence[Change] = ()) -> str:
    """A line for each refused change, then one for each other."""
    others = [change for change in found if change not in refused]
    return "".join([*(f"\n  {c.row()}" for c in refused), *(f"\n  also changed: {c.row()}" for c in others)])


def _other_model(path: Path, found: Sequence[Change], wrong: Sequence[str]) -> str:
    more = f"; and {len(wrong) - SHOWN} more weights" if len(wrong) > SHOWN else ""
    keys = [change for change in found if change.kind is Kind.WEIGHTS]
    rows = _rows(keys, found) + "".join(f"\n  {line}" for line in wrong[:SHOWN]) + more
    remedy = "restore the keys that cannot fit" if keys else "use the version that wrote it"
    return f"{path} is of another model:{rows}\n    remedy: {remedy}, or choose another run: name=NAME"


def _other_version(meta: Meta, found: Sequence[Change]) -> str:
    unknown = [change for change in found if change.kind is Kind.UNKNOWN]
    remedy = f"go on with moesys {meta.versions.get('moesys', '')}".rstrip() + ", which wrote it"
    rows = _rows(unknown, found)
    return f"{meta.path} has keys of another version:{rows}\n    remedy: {remedy}, or choose another run: name=NAME"


def _other_computation(path: Path, found: Sequence[Change], unasked: Sequence[Change]) -> str:
    keys = ",".join(change.key for change in unasked)
    remedy = f"restore {keys.replace(',', ', ')}; or, if this is meant, add 'train.resume_changed=[{keys}]'"
    rows = _rows(unasked, found)
    return f"{path} is of a run with other samples or another computation:{rows}\n    remedy: {remedy}"


def _require_state(meta: Meta, config: Config) -> None:
    """Raise CheckpointError if a parameter was frozen, so that the optimizer has no state of it, and no longer is."""
    before = meta.config.get("train", {}).get("freeze", [])
    thawed = frozen_names(config.model, before) - frozen_names(config.model, config.train.freeze)
    if thawed:
        raise CheckpointError(
            f"{meta.path} has no optimizer state of {min(thawed)}, which was frozen when it was written"
            f"\n    remedy: restore train.freeze: {before}, or choose another run name"
        )


def _require_work(meta: Meta, config: Config, found: Sequence[Change]) -> None:
    """Raise CheckpointError if no step is left and a key that changes numbers differs: its figures are of its steps."""
    other = [c for c in found if c.kind in (Kind.MEANT, Kind.TRAINING)]
    if meta.step < config.train.steps or not other:
        return
    raise CheckpointError(
        f"{meta.path.parent.parent} has no step left to train ({meta.step} are done, train.steps is "
        f"{config.train.steps}), and those that it trained had other settings:{_rows(other)}"
        "\n    remedy: choose another run, name=NAME; or train longer, train.steps=N; or restore these keys"
    )


def check(run_dir: Path, config: Config) -> list[str]:
    """Lines on what has changed since the newest checkpoint in `run_dir`, from which the run may go on.

    Asked before anything starts, as far as it shows without the data. Empty if nothing has changed, or there is no
    checkpoint.

    Raises:
        CheckpointError: as `read`, `require_files` and `require_compatible`.
    """
    path = newest(run_dir / "checkpoints")
    if path is None:
        return []
    meta = read(path)
    require_files(meta)
    return [changed_since(meta.step, change) for change in require_compatible(meta, config, shapes=True)]


def changed_since(step: int, change: Change) -> str:
    """ "changed since step 60: train.optimizer.lr: 0.003 → 0.001 (changes numbers)"."""
    return f"changed since step {step}: {change.arrow()} ({change.effect})"


def trained_with(run_dir: Path, config: Config) -> list[Change]:
    """The differences of `config` from the settings of the figures in `run_dir`; none where there is no run yet.

    Raises:
        CheckpointError: as `read`.
        ConfigError: its config.yaml cannot be read.
    """
    if (path := newest(run_dir / "checkpoints")) is not None:
        return changes(read(path), config)
    if not (run_dir / "summary.json").exists():
        return []
    saved = read_json(run_dir / "summary.json", "remove it").get("config")
    if not isinstance(saved, dict):  # of a version that did not keep it
        saved = _written(run_dir / "config.yaml")
    return _resolved_differences(saved, config)


def _written(path: Path) -> dict[str, Any]:
    """The keys of a configuration that a run's launcher wrote, of whatever version."""
    found = attempt(path)
    if found.tree is None or "model" not in found.tree.section:
        raise ConfigError(found.problems)
    return cast(dict[str, Any], found.tree.plain())
