"""Weights between Megatron-Core's layouts and this project's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.megatron.weights import Place, from_megatron, part, to_megatron, whole

E, H, F = 4, 6, 10


def drawn(gated: bool = True, bias: bool = False) -> dict[str, Tensor]:
    parts = 1 + gated
    found = {
        "gate.projection.weight": torch.randn(E, H),
        "gate.selection_bias": torch.randn(E),
        "mix.projection.weight": torch.randn(1, H),
        "experts.fc1": torch.randn(E, H, parts, F),
        "experts.fc2": torch.randn(E, F, H),
        "shared.up_proj.weight": torch.randn(8, H),
        "shared.down_proj.weight": torch.randn(H, 8),
    }
    if gated:
        found["shared.gate_proj.weight"] = torch.randn(8, H)
    if bias:
        found |= {"experts.fc1_bias": torch.randn(E, parts, F), "experts.fc2_bias": torch.randn(E, H)}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layout", ["sequential", "grouped", "legacy_grouped"])
def test_there_and_back(layout, gated):
    state = drawn(gated, bias=layout != "legacy_grouped")
    same(from_megatron(to_megatron(state, layout), gated), state)


def test_an_expert_computes_with_the_weights_of_its_linear_layers():
    """`SequentialMLP` and `TEGroupedMLP`: out = fc2 · (act(first half of fc1 · x) · second half)."""
    state, x = drawn(), torch.randn(H)
    for layout, name in (("sequential", "local_experts.2.linear_fc{}.weight"), ("grouped", "linear_fc{}.weight2")):
        theirs = to_megatron(state, layout)
        first, second = (theirs[f"experts.{name.format(n)}"] for n in (1, 2))
        gate, up = (first @ x).chunk(2)
        inner = torch.nn.functional.silu(torch.einsum("hgf,h->gf", state["experts.fc1"][2], x)[0])
        inner = inner * torch.einsum("hgf,h->gf", state["experts.fc1"][2], x)[1]
        torch.testing.assert_close(second @ (torch.nn.functional.silu(gate) * up), inner @ state["experts.fc2"][2])


def test_legacy_experts_are_viewed_as_megatron_views_them():
    """`GroupedMLP.forward`: weight1.view(E, H, -1) and weight2.view(E, -1, H), multiplied from the right."""
    state, x = drawn(), torch.randn(E, 3, H)
    theirs = to_megatron(state, "legacy_grouped")
    inner = torch.bmm(x, theirs["experts.weight1"].view(E, H, -1))
    torch.testing.assert_close(inner, torch.einsum("enh,ehgf->engf", x, state["experts.fc1"]).flatten(2))
    torch.testing.assert_close(theirs["experts.weight2"].view(E, -1, H), state["experts.fc2"])


def test_parts_make_the_whole():
    state = drawn()
    places = [Place(i, 2, j, 2, j, 2) for i in range(2) for j in range(2)]
    parts = [(place, part(state, place)) for place in places]
    assert parts[0][1]["experts.fc1"].shape == (E // 2, H, 2, F // 2)
    assert parts[0][1]["shared.down_proj.weight"].shape == (H, 4)
    same(whole(parts), state)


def test_unknown_weights_are_named():
    with pytest.raises(KeyError, match=r"fc1_latent_proj.weight"):
        from_megatron({"fc1_latent_proj.weight": torch.zeros(1)})
