"""How many operations a step begins: small steps are made of small ones, and each costs more to begin than to do."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesys import shipped
from moesys.config.load import load
from moesys.config.schema import ModelConfig
from moesys.models.decoder import Decoder
from moesys.parallel.loss import TokenLoss

BLOCK = 147
"""Operations of an MoE block of the quickstart, forward and backward: 180 before they were counted."""

REST = 35
"""Of all that is not a block: embedding, rotary tables, the last norm, head and loss."""


class Operations(TorchDispatchMode):
    """Counts what is computed or copied: views begin nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        found = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        if func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in given for x in found):
            self.count += 1
        return out


def operations(layers: int) -> int:
    """Of a forward and a backward pass."""
    torch.manual_seed(0)
    path = Path(shipped.CONFIGS / "quickstart.yaml")
    config = load(path, [f"model.layers={layers}"]).config.model
    assert isinstance(config, ModelConfig)
    model = Decoder(config, 64)
    ids = torch.randint(64, (2, 16))
    loss = TokenLoss(ids.numel())
    loss(model(ids), ids).backward()  # what is made at the first pass
    with Operations() as found:
        loss(model(ids), ids).backward()
    return found.count


def test_a_block_begins_no_more_operations_than_its_budget():
    one, three = operations(1), operations(3)
    block = (three - one) / 2
    assert block <= BLOCK, f"{block} operations"
    assert one - block <= REST, f"{one - block} operations"
