"""Compares every operation of `moesys.kernels` with its definition: by Triton, and as the device chooses.

A plain loop over the operations, without pytest, at the sizes of a published model. Definitions use float64 and the
same
inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.kernels import activation, choose, expert_ffn, gate, grouped_matmul, permute
from moesys.kernels.permute import Permutation, sort_by_expert
from moesys.measure.gpu_check.rows import CheckTask, Row, tried

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
"""Largest relative difference of a result from its definition."""

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class KernelSizes:
    """T tokens of size H, E experts of inner size F, k experts per token."""

    tokens: int
    hidden: int
    ffn_hidden: int
    experts: int
    top_k: int


LARGE, SMALL = KernelSizes(4096, 2048, 768, 128, 8), KernelSizes(8, 16, 8, 4, 2)


@dataclass(frozen=True)
class KernelCase:
    """An operation, its definition, and their tensors. Gradients are compared for those of floating type."""

    operation: Function
    definition: Function
    inputs: Sequence[Tensor]


def run(task: CheckTask) -> Iterator[Row]:
    """A row for each operation, type and implementation."""
    if not choose.HAS_TRITON:
        yield Row("Triton", "not run", "Triton is not installed; pip install triton")
    ways = {"as chosen": ""} | ({"Triton": "triton"} if choose.HAS_TRITON else {})
    if task.dry:
        ways.pop("as chosen")
    size = SMALL if task.dry else LARGE
    for dtype in CLOSE:
        for name, case in cases(size, dtype, torch.device(task.device)).items():
            for said, way in ways.items():
                what = f"{name}, {str(dtype).removeprefix('torch.')}, {said}"
                yield tried(_row, task, what, case, way, dtype)
    if task.dry:
        yield Row("compiled kernels", "not run", "they need a GPU; above, Triton's interpreter ran them on few rows")


def cases(size: KernelSizes, dtype: torch.dtype, device: torch.device) -> dict[str, KernelCase]:
    """The operations by name. Routing is random; one expert gets no token."""
    torch.manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(of)

    logits = normal(size.tokens, size.experts, of=torch.float32)
    logits[:, -1] = -20.0
    expert_A = logits.topk(size.top_k).indices.flatten()
    token_A = torch.arange(size.tokens, device=device).repeat_interleave(size.top_k)
    p = sort_by_expert(token_A, expert_A, size.tokens, size.experts)
    rows, weight = normal(len(token_A), size.hidden), torch.rand(len(token_A), device=device)
    tokens = normal(size.tokens, size.hidden)
    found: dict[str, KernelCase] = {}
    for score in ("softmax", "sigmoid") if dtype == torch.float32 else ():
        options = (size.top_k, score)
        found[f"gate, {score}"] = KernelCase(_floats(gate.gate, *options), _floats(gate.reference, *options), [logits])
    found["permute"] = KernelCase(_with(permute.permute, p), _with(permute.reference, p), [tokens])
    found["unpermute"] = KernelCase(
        _summed(permute.unpermute, p), _summed(permute.reference_unpermute, p), [rows, weight]
    )
    for kind, rule in activation.KINDS.items():
        inner = normal(len(token_A), rule.parts, size.ffn_hidden)
        found[f"activation, {kind}"] = KernelCase(
            _activated(activation.activate, kind), _activated(activation.reference, kind), [inner, weight]
        )
    fc1 = normal(size.experts, size.hidden, 2, size.ffn_hidden) / size.hidden**0.5
    fc2 = normal(size.experts, size.ffn_hidden, size.hidden) / size.ffn_hidden**0.5
    counts = p.counts_E
    found["grouped_matmul"] = KernelCase(
        _grouped(grouped_matmul.grouped_matmul, counts), _grouped(grouped_matmul.reference, counts), [rows, fc1]
    )
    found["expert_ffn"] = KernelCase(
        _experts(expert_ffn.expert_ffn, p), _experts(expert_ffn.reference, p), [tokens, fc1, fc2, weight]
    )
    return found


def _floats(gate_: Callable[..., gate.GateResult], *options: object) -> Function:
    """Weights, probabilities and load (as floating numbers) of a gate."""

    def function(logits_TE: Tensor) -> tuple[Tensor, ...]:
        found = gate_(logits_TE, *options)
        return found.weight_Tk, found.probabilities_TE, found.load_E.to(logits_TE.dtype)

    return function


def _with(operation: Callable[..., Tensor], p: Permutation) -> Function:
    return lambda x_TH: operation(x_TH, p)


def _summed(operation: Callable[..., Tensor], p: Permutation) -> Function:
    return lambda rows_AH, weight_A: operation(rows_AH, p, weight_A)


def _activated(operation: Callable[..., Tensor], kind: str) -> Function:
    return lambda h_NGF, weight_N: operation(h_NGF, kind, weight_N)


def _grouped(operation: Callable[..., Tensor], counts_E: Tensor) -> Function:
    return lambda rows_NH, fc1_EHGF: operation(rows_NH, fc1_EHGF.flatten(2), counts_E)


def _experts(operation: Callable[..., Tensor], p: Permutation) -> Function:
    return lambda x_TH, fc1, fc2, weight: operation(x_TH, fc1, fc2, p.counts_E, "swiglu", weight, None, p)


def _row(task: CheckTask, what: str, case: KernelCase, way: str, dtype: torch.dtype) -> Row:
    """The largest difference of results and gradients from the definition, and its place."""
    with forced(way):
        found = _passes(case.operation, case.inputs)
    with forced("reference"):
        expected = _passes(case.definition, [x.double() for x in case.inputs])
    errors = {name: _distance(found[name], right) for name, right in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    error = errors[worst]
    said = f"{error:.1e} from its definition at most, in the {worst}"
    if not error <= CLOSE[dtype]:
        return Row(what, "failed", f"{said}: more than {CLOSE[dtype]:.0e}", {"error": error})
    return Row(what, "passed", said, {"error": error})


def _passes(function: Function, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of every input for one random direction."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    total = leaves[0].new_zeros((), dtype=torch.float64)
    for out in (out for out in outputs if out.requires_grad):
        direction = torch.randn(out.shape, generator=generator, device=out.device)
        total = total + (out.double() * direction).sum()
    grads = torch.autograd.grad(total, leaves)
    named = {f"output {n}": out.detach() for n, out in enumerate(outputs)}
    return named | {f"gradient of input {n}": grad for n, grad in enumerate(grads)}


def _distance(found: Tensor, right: Tensor) -> float:
    """Norm of the difference / norm of the right tensor (any shape); infinite if a number is not finite."""
    if not found.isfinite().all():
        return float("inf")
    return float((found.double() - right).norm() / right.norm().clamp_min(1e-30))


@contextmanager
def forced(way: str) -> Iterator[None]:
    """A context in which every operation uses this implementation; "" for its own choice."""
    before = os.environ.get(choose.VARIABLE)
    os.environ[choose.VARIABLE] = way
    choose.forget()
    try:
        yield
    finally:
        os.environ.pop(choose.VARIABLE)
        if before is not None:
            os.environ[choose.VARIABLE] = before
        choose.forget()
