"""How many operations a step begins: small steps are made of small ones, and each costs more to begin than to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from operations import operations, python_calls

from moesys import shipped
from moesys.config.load import load
from moesys.config.schema import ModelConfig
from moesys.models.decoder import Decoder
from moesys.parallel.loss import TokenLoss

BLOCK = 171
"""Operations of an MoE block of the quickstart, forward and backward, those of its experts too."""

REST = 35
"""Of all that is not a block: embedding, rotary tables, the last norm, head and loss."""

CALLS = 720
"""Functions that Python calls for a block, forward and backward."""


def a_pass(layers: int) -> Callable[[], None]:
    """A forward and a backward pass of the quickstart's model; not the first, which makes what all share."""
    torch.manual_seed(0)
    path = Path(shipped.CONFIGS / "quickstart.yaml")
    config = load(path, [f"model.layers={layers}"]).config.model
    assert isinstance(config, ModelConfig)
    model = Decoder(config, 64)
    ids = torch.randint(64, (2, 16))
    loss = TokenLoss(ids.numel())

    def run() -> None:
        loss(model(ids), ids).backward()

    run()
    return run


@pytest.fixture(scope="module")
def passes() -> tuple[Callable[[], None], Callable[[], None]]:
    """Passes of one block and of three."""
    return a_pass(1), a_pass(3)


def test_a_block_begins_no_more_operations_than_its_budget(passes):
    one, three = (operations(run).total() for run in passes)
    block = (three - one) / 2
    assert block <= BLOCK, f"{block} operations"
    assert one - block <= REST, f"{one - block} operations"


def test_a_block_calls_no_more_functions_than_its_budget(passes):
    one, three = map(python_calls, passes)
    assert (three - one) / 2 <= CALLS, f"{(three - one) / 2} calls"
