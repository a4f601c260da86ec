"""Checkpoints: complete or absent, and independent of the layout under which they were written.

The engine writes its tensors to a temporary folder, which is renamed when all ranks are done.
`docs/launching.md` has the content of moesys.json.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesys.config.changes import Change
from moesys.config.differences import saved_form
from moesys.config.schema import Config
from moesys.data.corpus import Corpus
from moesys.data.tokenizers import HFTokenizer
from moesys.files import write_json
from moesys.models.decoder import Decoder
from moesys.models.empty import empty
from moesys.moe.layer import moe_layers
from moesys.parallel.initialise import canonical
from moesys.train import manifest, resume, saved, storage
from moesys.train.engine import Engine
from moesys.train.manifest import META, complete, damaged, read
from moesys.train.manifest import newest as newest
from moesys.version import __version__

PARTIAL = re.compile(r"\.partial-\d{8,}")
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class ResumePoint:
    """The place at which a run goes on: after `step` steps and `samples` sequences, with the `changes` since.

    `fresh` names tensors that the checkpoint lacks, which thus begin as in a new run; `state` is as it was saved.
    """

    step: int
    samples: int
    changes: list[Change]
    fresh: list[str]
    state: Mapping[str, Any]


def save(
    folder: Path,
    engine: Engine,
    corpus: Corpus,
    step: int,
    samples: int,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder`/step-N and remove `surplus` checkpoints. Collective over the world.

    `state`: JSON that moesys.json keeps and `load` returns; "skips" counts skipped steps, "consecutive" and "total".

    Raises:
        CheckpointError: it cannot be written.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    first = dist.get_rank() == 0
    if first:
        with _writing(final):
            _begin(partial, corpus)
    dist.barrier()
    engine.save(partial)
    dist.barrier()
    files = _all_checksums(partial)
    if first:
        meta = {"step": step, "samples": samples, **_facts(engine, corpus), "state": dict(state or {}), "files": files}
        with _writing(final):
            write_json(partial / META, meta | {"checksum": manifest.checksum(meta)})
            _remove(final)
            os.replace(partial, final)
        for old in surplus(folder, engine.config.output.keep):
            _remove(old)
    dist.barrier()
    return final


def surplus(folder: Path, keep: int) -> list[Path]:
    """Checkpoints that are no longer needed, the oldest first: all but the newest `keep` good ones and the newest.

    A good one was written after a step that updated. One that was written while steps were being skipped can be resumed
    from, but replaces no good one: it is not known yet whether training recovers. One with an unreadable moesys.json
    replaces none either, and stays: the disk may be at fault, and a person may repair it.
    """
    found = complete(folder)
    skipping = {path: manifest.skipping(path) for path in found}
    good = [path for path in found if skipping[path] is False]
    needed = {*good[-keep:], *found[-1:]}
    return [path for path in found if path not in needed and skipping[path] is not None]


def _begin(partial: Path, corpus: Corpus) -> None:
    """Make the folder, with the tokenizer in it, and remove unfinished ones."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.iterdir():
        if PARTIAL.fullmatch(left.name):
            _remove(left)
    partial.mkdir()
    if isinstance(corpus.tokenizer, HFTokenizer):
        (partial / TOKENIZER).write_bytes(corpus.tokenizer.content)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage.unwritten(path, error) from None


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _all_checksums(folder: Path) -> dict[str, list[int]]:
    """Checksums of all files in a folder, each computed by the rank that wrote it. Collective over the world."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, storage.checksums(folder, dist.get_rank()))
    return {name: facts for part in parts for name, facts in part.items()}


def _facts(engine: Engine, corpus: Corpus) -> dict[str, Any]:
    """The facts that a checkpoint needs to be used without its run; docs/launching.md lists them."""
    config, tokenizer = engine.config, corpus.tokenizer
    model = config.model.model_copy(update={"vocab_size": corpus.vocab_size})
    own = isinstance(tokenizer, HFTokenizer)
    return {
        "engine": config.engine,
        "vocab_size": corpus.vocab_size,
        "dtype": {"weights": str(engine.dtype).removeprefix("torch."), "computation": config.train.dtype},
        "seed": config.seed,
        "tokenizer": {
            "kind": TOKENIZER if own else "bytes",
            "name": config.data.tokenizer,
            "identity": tokenizer.identity,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
        },
        "data": corpus.fingerprint,
        "versions": {"moesys": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "world_size": dist.get_world_size(),
        "layout": asdict(engine.mesh.degrees),
        "config": saved_form(config.model_copy(update={"model": model})),
    }


def load(path: Path, engine: Engine, corpus: Corpus) -> ResumePoint:
    """Restore the engine from a checkpoint. Collective over the world.

    Raises:
        CheckpointError: damaged, or not of this run; see `resume.require_compatible`.
    """
    config = engine.config
    meta = read(path)
    changes = resume.require_compatible(meta, config, corpus.fingerprint)
    wrong = manifest.verify(path, meta.files, dist.get_rank(), dist.get_world_size())
    storage.agree(str(damaged(path, wrong)) if wrong else None)
    fresh = engine.load(path)
    return ResumePoint(meta.step, _samples(meta, config), changes, sorted(fresh), meta.state)


def _samples(meta: manifest.Meta, config: Config) -> int:
    """Samples seen, counted in sequences of the run's present length: the same share of an epoch."""
    length = meta.config.get("train", {}).get("seq_len", config.train.seq_len)
    return -(-meta.samples * length // config.train.seq_len)


def model(path: Path) -> Decoder:
    """The model in a checkpoint, on the CPU in float32, for one process and without anything of its run.

    Raises:
        CheckpointError: damaged.
    """
    meta = read(path)
    config = saved.configuration(meta).model
    assert config.vocab_size is not None
    found = empty(config, config.vocab_size)
    read_into(found, meta)
    return found


def read_into(found: Decoder, meta: manifest.Meta) -> None:
    """Give a whole model on one device the weights and gates' buffers of a checkpoint of it.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    path = meta.path
    if wrong := manifest.verify(path, meta.files):
        raise damaged(path, wrong)
    metadata, tied = storage.read_metadata(path), found.config.tie_embeddings
    state: dict[str, Any] = {canonical(n, tied): p.detach() for n, p in found.named_parameters()}
    for name, layer in moe_layers(found).items():
        for key, buffer in _buffers(metadata, f"{name}.gate."):
            setattr(layer.gate, key, buffer.to(next(found.parameters()).device))
            state[f"{name}.gate.{key}"] = getattr(layer.gate, key)
    storage.load({"model": state}, path)


def _buffers(metadata: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """Empty tensors for the buffers of a gate, by their names in the checkpoint."""
    start = f"model.{prefix}"
    inside = {k.removeprefix(start): t for k, t in metadata.state_dict_metadata.items() if k.startswith(start)}
    names = [name for name in inside if "." not in name]
    return [(name, torch.empty(inside[name].size, dtype=inside[name].properties.dtype)) for name in names]
