"""Other systems' MoE layers for `moesys bench layer`: transformers', Megatron-Core's and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.distributed as dist

from moesys.benchmarks import megatron_layer, transformers_layer
from moesys.benchmarks.deepspeed_layer import DeepSpeedLayer
from moesys.measure import checkout
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.measure.layer_benchmark.other_systems import Layers, OtherSystems
from moesys.moe import MoELayer

SYSTEMS = {"transformers": "transformers", "megatron": "megatron-core", "deepspeed": "DeepSpeed"}
"""Their modules and names."""


def other_systems() -> OtherSystems:
    """Those that are installed here."""
    missing = [name for module, name in SYSTEMS.items() if not _installed(module)]
    said = f"not installed, and so not compared: {', '.join(missing)}" if missing else ""
    return OtherSystems(on_one_device, over_ranks, said)


def on_one_device(layer: MoELayer, shape: LayerShape) -> Layers:
    """transformers' block by each of its implementations."""
    return {f"transformers {name}": block for name, block in transformers_layer.blocks(layer, shape).items()}


@contextmanager
def over_ranks(layer: MoELayer, shape: LayerShape, dtype: torch.dtype) -> Iterator[Layers]:
    """Megatron-Core's layer with each of its dispatchers, and DeepSpeed's; of those that are installed."""
    with megatron_layer.layers(layer, shape.experts, shape.top_k, dist.get_world_size()) as found:
        if _installed("deepspeed"):
            size = (shape.hidden, shape.ffn_hidden, shape.experts, shape.top_k)
            found["deepspeed"] = DeepSpeedLayer(*size, dtype)
        yield found


def _installed(module: str) -> bool:
    with checkout.hidden():
        return find_spec(module) is not None
