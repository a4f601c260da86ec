"""The plug-in on four ranks: beside Megatron-Core's own layer, over all layouts, and through checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dispatcher_ranks import together
from megatron_ranks import ALONE, JOURNEYS, OPTIONS, SIZES, everything

from moesys.megatron.weights import whole


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in SIZES if name not in ALONE])
def test_equals_megatrons_own_layer(found, name, options):
    for every in found:
        assert not every[f"{name}, {options}"], every[f"{name}, {options}"]


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ALONE])
def test_tokens_that_are_alike_come_out_alike_on_every_rank(found, name):
    for every in found:
        assert not every[f"alike {name}"], every[f"alike {name}"]


@pytest.mark.parametrize("name", SIZES)
def test_reduced_gradients_do_not_depend_on_the_layout(found, name):
    """Of the same four parts of a batch, by Megatron's data-parallel reduction."""
    expected = whole([every["reduced ep 4"][:2] for every in found])
    gradients = whole([every[f"reduced {name}"][:2] for every in found])
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    dense = found[0]["reduced ep 4"][2]["position"]
    for every in found:
        torch.testing.assert_close(every[f"reduced {name}"][2]["position"], dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("journey", JOURNEYS)
def test_checkpoints_change_the_layout_and_the_layer(found, journey):
    for every in found:
        assert not every[f"reshard {journey}"], every[f"reshard {journey}"]
