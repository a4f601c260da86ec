"""Writes a folder of a released model: safetensors shards with their index, complete or absent.

Tensors come one after another; at most one shard of them is held.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moesys.errors import FileError
from moesys.files import write_json
from moesys.hub.folder import CONFIG, ENDING, INDEX

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: its name, shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def shard_bytes(text: str) -> int:
    """The bytes of a size such as 5GB or 200MB.

    Raises:
        FileError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise FileError(f"--shard-size {text!r} is no size\n    remedy: write it as 5GB or 200MB")
    return max(1, int(float(match[1]) * UNITS[match[2]]))


class FolderWriter:
    """A folder in the making. As a context manager it is published at its end, and removed after an error.

    Args:
        to: the folder, which must not exist.
        planned: every tensor, in the order in which they will be given.
        size: bytes of a shard at most; a larger tensor has its own.

    Raises:
        FileError: `to` exists, or cannot be written.
    """

    def __init__(self, to: Path, planned: Sequence[Planned], size: int):
        self.to, self.planned = to, planned
        self.partial = to.parent / f".partial-{to.name}"
        self.files = self._files(size)
        """By tensor, its file."""
        self._left = deque(tensor.name for tensor in planned)
        self._held: dict[str, Tensor] = {}
        if to.exists():
            raise FileError(f"{to} exists already\n    remedy: choose another folder, or remove it")

    def _files(self, size: int) -> dict[str, str]:
        """The file of each tensor."""
        shards: list[list[str]] = [[]]
        held = 0
        for tensor in self.planned:
            if shards[-1] and held + tensor.bytes > size:
                shards.append([])
                held = 0
            shards[-1].append(tensor.name)
            held += tensor.bytes
        if len(shards) == 1:
            return dict.fromkeys(shards[0], f"model{ENDING}")
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}{ENDING}" for number in range(1, count + 1)]
        return {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}

    def __enter__(self) -> FolderWriter:
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise self._unwritten(error) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        assert not self._left, self._left
        os.replace(self.partial, self.to)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor [...], of the planned shape and type."""
        assert name == self._left.popleft()
        file = self.files[name]
        self._held[name] = tensor.contiguous()
        if not self._left or self.files[self._left[0]] != file:
            self._save(file)

    def _save(self, file: str) -> None:
        try:
            save_file(self._held, self.partial / file, metadata={"format": "pt"})
            with (self.partial / file).open("rb") as written:
                os.fsync(written.fileno())
        except (OSError, SafetensorError) as error:
            raise self._unwritten(error) from None
        self._held = {}

    def finish(self, config: dict[str, Any], generation: dict[str, Any], others: dict[str, bytes]) -> None:
        """Write the index, the configurations, and `others` by their names."""
        total = sum(tensor.bytes for tensor in self.planned)
        try:
            if len(set(self.files.values())) > 1:
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.files.items()))}
                write_json(self.partial / INDEX, index)
            write_json(self.partial / CONFIG, config, indent=2)
            write_json(self.partial / "generation_config.json", generation, indent=2)
            for name, content in others.items():
                (self.partial / name).write_bytes(content)
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: BaseException) -> FileError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return FileError(f"{self.to} cannot be written: {reason}\n    remedy: make room, or choose another folder")
