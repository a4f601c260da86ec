"""Exports a checkpoint of any layout as a released model's folder, in one process, a shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moesys.config.schema import Config, ModelConfig
from moesys.data.tokenizers import Tokenizer
from moesys.hub import folder as released
from moesys.hub import tokenizer
from moesys.hub.choose import choose
from moesys.hub.family import Family
from moesys.hub.fit import stored
from moesys.hub.mapping import Box, Stored, meet, sizes, whole
from moesys.hub.writer import FolderWriter, Planned
from moesys.models.parts.axes import Weight
from moesys.train import manifest, saved
from moesys.train.storage_parts import PartReader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9

Progress = Callable[[float, str], None]
"""Is told the share that is done, and of what."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        to: the folder.
        family: its `model_type`.
        tensors, bytes, files: their number and sizes.
    """

    to: Path
    family: str
    tensors: int
    bytes: int
    files: int


def export(
    checkpoint: Path,
    to: Path,
    dtype: str | None = None,
    shard_size: int = SHARD_BYTES,
    family: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the model of `checkpoint` to the new folder `to`.

    Args:
        dtype: "float32" or "bfloat16"; None: the type that the run computed in.
        shard_size: bytes of a file, at most; what is held in memory at once is a shard and one weight.
        family: `model_type` of the files; None: that of the folder which the run started from, or one that fits.

    Raises:
        CheckpointError: the checkpoint is damaged or without its configuration.
        NoFamily: no family's files can hold the model.
        FileError: `to` exists or cannot be written.
    """
    meta = manifest.read(checkpoint)
    if wrong := manifest.verify(checkpoint, meta.files):
        raise manifest.damaged(checkpoint, wrong)
    config = saved.configuration(meta)
    model, origin = config.model, _origin(config)
    assert model.vocab_size is not None
    chosen = choose(model, family or _family_of(origin))
    kind = DTYPES[dtype or config.train.dtype]
    written = Tensors(chosen, model, PartReader(checkpoint), kind, shard_size)
    planned = list(written.planned())
    total, done = sum(p.bytes for p in planned), 0
    with FolderWriter(to, planned, shard_size) as writer:
        for name, tensor in written:
            writer.add(name, tensor)
            done += tensor.nbytes
            if progress is not None:
                progress(done / total, name)
        text = saved.tokenizer(meta, config)
        facts = chosen.write(model) | _facts(config, kind, text)
        writer.finish(facts, _generation(text), tokenizer.files(text, origin))
    return Exported(to, chosen.kind, len(planned), total, len(set(writer.files.values())))


def _origin(config: Config) -> Path | None:
    """The released model's folder that the run started from, if it is still there."""
    init = config.train.init
    return Path(init) if init and released.is_folder(Path(init)) else None


def _family_of(origin: Path | None) -> str | None:
    return None if origin is None else str(released.open_folder(origin).config.get("model_type"))


def _groups(weight: Weight, limit: int) -> Iterator[Box]:
    """The parts in which a weight is read: all of it, or as many of its experts as a shard holds."""
    full = whole(weight.shape)
    rows = weight.shape[0]
    per_row = 4 * prod(weight.shape[1:])
    step = rows if not weight.routed else max(1, min(rows, limit // max(1, per_row)))
    for start in range(0, rows, step):
        yield ((start, min(rows, start + step)), *full[1:])


def _order(weight: Weight, tensors: Sequence[Stored], limit: int) -> Iterator[tuple[Box, list[Stored]]]:
    """Each part that is read with the tensors that lie in it; tensors of several parts are read whole."""
    groups = [(box, [s for s in tensors if meet(box, s.box) == s.box]) for box in _groups(weight, limit)]
    if sum(len(inside) for _, inside in groups) == len(tensors):
        yield from groups
    else:
        yield whole(weight.shape), list(tensors)


class Reader(Protocol):
    """Gives parts of weights."""

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The part of a weight of shape `size` that begins at `start`, float32."""
        ...


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model as a family's files have them, one after another.

    Attributes:
        family, model: what is written; the model has its `vocab_size`.
        reader: gives parts of our weights.
        dtype: type of the tensors that need not stay float32.
        limit: bytes that are read at once, if experts are many.
    """

    family: Family
    model: ModelConfig
    reader: Reader
    dtype: torch.dtype
    limit: int

    def planned(self) -> Iterator[Planned]:
        """Every tensor, in their order."""
        for weight, tensors in self._sources():
            for _, inside in _order(weight, tensors, self.limit):
                for s in inside:
                    yield Planned(s.name, s.shape, self._dtype(s))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        joined = self._joined()
        for weight, tensors in self._sources():
            for box, inside in _order(weight, tensors, self.limit):
                part = self.reader.read(weight.name, tuple(start for start, _ in box), sizes(box))
                for s in inside:
                    place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(s.box, box, strict=True))
                    found = _stored(part[place], s)
                    for other, its in joined.get(s.name, ())[1:]:
                        more = _stored(self.reader.read(other.name, (0,) * len(other.shape), other.shape), its)
                        rows = torch.tensor(its.rows)
                        found[rows] = more[rows]
                    yield s.name, found.to(self._dtype(s))

    def _dtype(self, s: Stored) -> torch.dtype:
        return torch.float32 if s.float32 else self.dtype

    def _every(self) -> dict[str, tuple[Weight, Sequence[Stored]]]:
        """By its name each of our weights, and the tensors that hold it."""
        size = self.model.vocab_size
        assert size is not None
        weights = {weight.name: weight for weight in self.family.weights(self.model, size)}
        return {name: (weights[name], s) for name, s in stored(self.family, self.model, size).items()}

    def _joined(self) -> dict[str, list[tuple[Weight, Stored]]]:
        """By their names the tensors that hold rows of several weights."""
        found: dict[str, list[tuple[Weight, Stored]]] = {}
        for weight, tensors in self._every().values():
            for s in tensors:
                if s.height is not None:
                    found.setdefault(s.name, []).append((weight, s))
        return found

    def _sources(self) -> Iterator[tuple[Weight, Sequence[Stored]]]:
        """Our weights and the tensors that are made from each, joined ones once; then copies."""
        every, joined = self._every(), self._joined()
        for name, (weight, tensors) in every.items():
            kept = [s for s in tensors if s.height is None or joined[s.name][0][0].name == name]
            if kept:
                yield weight, kept
        for copy, name in self.family.copies(self.model).items():
            weight, tensors = every[name]
            yield weight, [replace(s, name=copy) for s in tensors]


def _stored(part: Tensor, s: Stored) -> Tensor:
    """A part of a weight in the order of the files' tensor."""
    order = [d for run in s.dims for d in run]
    rest = [d for d in range(part.ndim) if d not in order]
    found = part.permute(*rest, *order).reshape(s.shape if s.height is None else (-1, *s.shape[1:]))
    if s.rows is None:
        return found
    out = found.new_zeros(s.shape)
    out[torch.tensor(s.rows)] = found
    return out


def _facts(config: Config, dtype: torch.dtype, text: Tokenizer) -> dict[str, Any]:
    """What config.json says beside the family's keys."""
    name, longest = str(dtype).removeprefix("torch."), config.train.seq_len
    if (scaling := config.model.rope_scaling) is not None and scaling.original_seq_len is not None:
        longest = max(longest, int((scaling.factor or 1.0) * scaling.original_seq_len))
    return {
        "torch_dtype": name,
        "dtype": name,
        "max_position_embeddings": longest,
        "use_cache": True,
        "eos_token_id": text.end_of_document,
        "bos_token_id": None,
    }


def _generation(text: Tokenizer) -> dict[str, Any]:
    return {"eos_token_id": text.end_of_document, "do_sample": True}
