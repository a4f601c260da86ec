"""All-to-alls of foreign modules are tagged by layer, direction, and dispatch or combine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesys.measure.record.module_tags import moe_modules, tagged
from moesys.parallel.comm import CollectiveRecord, Tag

events: list[CollectiveRecord] = []


class Exchange(torch.autograd.Function):
    """Records an all-to-all in place of one, in forward and backward."""

    @staticmethod
    def forward(ctx, x):
        events.append(CollectiveRecord("all_to_all", 8, 0.0, 0.0, 0.0))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad)


class Layer(nn.Module):
    """Counts and rows go to experts, rows come back."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        Exchange.apply(torch.ones(2))  # counts: no gradient
        x = Exchange.apply(x)
        x = self.experts[0](x) if isinstance(self.experts, nn.ModuleList) else self.experts(x)
        out = Exchange.apply(x)
        out += 1.0  # a change in place, which hooks of modules would forbid
        return out


class Hidden(nn.Module):
    """The same, with experts that no module shows."""

    def forward(self, x: Tensor) -> Tensor:
        return Exchange.apply(2 * Exchange.apply(Exchange.apply(x)))


def tags(model: nn.Module, layers: dict[str, nn.Module], recompute: bool = False) -> list[tuple[str, str, bool]]:
    events.clear()
    x = torch.ones(2, 3, requires_grad=True)
    with tagged(layers, events):
        out = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        out.sum().backward()
    assert all(event.tag.level == "flat" for event in events)
    return [(event.tag.layer, event.tag.part, event.tag.backward) for event in events]


@pytest.mark.parametrize("experts", [nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])])
def test_what_comes_before_experts_is_dispatch_and_after_them_combine(experts):
    model = nn.Sequential(Layer(experts), nn.Linear(3, 3), Layer(experts))
    layers = moe_modules(model)
    assert list(layers) == ["0", "2"]
    forward = [("dispatch", False), ("dispatch", False), ("combine", False)]
    backward = [("combine", True), ("dispatch", True)]
    both = [*(("0", *way) for way in forward), *(("2", *way) for way in forward)]
    assert tags(model, layers) == [*both, *(("2", *way) for way in backward), *(("0", *way) for way in backward)]
    # Backward recomputes when it needs the experts' input, and ends that before what nobody needs, the last combine.
    rest = [("2", *backward[1]), *(("0", *way) for way in backward)]
    again = [*both, ("2", *backward[0]), *both[:-1], *rest]
    assert tags(model, layers, recompute=True) == again
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "hooks are gone"


def test_without_visible_experts_the_last_of_a_forward_and_the_first_of_a_backward_are_combine():
    model = nn.Sequential(Hidden())
    found = tags(model, moe_modules(model, Hidden))
    forward = [("0", "dispatch", False), ("0", "dispatch", False), ("0", "combine", False)]
    assert found == [*forward, ("0", "combine", True), ("0", "dispatch", True), ("0", "dispatch", True)]


def test_outside_of_layers_only_the_kind_is_known_and_other_tags_stay():
    events.clear()
    with tagged({}, events):
        for kind, by, tag in (
            ("all_to_all", "", Tag()),
            ("all_gather", "", Tag()),
            ("all_to_all", "tensor", Tag()),
            ("all_to_all", "", Tag("intra", "x", "combine")),
        ):
            events.append(CollectiveRecord(kind, 8, 0.0, 0.0, 0.0, tag, by=by))
    assert [event.tag for event in events] == [Tag("flat"), Tag(), Tag(), Tag("intra", "x", "combine")]
