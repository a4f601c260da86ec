"""Records the communication of any training loop: of this project's MoE layers, or of a foreign model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from moesys.config.schema import ClusterConfig
from moesys.errors import MoesysError
from moesys.measure.explain.averages import explain_run
from moesys.measure.explain.explanation import Explanation
from moesys.measure.explain.layer_sums import order
from moesys.measure.explain.step_summary import Summary
from moesys.measure.record.gather import LocalStep, gather_steps
from moesys.measure.record.module_tags import moe_modules, tagged
from moesys.measure.record.recorder import GATHER_EVERY, recorded_step, spans_of
from moesys.measure.record.world import GlooWorld
from moesys.moe.layer import moe_layers
from moesys.parallel import nodes

PARTS = tuple(itertools.product(("dispatch", "combine"), (False, True)))
"""The phases of a layer."""


class CommunicationRecorder:
    """Records the collectives of training steps on all ranks, and explains the time that all-to-all takes.

        recorder = moesys.CommunicationRecorder(model)
        for batch in batches:
            with recorder.step():
                train(batch)
        explanation = recorder.explain()
        if explanation is not None:      # on rank 0
            print(explanation.sentence)

    It records collectives that Python starts: those of `torch.distributed`, FSDP2, DTensor, and this project's MoE
    layers.
    Collectives that C++ starts, as DDP's sums of gradients, count as computation; `moesys report --trace` reads them
    from
    traces of torch.profiler. Outside of `step` nothing is slower.

    Args:
        model: the model, for the names of its layers. An all-to-all inside an MoE layer of a foreign model gets the
            name of
            the layer, its direction, and dispatch or combine. None: all-to-alls of all layers count together.
        layers: the classes of a foreign model's MoE layers; default: every module with a submodule `experts`.
        compiled: whether parts of the model are compiled. Collectives that are operators are then not recorded.

    Raises:
        MoesysError: there is no process group.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        layers: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
        compiled: bool = False,
    ):
        if not dist.is_initialized():
            remedy = "call torch.distributed.init_process_group first"
            raise MoesysError(f"there is no process group to record\n    remedy: {remedy}")
        backend, first = dist.get_backend(), next(model.parameters(), None) if model is not None else None
        # Times and names are gathered on the host; the world's own group may be of GPUs.
        group = dist.group.WORLD if "gloo" in backend else dist.new_group(backend="gloo")
        assert group is not None
        self._group, self._world, self._compiled = group, GlooWorld(group), compiled
        self._device = first.device if first is not None else torch.device("cuda" if backend == "nccl" else "cpu")
        own = {} if model is None else moe_layers(model)
        found = {} if model is None else moe_modules(model, layers)
        self._foreign = {name: module for name, module in found.items() if name not in own}
        self._own = {getattr(layer.dispatcher, "layer", "") or name for name, layer in own.items()}
        self._local: list[LocalStep] = []
        self._summaries: list[Summary] = []
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record the step inside, as forward, backward and update of a batch; the same on all ranks. Collective."""
        self._steps += 1
        step = recorded_step(self._steps, self._device, not self._compiled)
        with step as recording, tagged(self._foreign, recording.events):
            yield
        spans = list(spans_of(recording, {}))
        self._local.append(LocalStep(self._steps, recording.begin, recording.end, spans))
        if len(self._local) == GATHER_EVERY:
            self._gather()

    def explain(self) -> Explanation | None:
        """The explanation of all steps recorded so far, on rank 0; None without steps, and on other ranks. Collective.

        With more than four steps the first two are left out: they warm up.
        """
        self._gather()
        return explain_run(self._summaries)

    def _gather(self) -> None:
        if not self._local:
            return
        local, self._local = self._local, []
        rank, world = self._world.rank, self._world.size
        host = nodes.here(rank, world, ClusterConfig(nodes=1, ranks_per_node=world))
        names: list[list[str]] = [[] for _ in range(world)]
        dist.all_gather_object(names, sorted({*self._foreign, *self._own}), group=self._group)
        layers = sorted(set(itertools.chain(*names)))
        keys = sorted(((layer, *part) for layer in layers for part in PARTS), key=order)
        self._summaries += gather_steps(local, self._world, host, keys, {}, list(range(world))).summaries
