"""Small released models, and what ranks read of them; importable by name in worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import connected, forget, join, start

from moesys.config import Config

EMBEDDING = "model.embed_tokens.weight"
"""The largest tensor."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_hidden_layers": 4,
    "vocab_size": 320,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def mixtral(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "60KB", **sizes: Any) -> Any:
    """Write a random Mixtral to `folder`, in several files; returns transformers' model."""
    import transformers

    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**(SIZES | sizes)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def read(cases: Mapping[str, Config], world: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each case, by rank: what it holds after reading, with names and places; bytes read, and held at once."""
    start(_work, world, dict(cases), folder)
    ranks = [torch.load(folder / f"read-{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [found[name] for found in ranks] for name in cases}


def _work(rank: int, world: int, cases: dict[str, Config], folder: Path) -> None:
    join(rank, world, folder)
    found = {}
    for name, config in cases.items():
        found[name] = _read(config)
        if config.engine == "native":
            forget()
    torch.save(found, folder / f"read-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _read(config: Config) -> dict[str, Any]:
    from moesys.hub.weights import ReleasedWeights
    from moesys.measure.peak_memory import peak_bytes
    from moesys.train import initial_weights
    from moesys.train.engine import engine_of
    from moesys.train.fill import read_released

    config, mesh = connected(config)
    place = initial_weights.find(config)
    assert place is not None and place.released is not None
    engine = engine_of(config).build(config, mesh, 320, draw=False)
    source = ReleasedWeights(place.released)
    for name, tensor in place.released.folder.tensors.items():
        source.files.read(name, [[0]] * len(tensor.shape))  # maps every file, which counts as memory and is none
    before = source.bytes_read
    peak = peak_bytes(lambda: read_released(engine, source), torch.device("cpu"))
    held = [(name, part.clone(), at) for name, part, at in engine.held()]
    read = source.bytes_read - before
    embedding = peak_bytes(lambda: source.files.read(EMBEDDING, (None, None)).clone(), torch.device("cpu"))
    return {"held": held, "bytes": read, "peak": peak, "embedding": embedding}
