"""Initial parameters that do not depend on the layout.

Each parameter is drawn from a generator seeded by (seed, full name), experts' by their number too, as if over the full
shape; a rank draws its slice of it (`moesys.parallel.normals`). So any combination starts from the same model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moesys.models.decoder import Decoder
from moesys.models.parts.axes import Weight
from moesys.moe.layer import moe_layers
from moesys.parallel.normals import Normals


def canonical(name: str, tied: bool) -> str:
    """The name under which a parameter is initialised and saved; wrappers and tying leave no trace."""
    name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    return "embed.weight" if tied and name == "head.weight" else name


def initialise(part: Decoder, seed: int, std: float, tied: bool, draw: bool = True) -> None:
    """Fill every parameter of `part` as its description says, and reset its gates.

    Norms get ones, biases and LoRA's second factors zeros, temperatures their start, all others N(0, std²). Without
    `draw` all get NaN: a checkpoint is to overwrite them, and what it leaves is then told by its name.
    """
    with torch.no_grad():
        for name, param in part.named_parameters():
            if draw:
                _fill(param, part.described[canonical(name, tied)], seed, std)
            else:
                (param.to_local() if isinstance(param, DTensor) else param).fill_(torch.nan)
        for layer in moe_layers(part).values():
            layer.gate.reset_state()


def _fill(param: nn.Parameter, weight: Weight, seed: int, std: float) -> None:
    target, slices = held(param)
    if target.numel():
        target.copy_(initial(weight, slices, seed, std))


def held(param: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The part of a parameter [*] that this rank holds, and its place in the whole."""
    if not isinstance(param, DTensor):
        return param, tuple(slice(0, size) for size in param.shape)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return param.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def initial(weight: Weight, slices: tuple[slice, ...], seed: int, std: float) -> Tensor:
    """The part `slices` of the initial values of a parameter, float32; values that are all the same in any shape."""
    if weight.initial is not None:
        return torch.full((), weight.initial)
    if not weight.routed:
        return Normals(weight.shape, f"{seed}/{weight.name}", std).part(slices)
    # Each expert has its own, whatever their number and slices.
    numbers = range(*slices[0].indices(weight.shape[0]))
    out: Tensor | None = None
    for place, expert in enumerate(numbers):
        part = Normals(weight.shape[1:], f"{seed}/{weight.name}/{expert}", std).part(slices[1:])
        out = part.new_empty(len(numbers), *part.shape) if out is None else out
        out[place] = part
    return torch.empty(0) if out is None else out
