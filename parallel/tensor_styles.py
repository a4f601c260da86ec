"""How each module of a decoder is split along the tensor axis, as torch parallel styles."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from moesys.models.block import PredictionBlock
from moesys.models.decoder import Decoder
from moesys.models.layers import RMSNorm
from moesys.models.parts.mixer import Mixer
from moesys.models.parts.model import BlockParts
from moesys.models.parts.model import block as describe
from moesys.models.parts.moe import MoEFeedForward
from moesys.models.parts.part import Part
from moesys.moe import MoELayer
from moesys.parallel.split_norm import split_rms_norm


class Replicated(ParallelStyle):
    """Weights replicated over the axis; inputs and outputs stay the DTensors they are."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


class UsedByLocalHeads(ParallelStyle):
    """First input: whole on every rank but used by the rank's own heads, so its gradients are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def localise(_: nn.Module, inputs: tuple) -> tuple:
            x: Tensor = inputs[0]
            if isinstance(x, DTensor):
                x = x.to_local(grad_placements=[Partial()])
            return (x, *inputs[1:])

        module.register_forward_pre_hook(localise)
        return module


def _split(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the parameters of a module along their first dim."""
    for name, parameter in module.named_parameters(recurse=False):
        whole = distribute_tensor(parameter, mesh, [Shard(0)])
        module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))


class OfLocalHeads(ParallelStyle):
    """Weights of one element per head, split over the axis; called without inputs, it gives the rank's own."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _split, output_fn=lambda _, out, __: out.to_local())


class OverSplitFeatures(ParallelStyle):
    """An `RMSNorm` over features that are split over the axis: its inputs and outputs are the rank's own."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        group = device_mesh.get_group()

        def forward(x: Tensor) -> Tensor:
            weight_F = module.factors()
            assert isinstance(weight_F, DTensor)
            return split_rms_norm(x, weight_F.to_local(), module.eps, group)

        module.forward = forward  # type: ignore[method-assign]
        return distribute_module(module, device_mesh, _split)


def parallelize(model: Decoder, axis: DeviceMesh, sp: bool) -> Decoder:
    """Apply the table of `moesys.parallel.tensor`; `sp`: the stream is split along the sequence."""
    stream: Placement = Shard(1) if sp else Replicate()
    plan: dict[str, ParallelStyle] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    if model.head is not None:
        plan["head"] = ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1))
        if sp:
            plan["norm"] = SequenceParallel(use_local_output=bool(model.config.predicted))
    for name, block in model.layers.items():
        styles = _block(block, describe(model.config, int(name)), stream, sp)
        if sp and isinstance(block, PredictionBlock):
            styles |= {"embed_norm": SequenceParallel(), "hidden_norm": SequenceParallel()}
            styles |= {name: SequenceParallel(use_local_output=True) for name in ("project", "norm")}
        plan |= {f"layers.{name}.{key}": style for key, style in styles.items()}
    tied = model.embed is not None and model.head is not None and model.head.weight is model.embed.weight
    parallelize_module(model, axis, plan)
    if model.embed is not None:
        model.embed.register_forward_hook(_arrived)
    if tied:
        assert model.embed is not None and model.head is not None
        model.head.weight = model.embed.weight
    return model


def _block(block: Any, parts: BlockParts, stream: Placement, sp: bool) -> dict[str, ParallelStyle]:
    whole = (Replicate(), None, None)
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(input_layouts=(stream, None, None), desired_input_layouts=whole),
        **{f"attention.{key}": style for key, style in _mixer(parts.mixer, stream).items()},
    }
    if sp:
        plan |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
    ffn = block.ffn
    if isinstance(ffn, MoELayer):
        plan |= {
            "ffn.enter": PrepareModuleInput(
                input_layouts=stream, desired_input_layouts=Shard(1), use_local_output=True
            ),
            "ffn.leave": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=stream),
            **{name: _over_tokens() for name in _used_by_tokens(ffn)},
        }
        assert isinstance(parts.ffn, MoEFeedForward)
        if parts.ffn.shared is not None:
            plan |= _feed_forward("ffn.shared", parts.ffn.shared, Shard(1))
    else:
        plan |= _feed_forward("ffn", parts.ffn, stream)
    return plan


def _arrived(_: nn.Module, __: object, out: Tensor) -> Tensor:
    """A plain copy of what is still on its way: a compiled graph that starts with that has wrong gradients."""
    return out.clone()


def _over_tokens() -> ParallelStyle:
    """Tokens [T, …] are a slice over the axis: the gradient of what is used by them is a sum over it."""
    return SequenceParallel(sequence_dim=0, use_local_output=True)


def _used_by_tokens(layer: MoELayer) -> list[str]:
    """Modules with parameters in the gate and beside it, each called with the layer's tokens."""
    parents = {"ffn.gate": layer.gate, "ffn.zero": layer.zero, "ffn.mix": layer.mix}
    return [
        f"{name}.{child}"
        for name, parent in parents.items()
        if parent is not None
        for child, module in parent.named_children()
        if any(True for _ in module.parameters())
    ]


def _from_axes(part: Part, stream: Placement) -> dict[str, ParallelStyle]:
    """By module: split output features, split input features, or whole, as the axes of its weight say."""
    plan: dict[str, ParallelStyle] = {}
    for weight in part.weights():
        module, _, leaf = weight.name.rpartition(".")
        if leaf == "weight":
            first = OverSplitFeatures() if weight.kind == "norm" else ColwiseParallel()
            styles = {0: first, 1: RowwiseParallel(output_layouts=stream), None: Replicated()}
            plan[module] = styles[weight.split_by("tp")]
    return plan


def _mixer(mixer: Mixer, stream: Placement) -> dict[str, ParallelStyle]:
    exceptions: dict[str, ParallelStyle] = {
        # Heads [B, S, h, d] are split over the axis.
        "heads": SequenceParallel(sequence_dim=2, use_local_output=True),
        "summed": UsedByLocalHeads(),
        "own": OfLocalHeads(),
    }
    plan = _from_axes(mixer, stream)
    whole = {name: style for name, style in plan.items() if not isinstance(style, OverSplitFeatures)}
    return plan | {
        name: exceptions[style] for name, style in mixer.styles.items() if name in whole or style == "summed"
    }


def _feed_forward(name: str, part: Part, stream: Placement) -> dict[str, ParallelStyle]:
    return {
        name: PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate()),
        **{f"{name}.{child}": style for child, style in _from_axes(part, stream).items()},
    }
