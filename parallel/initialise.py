"""Initial parameters that do not depend on the layout.

Each parameter is drawn from a generator seeded by (seed, full name), experts' by their number too,
over the full shape; a rank then takes its slice. So any combination starts from the same model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moesys.models.size import kind
from moesys.moe.gates import cosine
from moesys.moe.layer import moe_layers


def canonical(name: str, tied: bool) -> str:
    """The name under which a parameter is initialised and saved; wrappers and tying leave no trace."""
    name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    return "embed.weight" if tied and name == "head.weight" else name


def initialise(part: nn.Module, seed: int, std: float, tied: bool) -> None:
    """Fill every parameter of `part` and reset its gates.

    Norms get ones, biases and LoRA's second factors zeros, temperatures their start, all others N(0, std²).
    """
    with torch.no_grad():
        for name, param in part.named_parameters():
            _fill(param, canonical(name, tied), seed, std)
        for layer in moe_layers(part).values():
            layer.gate.reset_state()


def _fill(param: nn.Parameter, name: str, seed: int, std: float) -> None:
    target: Tensor = param
    slices = tuple(slice(0, size) for size in param.shape)
    if isinstance(param, DTensor):
        shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        target, slices = param.to_local(), tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    if target.numel():
        target.copy_(initial(tuple(param.shape), slices, name, seed, std))


def initial(shape: tuple[int, ...], slices: tuple[slice, ...], name: str, seed: int, std: float) -> Tensor:
    """The part `slices` of the parameter `name` of this `shape`, float32; values that are all the same in any shape."""
    what = kind(name)
    if what == "norm":
        return torch.ones(())
    if what == "bias" or name.endswith("_lora_b"):
        return torch.zeros(())
    if what == "temperature":
        return torch.full((), cosine.START)
    return _draw(shape, slices, name, seed, std)


def _draw(shape: tuple[int, ...], slices: tuple[slice, ...], name: str, seed: int, std: float) -> Tensor:
    if name.split(".")[-2] != "experts":  # of these each expert has its own, whatever their number and slices
        return _normal(shape, f"{seed}/{name}", std)[slices]
    numbers = range(*slices[0].indices(shape[0]))
    return torch.stack([_normal(shape[1:], f"{seed}/{name}/{e}", std)[slices[1:]] for e in numbers])


def _normal(shape: tuple[int, ...], key: str, std: float) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
