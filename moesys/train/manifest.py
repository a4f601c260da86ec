"""Reads moesys.json, the manifest of a checkpoint, and lists the checkpoints in a folder. Needs no torch."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesys.errors import CheckpointError, FileError
from moesys.files import json_text, read_json

META = "moesys.json"
BLOCK = 1 << 22
"""Bytes that are read at once."""
NAME = re.compile(r"step-(\d{8,})")
"""The full names of checkpoints: folders of other names are left alone."""


@dataclass(frozen=True)
class Meta:
    """The manifest of a checkpoint.

    Attributes:
        step, samples: done; samples count sequences of the run's `train.seq_len`.
        config: as `changes.saved_form`, with the resolved vocab_size; an old checkpoint has a part of it.
        whole: True if the checkpoint has its whole configuration.
        tokenizer, data: identity and fingerprint; empty in an old checkpoint.
        versions: of moesys, torch and Python; empty in an old checkpoint.
        files: [bytes, CRC-32] of the other files; empty in an old checkpoint.
        state: the JSON that the training loop saved.
    """

    path: Path
    step: int
    samples: int
    config: Mapping[str, Any]
    whole: bool
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
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


def skipping(path: Path) -> bool | None:
    """True if a checkpoint was written while steps were being skipped; None if it cannot be read."""
    try:
        state = read(path).state.get("skips")
    except CheckpointError:
        return None
    return isinstance(state, dict) and bool(state.get("consecutive"))


def newest_good(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder` that was not written while steps were being skipped, else the newest.

    One that cannot be read counts as good: whoever reads it says what is wrong.
    """
    found = complete(folder)
    good = (path for path in reversed(found) if not skipping(path))
    return next(good, found[-1] if found else None)


def previous(path: Path) -> Path | None:
    """The newest complete checkpoint beside `path` that is older, if any."""
    if not NAME.fullmatch(path.name):
        return None
    return next((p for p in reversed(complete(path.parent)) if step_of(p) < step_of(path)), None)


def damaged(path: Path, what: str) -> CheckpointError:
    """The error of a damaged checkpoint; its remedy names the checkpoint before it."""
    before = previous(path)
    aside = path.parent.parent / f"damaged-{path.name}"
    then = f"go on from {before.name}" if before else "start again from the beginning"
    remedy = f"move it away, and the same command will {then}: mv {path} {aside}"
    return CheckpointError(f"{path} is damaged: {what}\n    remedy: {remedy}")


def checksum(meta: Mapping[str, Any]) -> int:
    """The CRC-32 of a manifest, without the key "checksum"."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return zlib.crc32(json.dumps(json.loads(json_text(rest)), sort_keys=True).encode())


def read(path: Path) -> Meta:
    """The manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: it is missing or damaged.
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
    more = {key: found.get(key) or {} for key in ("tokenizer", "data", "versions", "files", "state")}
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
    for key in ("config", "model", "tokenizer", "data", "versions", "files", "state"):
        if not isinstance(found.get(key, {}), dict):
            return f"{META}: {key} must be an object"
    if not isinstance(found.get("config", found).get("model"), dict):
        return f"{META} lacks the model"
    for name, facts in found.get("files", {}).items():
        if not (isinstance(facts, list) and len(facts) == 2 and re.fullmatch(r"[\w.-]+", name)):
            return f"{META}: files must have the bytes and the checksum of each file"
    return None


def require_files(meta: Meta) -> None:
    """Raise CheckpointError if a file is missing or has another size."""
    for name, (size, _) in meta.files.items():
        if not (meta.path / name).is_file():
            raise damaged(meta.path, f"{name} is missing")
        if (found := (meta.path / name).stat().st_size) != size:
            raise damaged(meta.path, f"{name} has {found:,} bytes, and had {size:,} when it was written")


def incomplete(folder: Path) -> list[str]:
    """A line for each folder above the newest checkpoint that has a checkpoint's name and is incomplete."""
    last = newest(folder)
    above = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and not (p / META).exists()]
    return [
        f"{path} has no {META}, so it is not whole, and is not used"
        for path in sorted(above)
        if last is None or step_of(path) > step_of(last)
    ]


def crc32(path: Path) -> int:
    """The CRC-32 of a file; it differs for every change of up to 32 neighbouring bits."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def verify(folder: Path, files: Mapping[str, Any], part: int = 0, parts: int = 1) -> str | None:
    """The fault in every `parts`-th of the files, whose `checksums` are given; None if there is none."""
    for name in sorted(files)[part::parts]:
        size, expected = files[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, and had {size:,} when it was written"
            if crc32(folder / name) != expected:
                return f"{name} has changed since it was written: its checksum is another"
        except OSError as error:
            return f"{name} cannot be read: {(error.strerror or str(error)).lower()}"
    return None
