"""Communication tags for all-to-alls of a foreign model, by the module whose forward or backward ran.

Hooks note the begin of an MoE layer's forward and backward, and of its experts'. In forward, an all-to-all before the
experts is a dispatch and one after them a combine; in backward the other way round.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesys.parallel.comm import UNTAGGED, CollectiveRecord, Tag


@dataclass(eq=False)
class _Pass:
    """One pass through a layer.

    Attributes:
        events: numbers of its all-to-alls.
        experts_at: number of the first event after its experts began; None if they did not.
    """

    layer: str
    backward: bool
    experts_at: int | None = None
    events: list[int] = field(default_factory=list)


class _Passes:
    """The passes of a step, and the number of the first event of each."""

    def __init__(self, events: Sequence[CollectiveRecord]):
        self._events = events
        self._running: list[_Pass] = []
        self.starts: list[int] = []
        self.passes: list[_Pass | None] = []

    def begin(self, layer: str, backward: bool) -> None:
        """A pass of `layer` begins. No hook marks the end of a backward, so it ends when another begins."""
        if backward:
            self._running.clear()
        self._running.append(_Pass(layer, backward))
        self._mark()

    def end(self) -> None:
        """The forward that began last ends. A backward that recomputes it goes on."""
        if self._running:
            self._running.pop()
        self._mark()

    def experts(self) -> None:
        """The experts of the running pass begin."""
        if self._running and self._running[-1].experts_at is None:
            self._running[-1].experts_at = len(self._events)

    def _mark(self) -> None:
        self.starts.append(len(self._events))
        self.passes.append(self._running[-1] if self._running else None)

    def of(self, event: int) -> _Pass | None:
        """The pass that ran when an event started; None without one."""
        place = bisect_right(self.starts, event) - 1
        return self.passes[place] if place >= 0 else None


def moe_modules(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...] | None = None
) -> dict[str, nn.Module]:
    """The modules of these classes, by name; default: modules with a submodule `experts`."""
    if kinds is not None:
        return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "experts", None), nn.Module)}


@contextmanager
def tagged(layers: Mapping[str, nn.Module], events: Sequence[CollectiveRecord]) -> Iterator[None]:
    """A context that tags the all-to-alls recorded inside. Those without a tag get one from the passes of `layers`."""
    passes = _Passes(events)
    with ExitStack() as stack:
        for name, layer in layers.items():
            for handle in _hooks(name, layer, passes):
                stack.callback(handle.remove)
        yield
    visited: dict[int, _Pass] = {}
    for number, event in enumerate(events):
        if event.kind != "all_to_all" or event.tag != UNTAGGED or event.by:
            continue
        event.tag = Tag("flat")
        if (found := passes.of(number)) is not None:
            found.events.append(number)
            visited[id(found)] = found
    for one in visited.values():
        for number in one.events:
            events[number].tag = Tag("flat", one.layer, _part(one, number), one.backward)


def _part(one: _Pass, number: int) -> str:
    """"dispatch" or "combine".

    Without hooks of experts, combine is the last all-to-all of a forward and the first of a backward.
    """
    if one.experts_at is not None:
        after = number >= one.experts_at
    else:
        after = number != one.events[0] if one.backward else number == one.events[-1]
    return "combine" if after != one.backward else "dispatch"


def _hooks(name: str, layer: nn.Module, passes: _Passes) -> Iterator[RemovableHandle]:
    yield layer.register_forward_pre_hook(lambda *_: passes.begin(name, backward=False), prepend=True)

    def ended(module: nn.Module, inputs: Any, output: Any) -> None:
        passes.end()
        _before_backward(output, lambda: passes.begin(name, backward=True))

    # Recomputation in backward ends with an exception when it has all tensors.
    yield layer.register_forward_hook(ended, always_call=True)
    for expert in _experts(layer):
        yield expert.register_forward_pre_hook(lambda *_: passes.experts(), prepend=True)
        yield expert.register_forward_hook(lambda module, inputs, output: _before_backward(output, passes.experts))


def _experts(layer: nn.Module) -> Iterable[nn.Module]:
    """The module of all experts, or each expert of a list: the list itself is never called."""
    experts = getattr(layer, "experts", None)
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return experts.children()
    return [experts] if isinstance(experts, nn.Module) else []


def _before_backward(output: Any, call: Callable[[], None]) -> None:
    """Call when backward reaches a module's output.

    The hooks are of tensors. Hooks of modules would forbid to change the output in place.
    """
    if isinstance(output, Tensor):
        if output.requires_grad:
            output.register_hook(lambda grad: call())
        return
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    first = next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)
    if first is not None:
        _before_backward(first, call)
