"""The checkpoint that a run goes on from, and whether it may under this configuration. Needs no torch."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesys.config.changes import Change, Kind, differences, saved_form
from moesys.config.load import load
from moesys.config.schema import Config
from moesys.data.corpus import vocab_size
from moesys.data.tokenizers import build_tokenizer
from moesys.errors import CheckpointError, FileError
from moesys.files import json_text, read_json
from moesys.parallel.freeze import frozen_names

META = "moesys.json"
NAME = re.compile(r"step-(\d{8,})")
"""Names of checkpoints, whole: folders of any other name are somebody else's."""
FIRST_FORMAT = ("model.", "seed", "train.freeze")
"""The keys that checkpoints kept before they kept the whole configuration."""


@dataclass(frozen=True)
class Meta:
    """The facts that a checkpoint says of itself.

    Attributes:
        step, samples: done; samples count sequences of the run's `train.seq_len`.
        config: as `changes.saved_form`, with the resolved vocab_size; of an old checkpoint, what it has of it.
        tokenizer, data: identity and fingerprint; empty in an old checkpoint.
        files: [bytes, CRC-32] of the other files; empty in an old checkpoint.
        state: what the training loop asked to be kept.
    """

    path: Path
    step: int
    samples: int
    config: Mapping[str, Any]
    whole: bool
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, by step."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir() and (p / META).exists()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, if any."""
    return next(reversed(complete(folder)), None)


def previous(path: Path) -> Path | None:
    """The newest complete checkpoint beside `path` that is older, if any."""
    if not NAME.fullmatch(path.name):
        return None
    return next((p for p in reversed(complete(path.parent)) if step_of(p) < step_of(path)), None)


def damaged(path: Path, what: str) -> CheckpointError:
    """The error of a checkpoint that is not what was written; its remedy names the one before it."""
    before = previous(path)
    aside = path.parent.parent / f"damaged-{path.name}"
    then = f"go on from {before.name}" if before else "start again from the beginning"
    remedy = f"move it away, and the same command will {then}: mv {path} {aside}"
    return CheckpointError(f"{path} is damaged: {what}\n    remedy: {remedy}")


def checksum(meta: Mapping[str, Any]) -> int:
    """The CRC-32 of all that a checkpoint says of itself."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return zlib.crc32(json.dumps(json.loads(json_text(rest)), sort_keys=True).encode())


def read(path: Path) -> Meta:
    """The facts that the checkpoint at `path` says of itself.

    Raises:
        CheckpointError: that is missing or damaged.
    """
    try:
        found = read_json(path / META, "")
    except FileError as error:
        raise damaged(path, str(error).partition("\n")[0].replace(str(path / META), META)) from None
    if wrong := _wrong(path, found):
        raise damaged(path, wrong)
    whole = "config" in found
    if whole:
        config = found["config"]
    else:
        config = {"model": found["model"], "seed": found.get("seed", 0), "train": {"freeze": found.get("freeze", [])}}
    more = {key: found.get(key) or {} for key in ("tokenizer", "data", "files", "state")}
    return Meta(path, found["step"], found["samples"], config, whole, **more)


def _wrong(path: Path, found: Mapping[str, Any]) -> str | None:
    if "checksum" in found and found["checksum"] != checksum(found):
        return f"{META} was changed since it was written: its checksum is another"
    for key in ("step", "samples"):
        value = found.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            return f"{META}: {key} must be a whole number of at least 0, and is {json.dumps(value)}"
    if NAME.fullmatch(path.name) and step_of(path) != found["step"]:
        return f"{META} is of step {found['step']}"
    for key in ("config", "model", "tokenizer", "data", "files", "state"):
        if not isinstance(found.get(key, {}), dict):
            return f"{META}: {key} must be an object"
    if not isinstance(found.get("config", found).get("model"), dict):
        return f"{META} lacks the model"
    for name, facts in found.get("files", {}).items():
        if not (isinstance(facts, list) and len(facts) == 2 and re.fullmatch(r"[\w.-]+", name)):
            return f"{META}: files must have the bytes and the checksum of each file"
    return None


def require_files(meta: Meta) -> None:
    """Raise CheckpointError where a file is missing or of another size."""
    for name, (size, _) in meta.files.items():
        if not (meta.path / name).is_file():
            raise damaged(meta.path, f"{name} is missing")
        if (found := (meta.path / name).stat().st_size) != size:
            raise damaged(meta.path, f"{name} has {found:,} bytes, and had {size:,} when it was written")


def now(config: Config) -> dict[str, Any]:
    """The configuration as checkpoints keep it. Raises DataError as `vocab_size`."""
    model = config.model.model_copy(update={"vocab_size": vocab_size(config)})
    return saved_form(config.model_copy(update={"model": model}))


def changes(meta: Meta, config: Config) -> list[Change]:
    """Every key that decides anything and is not as in the checkpoint; a tokenizer that only moved is none."""
    found = differences(meta.config, now(config))
    if not meta.whole:
        found = [c for c in found if c.key.startswith(FIRST_FORMAT)]
    if meta.config["model"].get("vocab_size") is None:
        found = [c for c in found if c.key != "model.vocab_size"]
    if not meta.tokenizer:
        return found
    identity = build_tokenizer(config.data).identity
    found = [c for c in found if c.key != "data.tokenizer"]
    if meta.tokenizer.get("identity") != identity:
        saved = f"{meta.tokenizer.get('name')} ({str(meta.tokenizer.get('identity'))[:8]})"
        found.append(Change("data.tokenizer", saved, f"{config.data.tokenizer} ({identity[:8]})", Kind.MEANT))
    return found


def judge(meta: Meta, config: Config, data: Mapping[str, Any] | None = None) -> list[Change]:
    """The changes under which a run goes on from a checkpoint, to be told.

    Args:
        data: the fingerprint of the tokens, `Corpus.fingerprint`; None: not compared.

    Raises:
        CheckpointError: they cannot be meant, or must be asked for by name; or no step is left to train, and the
            steps that were trained had other settings.
    """
    found = changes(meta, config)
    meant = [c for c in found if c.kind is Kind.MEANT]
    if data is not None and meta.data and data != meta.data and not any(c.key.startswith("data.") for c in meant):
        meant.append(Change("data.path", _content(meta.data), _content(data), Kind.MEANT))
        found = [c for c in found if c.key != "data.path"] + meant[-1:]
    fixed = [c for c in found if c.kind is Kind.WEIGHTS]
    unasked = [c for c in meant if c.key not in config.train.resume_changed]
    if fixed or unasked:
        raise CheckpointError(_refusal(meta.path, fixed, unasked))
    _require_state(meta, config)
    _require_work(meta, config, found)
    return found


def _content(data: Mapping[str, Any]) -> str:
    return f"{data.get('train_tokens')} + {data.get('heldout_tokens')} tokens ({str(data.get('digest'))[:8]})"


def _refusal(path: Path, fixed: Sequence[Change], unasked: Sequence[Change]) -> str:
    rows = "".join(f"\n  {change}" for change in [*fixed, *unasked])
    if fixed:
        return f"{path} is of another model:{rows}\n    remedy: restore these keys, or choose another run: name=NAME"
    keys = ",".join(change.key for change in unasked)
    remedy = f"restore these keys; or, if this is meant, add 'train.resume_changed=[{keys}]'"
    return f"{path} is of a run with other samples or another computation:{rows}\n    remedy: {remedy}"


def _require_state(meta: Meta, config: Config) -> None:
    """A parameter that was frozen has no state in the optimizer."""
    before = meta.config.get("train", {}).get("freeze", [])
    thawed = frozen_names(config.model, before) - frozen_names(config.model, config.train.freeze)
    if thawed:
        raise CheckpointError(
            f"{meta.path} has no optimizer state of {min(thawed)}, which was frozen when it was written"
            f"\n    remedy: restore train.freeze: {before}, or choose another run name"
        )


def _require_work(meta: Meta, config: Config, found: Sequence[Change]) -> None:
    """Of a run without a step left only what decides none may change: its figures are those of its steps."""
    other = [c for c in found if c.kind in (Kind.MEANT, Kind.TRAINING)]
    if meta.step < config.train.steps or not other:
        return
    rows = "".join(f"\n  {change}" for change in other)
    raise CheckpointError(
        f"{meta.path.parent.parent} has no step left to train ({meta.step} are done, train.steps is "
        f"{config.train.steps}), and those that it trained had other settings:{rows}"
        "\n    remedy: choose another run, name=NAME; or train longer, train.steps=N; or restore these keys"
    )


def check(run_dir: Path, config: Config) -> None:
    """Ask before anything starts whether the run in `run_dir` may go on, as far as that shows without its data.

    Raises:
        CheckpointError: as `read`, `require_files` and `judge`.
    """
    if (path := newest(run_dir / "checkpoints")) is not None:
        meta = read(path)
        require_files(meta)
        judge(meta, config)


def incomplete(folder: Path) -> list[str]:
    """A line for each numbered folder above the newest checkpoint that is none."""
    last = newest(folder)
    above = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and not (p / META).exists()]
    return [
        f"{path} has no {META}, so it is not whole, and is not used"
        for path in sorted(above)
        if last is None or step_of(path) > step_of(last)
    ]


def trained_with(run_dir: Path, config: Config) -> list[Change]:
    """The differences of `config` from the settings of the figures in `run_dir`; none where there is no run yet.

    Raises:
        CheckpointError: as `read`.
    """
    if (path := newest(run_dir / "checkpoints")) is not None:
        return changes(read(path), config)
    if not (run_dir / "summary.json").exists():
        return []
    saved = read_json(run_dir / "summary.json", "remove it").get("config")
    if not isinstance(saved, dict):  # of a version that did not keep it
        saved = now(load(run_dir / "config.yaml").config)
    return differences(saved, now(config))
