"""A user's own model and loops, as ranks run them: DDP, FSDP2 or plain, with experts over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import moesys

WORLD = 4
VOCABULARY, HIDDEN, EXPERTS = 17, 12, 4
MICRO_BATCHES = 2
"""Of each rank and step, accumulated."""
MAX_NORM = 0.1


class Block(nn.Module):
    """Causal means of the tokens before, then experts: [B, S, H] → [B, S, H]."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        gate = moesys.TopKGate(
            HIDDEN, EXPERTS, 2, bias_rate=0.01, balance=moesys.Balance(balance=0.1, z=0.01, global_balance=0.05)
        )
        self.moe = moesys.MoELayer(
            gate, moesys.Experts(EXPERTS, HIDDEN, 8, bias=bias), shared=nn.Linear(HIDDEN, HIDDEN)
        )

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1)[:, None]
        x = x + self.mix(x.cumsum(1) / counts)
        return x + self.moe(x)


class Model(nn.Module):
    """Nothing of it is the project's but the MoE layers in its blocks: tokens [B, S] → logits [B, S, V]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList([Block(bias=False), Block(bias=True)])
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels int64 [2, 5]."""
    generator = torch.Generator().manual_seed(100 * rank + number)
    tokens = torch.randint(VOCABULARY, (2, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, rank: int, number: int) -> Tensor:
    """Mean cross-entropy."""
    tokens, labels = batch(rank, number)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


def alone() -> dict[str, Any]:
    """One process that computes the micro-batches of all ranks, one after another."""
    model, total = Model(), 0.0
    passes = WORLD * MICRO_BATCHES
    for layer in moesys.moe_layers(model).values():
        layer.loss_scale = 1 / passes
    for number in range(MICRO_BATCHES):
        _count(model, number)
        for rank in range(WORLD):
            loss = loss_of(model, rank, number) / passes
            loss.backward()
            total += loss.item()
    gradients = _gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    return {"loss": total, "gradients": gradients, "norm": norm.double(), "clipped": _gradients(model)}


def _count(model: nn.Module, number: int) -> None:
    """Tell gates the load of the ranks' passes `number`, which these ask each other for."""
    gates = [layer.gate for layer in moesys.moe_layers(model).values()]
    for gate in gates:
        gate.skip_step()
    with torch.no_grad():
        for rank in range(WORLD):
            loss_of(model, rank, number)
    for gate in gates:
        gate.before_step(gate.step_statistics())


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad
        found[name.removeprefix("module.")] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def together(rank: int, data: int, loop: str, groups: bool, gradients: str, options: dict[str, Any]) -> dict[str, Any]:
    """This rank's loss, its whole gradients, and both after clipping; experts over WORLD / data ranks."""
    model = Model()
    if rank:  # everything starts as on the first rank, as with DDP
        with torch.no_grad():
            for layer in moesys.moe_layers(model).values():
                layer.experts.fc1.add_(1.0)
    if groups:
        expert, copies = _groups(rank, data)
        moesys.expert_parallel(model, expert, copies, gradients=gradients, **options)
    else:
        mesh = init_device_mesh("cpu", (data, WORLD // data), mesh_dim_names=("data", "expert"))
        moesys.expert_parallel(model, mesh, gradients=gradients, **options)
    for layer in moesys.moe_layers(model).values():
        layer.loss_scale /= MICRO_BATCHES
    passes = MICRO_BATCHES * (WORLD if gradients == "sum" else 1)
    wrapped = LOOPS[loop](model)
    total = 0.0
    for number in range(MICRO_BATCHES):
        if loop == "fsdp" and data == 2:  # gradients are summed once, after the last
            wrapped.set_requires_gradient_sync(number == MICRO_BATCHES - 1)
        loss = loss_of(wrapped, rank, number) / passes
        loss.backward()
        total += loss.item()
    if loop == "plain":
        for name, p in model.named_parameters():
            if ".experts." not in name:
                dist.all_reduce(p.grad)
                p.grad /= WORLD if gradients == "mean" else 1
    found = _gradients(wrapped)
    norm = moesys.clip_grad_norm_(wrapped.parameters(), MAX_NORM)
    return {"loss": total, "gradients": found, "norm": norm, "clipped": _gradients(wrapped)}


def _groups(rank: int, data: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    size = WORLD // data
    expert, _ = dist.new_subgroups_by_enumeration([list(range(i * size, (i + 1) * size)) for i in range(data)])
    if data == 1:
        return dist.group.WORLD, None
    copies, _ = dist.new_subgroups_by_enumeration([list(range(i, WORLD, size)) for i in range(size)])
    return expert, copies


def _fsdp(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


LOOPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp": _fsdp,
    "plain": lambda model: model,
}


def biases(rank: int, data: int) -> list[Tensor]:
    """Selection biases after a step of a gate that follows the load, of each layer."""
    model = Model()
    if data:
        mesh = init_device_mesh("cpu", (data, WORLD // data), mesh_dim_names=("data", "expert"))
        moesys.expert_parallel(model, mesh)
        loss_of(model, rank, 0)
    else:
        for other in range(WORLD):
            loss_of(model, other, 0)
    moesys.update_gates(model)
    return [layer.gate.selection_bias.clone() for layer in moesys.moe_layers(model).values()]


def refusals(rank: int) -> list[str]:
    """What is said to groups and models that do not fit."""
    pair, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    wrong: list[Callable[[], object]] = [
        lambda: moesys.expert_parallel(nn.Linear(2, 2), dist.group.WORLD),
        lambda: moesys.expert_parallel(Model(), pair),
        lambda: moesys.expert_parallel(Model(), pair, pair),
        lambda: moesys.expert_parallel(Model(), init_device_mesh("cpu", (2, 2))),
        lambda: moesys.expert_parallel(
            moesys.MoELayer(moesys.TopKGate(4, 6, 1), moesys.Experts(6, 4, 4)), dist.group.WORLD
        ),
        lambda: moesys.expert_parallel(moesys.expert_parallel(Model(), dist.group.WORLD), dist.group.WORLD),
    ]
    wrong += [
        lambda: moesys.expert_parallel(Model(), dist.group.WORLD, dispatcher="all_too_all"),
        lambda: moesys.expert_parallel(Model(), dist.group.WORLD, chunks=0),
        lambda: moesys.expert_parallel(Model(), dist.group.WORLD, gradients="average"),
        lambda: moesys.expert_parallel(
            moesys.build_moe_layer(4, experts=4, ffn_hidden=4, gate="smear"), dist.group.WORLD
        ),
    ]
    found = []
    for call in wrong:
        try:
            call()
        except moesys.MoesysError as error:
            found.append(str(error))
    return found


def from_meta(rank: int) -> dict[str, Any]:
    """A model that is made on the meta device, split, and only then given memory and values; two steps of it."""
    with torch.device("meta"):
        model = Model()
    moesys.expert_parallel(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert")))
    _fsdp(model).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for update in ({"foreach": True}, {"fused": True}):
        loss_of(model, rank, 0).backward()
        torch.optim.AdamW(model.parameters(), **update).step()
        model.zero_grad()
    layer = model.blocks[0].moe
    return {
        "fc1": layer.experts.fc1.full_tensor().detach(),
        "held": layer.experts.fc1.to_local().numel(),
        "bias": layer.gate.selection_bias,
        "loss": loss_of(model, rank, 0).item(),
    }


def recorded(rank: int) -> tuple[str, list[tuple[str, str, bool]], list[list[int]]]:
    """The sentence, the phases and the bytes between ranks that a recorder tells of steps of an own FSDP2 loop."""
    model = Model()
    moesys.expert_parallel(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert")))
    _fsdp(model)
    recorder = moesys.CommunicationRecorder(model)
    for number in range(2):
        with recorder.step():
            loss_of(model, rank, number).backward()
    found = recorder.explain()
    if found is None:
        return "", [], []
    others = dict(found.total.others)
    return f"{found.sentence} {sorted(others)}", [(p.layer, p.part, p.backward) for p in found.phases], found.bytes
