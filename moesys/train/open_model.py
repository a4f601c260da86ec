"""Opens a trained model: of a run, of a checkpoint of any layout, of a released model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.config.schema import Config
from moesys.config.values import config_of
from moesys.data.tokenizers import HFTokenizer, Tokenizer
from moesys.errors import CheckpointError, ConfigError, FileError
from moesys.hub import folder
from moesys.hub.derive import TOKENIZER, released
from moesys.hub.family import nested
from moesys.hub.fit import fit
from moesys.hub.weights import ReleasedWeights
from moesys.models.decoder import Decoder
from moesys.models.decoding import dropless
from moesys.models.empty import empty
from moesys.parallel.initialise import canonical, held
from moesys.train import checkpoint, manifest, saved


@dataclass(frozen=True)
class OpenedModel:
    """A trained model for one process, with its tokenizer, and where it was read from.

    `config`: of the run; of a released model the model alone is meant, the rest is default. `sequence`: tokens of the
    longest sequences of its training, as far as that is known.
    """

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    path: Path
    sequence: int | None


def open_model(path: Path, device: torch.device | None = None) -> OpenedModel:
    """The model at `path`, a run's folder, a checkpoint or a released model's folder, whole and on one device.

    It has no capacity. It computes in the run's `train.dtype`, or in the released model's type, and holds matrices in
    this type.

    Raises:
        MoesysError: there is no model, it is damaged, it cannot be represented, or its tokenizer is not known.
    """
    found = saved.find(path)
    return _released(found, device) if folder.is_folder(found) else _checkpoint(found, device)


def _checkpoint(path: Path, device: torch.device | None) -> OpenedModel:
    meta = manifest.read(path)
    config = saved.configuration(meta)
    if config.model.moe is not None and config.model.moe.router.recorded:
        rule = f"gate {config.model.moe.gate.kind} routes tokens as a run recorded them, and new text was not"
        raise CheckpointError(f"{path}: {rule}\n    remedy: give a run with another gate")
    tokenizer = saved.tokenizer(meta, config)
    model = _empty(config, getattr(torch, config.train.dtype), device)
    checkpoint.read_into(model, meta)
    return OpenedModel(config, model, tokenizer, path, config.train.seq_len)


@torch.no_grad()
def _released(path: Path, device: torch.device | None) -> OpenedModel:
    source = released(path)
    if source.problems:
        raise ConfigError(source.problems)
    if source.tokenizer is None:
        rule = f"{path} has no {TOKENIZER}"
        raise FileError(f"{rule}\n    remedy: save its fast tokenizer there: AutoTokenizer, then save_pretrained")
    config = config_of({"model": nested(source.derived.values)})
    assert config.model.vocab_size is not None
    fitted = fit(source.folder, config.model, config.model.vocab_size)
    kind = source.folder.config.get("dtype") or source.folder.config.get("torch_dtype")
    model = _empty(config, torch.bfloat16 if kind in ("bfloat16", "float16") else torch.float32, device)
    weights = ReleasedWeights(fitted)
    tied = config.model.tie_embeddings
    tensors = {canonical(name, tied): p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())
    for name, tensor in tensors.items():
        part, place = held(tensor)
        weights.read_into(part, name, tuple((at.start, at.stop) for at in place))
    longest = source.folder.config.get("max_position_embeddings")
    return OpenedModel(
        config, model, HFTokenizer(source.tokenizer), path, longest if isinstance(longest, int) else None
    )


def _empty(config: Config, dtype: torch.dtype, device: torch.device | None) -> Decoder:
    assert config.model.vocab_size is not None
    return empty(dropless(config.model), config.model.vocab_size, dtype, device, narrow=True)
