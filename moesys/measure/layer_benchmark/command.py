"""The command `moesys bench layer`: checks its options and runs it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from moesys.errors import MoesysError
from moesys.measure.layer_benchmark import many_ranks, one_device, other_systems
from moesys.measure.layer_benchmark.layer_times import SHAPES, LayerShape, LayerTimes
from moesys.measure.layer_benchmark.other_systems import OtherSystems

Result = LayerTimes | many_ranks.ShardedLayerTimes


class LayerBenchError(MoesysError):
    """The benchmark cannot run with these options."""

    exit_code = 2


def run(arguments: argparse.Namespace) -> list[Result]:
    """Run the benchmark, beside other systems' layers where they are here, and print each result when it is there.

    Raises:
        LayerBenchError: the benchmark cannot run with these options.
    """
    shape = shape_of(arguments)
    device = device_of(arguments.device)
    results: list[Result] = []
    others = other_systems.found()
    print(one_device.describe(device), flush=True)
    # Several ranks always run on the host's cores.
    for name in types_of(arguments.dtype, device if arguments.ranks == 1 else torch.device("cpu")):
        dtype = getattr(torch, name)
        if arguments.ranks > 1:
            results.append(many_ranks.run(shape, dtype, arguments.ranks, arguments.rounds, others))
        else:
            results.append(alone(shape, dtype, device, arguments.rounds, others))
        print("\n".join(results[-1].lines()), flush=True)
    if others.missing:
        print(f"  {others.missing}")
    return results


def types_of(name: str | None, device: torch.device) -> tuple[str, ...]:
    """The types to run in: the named one, or the usual types of training on the device."""
    if name:
        return (name,)
    return ("bfloat16",) if device.type == "cuda" else ("float32", "bfloat16")


def alone(
    shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int | None, others: OtherSystems
) -> Result:
    """`one_device.run`, with a clear error for too little memory."""
    try:
        return one_device.run(shape, dtype, device, rounds, others)
    except torch.OutOfMemoryError:
        size = 3 * shape.experts * shape.hidden * shape.ffn_hidden * dtype.itemsize / 1e9
        rule = f"a layer of this shape does not fit {one_device.describe(device)}: {size:.1f} GB of weights, as much"
        raise LayerBenchError(f"{rule} of gradients, and its tokens; choose fewer --experts or --tokens") from None


def shape_of(arguments: argparse.Namespace) -> LayerShape:
    """The named shape, with single sizes replaced by options."""
    name = arguments.shape or ("two-ranks" if arguments.ranks > 1 else "laptop")
    if name not in SHAPES:
        raise LayerBenchError(f"--shape {name}: there is no such shape; one of {', '.join(SHAPES)}")
    given = {key: getattr(arguments, key) for key in asdict(SHAPES[name]) if getattr(arguments, key) is not None}
    shape = LayerShape(**(asdict(SHAPES[name]) | given))
    if min(asdict(shape).values()) < 1 or arguments.ranks < 1:
        raise LayerBenchError("every size and --ranks must be at least 1")
    if shape.top_k > shape.experts:
        raise LayerBenchError(f"--top-k {shape.top_k} must be at most --experts {shape.experts}")
    if shape.experts % arguments.ranks:
        raise LayerBenchError(f"--ranks {arguments.ranks} must divide --experts {shape.experts}")
    return shape


def device_of(name: str) -> torch.device:
    """The device to run on. "auto" is a GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise LayerBenchError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
