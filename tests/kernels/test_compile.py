"""Triton's kernels compile for a GPU that need not be there: the interpreter is more lenient than the compiler."""

from __future__ import annotations

import pytest

from moesys.kernels import choose

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(choose.interpreted(), reason="Triton interprets in this process")

TYPES = {"bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}
"""Types of tensors, and what is computed in."""


def _compile(monkeypatch, tmp_path, kernel, options=None, /, **arguments: object) -> str:
    """PTX of the kernel: "*bf16" is a pointer, "i32" an integer, anything else a constant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = kernel if isinstance(kernel, triton.JITFunction) else kernel.fn
    assert sorted(arguments) == sorted(kernel.arg_names)
    typed = {name: isinstance(value, str) and value.lstrip("*")[:1] in "ibf" for name, value in arguments.items()}
    typed |= {"KIND": False}
    source = ASTSource(
        fn=kernel,
        signature={n: arguments[n] if typed[n] else "constexpr" for n in kernel.arg_names},
        constexprs={(i,): arguments[n] for i, n in enumerate(kernel.arg_names) if not typed[n]},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if typed[n]},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    return lambda *args, **arguments: _compile(monkeypatch, tmp_path, *args, **arguments)


@pytest.mark.parametrize(("sigmoid", "floats"), [(True, "*fp32"), (False, "*fp32"), (False, "*fp64")])
def test_gate(compiled, sigmoid, floats):
    from moesys.kernels.triton import gate

    options = {"TOP_K": 6, "SIGMOID": sigmoid, "NORMALIZE": True, "SCALE": 2.5, "EPSILON": 1e-20 if sigmoid else 0.0}
    shared = {"probabilities_TE": floats, "expert_Tk": "*i64", "tokens": "i32", "experts": "i32", **options}
    blocks = {"BLOCK_T": 8, "BLOCK_E": 64}
    outputs = {"weight_Tk": floats, "load_E": "*i64"}
    compiled(gate._forward_kernel, logits_TE=floats, **outputs, **shared, **blocks, BLOCK_K=8)
    grads = {"grad_weight_Tk": floats, "grad_probabilities_TE": floats, "grad_logits_TE": floats}
    compiled(gate._backward_kernel, **grads, **shared, **blocks, OF_WEIGHT=True, OF_PROBABILITIES=True)
    grads["grad_weight_Tk"] = None
    compiled(gate._backward_kernel, **grads, **shared, **blocks, OF_WEIGHT=False, OF_PROBABILITIES=True)


@pytest.mark.parametrize("type", TYPES)
def test_permute(compiled, type):
    from moesys.kernels.triton import permute

    wide = triton.language.dtype(TYPES[type])
    floats, blocks = f"*{type}", {"BLOCK_A": 4, "BLOCK_H": 256, "WIDE": wide}
    for weight in ("*fp32", None):
        weighted = {"weight_A": weight, "WEIGHTED": weight is not None, "index_A": "*i64", "hidden": "i32"}
        compiled(permute._gather_kernel, x=floats, out=floats, rows="i32", x_stride="i32", **weighted, **blocks)
        for offsets in ("*i32", "*i64"):
            sums = {"rows_AH": floats, "offsets_T1": offsets, "out_TH": floats, "row_stride": "i32"}
            compiled(permute._gather_sum_kernel, **sums, **weighted, **blocks)
    dots = {"grad_TH": floats, "rows_AH": floats, "token_A": "*i64", "out_A": f"*{TYPES[type]}", "rows": "i32"}
    sizes = {"hidden": "i32", "grad_stride": "i32", "row_stride": "i32"}
    compiled(permute._dot_kernel, **dots, **sizes, index_A=None, INDEXED=False, **blocks)


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "clipped_swiglu", "gelu", "relu", "relu2"])
def test_activation(compiled, kind):
    from moesys.kernels.triton import activation

    for floats, wide, weight in (("*bf16", "fp32", "*fp32"), ("*fp64", "fp64", None)):
        shared = {"h_NGF": floats, "weight_N": weight, "rows": "i32", "width": "i32", "KIND": kind}
        flags = {"GATED": "glu" in kind, "WEIGHTED": weight is not None, "WIDE": triton.language.dtype(wide)}
        blocks = {"BLOCK_N": 2, "BLOCK_F": 512}
        compiled(activation._forward_kernel, out_NF=floats, **shared, **flags, **blocks)
        grads = {"grad_NF": floats, "grad_h_NGF": floats, "grad_weight_N": "*fp32"}
        compiled(activation._backward_kernel, **grads, **shared, **flags, **blocks)


@pytest.mark.parametrize("offsets", ["*i32", "*i64"])
@pytest.mark.parametrize("type", TYPES)
def test_grouped_matmul(compiled, type, offsets):
    from moesys.kernels.triton import grouped_matmul as kernel

    floats, sizes = f"*{type}", {"inner": "i32", "outer": "i32", "usual": "i32", "INTERPRETED": False, "DEPTH": 32}
    wide = {"WIDE": triton.language.dtype(TYPES[type])}
    config = kernel._configs()[3]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    products = {"x_NK": floats, "w_GKM": floats, "offsets_G1": offsets, "out_NM": floats, "groups": "i32"}
    for strides in ({"w_k": "i32", "w_m": 1}, {"w_k": 1, "w_m": "i32"}):
        flags = {"EVEN": True, "GROUPS": 64, "BAND": 8, "x_n": "i32", "x_k": 1, "w_g": "i32", **strides, **wide}
        ptx = compiled(kernel._rows_kernel, options, **products, **sizes, **flags, **config.kwargs)
        assert "tf32" not in ptx
        assert ("wgmma" in ptx) == (type == "bf16")
        assert "cp.async" in ptx, "loads are not pipelined"
    grads = {"x_NK": floats, "grad_NM": floats, "offsets_G1": offsets, "out_GKM": floats}
    strides = {"x_n": "i32", "x_k": 1, "grad_n": "i32", "grad_m": 1}
    ptx = compiled(kernel._matrices_kernel, options, **grads, **sizes, **strides, **wide, **config.kwargs)
    assert "tf32" not in ptx and "cp.async" in ptx
