"""Opens a trained model: of a run, of a checkpoint of any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.config.schema import Config
from moesys.data.tokenizers import Tokenizer
from moesys.errors import CheckpointError
from moesys.models.decoder import Decoder
from moesys.models.decoding import dropless
from moesys.train import checkpoint, manifest, saved


@dataclass(frozen=True)
class OpenedModel:
    """A trained model for one process, with its tokenizer, and where it was read from."""

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    path: Path


def open_model(path: Path, device: torch.device | None = None) -> OpenedModel:
    """The model at `path`, a run's folder or a checkpoint, whole and on one device, without a capacity.

    It computes in the run's `train.dtype`; its weights are float32.

    Raises:
        MoesysError: there is no model, it is damaged, or its tokenizer is not known.
    """
    found = saved.find(path)
    meta = manifest.read(found)
    config = saved.configuration(meta)
    if config.model.moe is not None and config.model.moe.router.recorded:
        rule = f"gate {config.model.moe.gate.kind} routes tokens as a run recorded them, and new text was not"
        raise CheckpointError(f"{found}: {rule}\n    remedy: give a run with another gate")
    tokenizer = saved.tokenizer(meta, config)
    model = checkpoint.model(found, dropless, getattr(torch, config.train.dtype))
    return OpenedModel(config, model.to(device), tokenizer, found)
