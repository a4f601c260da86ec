"""All experts in one operation against a loop over experts in float64, forward and backward."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moesys.kernels import activation, choose, expert_ffn
from moesys.kernels import grouped_matmul as products
from moesys.kernels.cpu import expert_ffn_blocked, workers
from moesys.kernels.permute import sort_by_expert
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.measure.layer_benchmark.sides import build
from moesys.parallel import recompute

H, F = 6, 5


@pytest.fixture(params=["together", "alone"])
def cores(request, monkeypatch):
    """Whether the cores work at each block together, or each at blocks of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "alone" else 1)
    monkeypatch.setattr(workers, "LEAST", 0)
    monkeypatch.setattr(workers, "UNEVEN", float("inf"))
    yield
    torch.set_num_threads(before)


def formula(kind, g, u):
    sigmoid = 1 / (1 + (-g).exp())
    normal = 0.5 * (1 + torch.erf(g / 2**0.5))
    clipped = g.clamp(max=7)
    return {
        "swiglu": lambda: g * sigmoid * u,
        "geglu": lambda: g * normal * u,
        "clipped_swiglu": lambda: (u.clamp(-7, 7) + 1) * clipped / (1 + (-1.702 * clipped).exp()),
        "gelu": lambda: g * normal,
        "relu": lambda: g.clamp(min=0),
        "relu2": lambda: g.clamp(min=0) ** 2,
    }[kind]()


def loop(x, fc1, fc2, counts, kind, weight, bias):
    out, start = [], 0
    for e, count in enumerate(counts):
        h = torch.einsum("nh,hgf->ngf", x[start : start + count], fc1[e]) + bias[e]
        inner = formula(kind, h[:, 0], h[:, -1]) * weight[start : start + count, None]
        out.append(inner @ fc2[e])
        start += count
    return torch.cat(out)


@pytest.mark.parametrize("block", [1, 20, 2**18], ids=["each", "some", "all"])
@pytest.mark.parametrize("kind", activation.KINDS)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [0, 9, 0, 0], [4, 0, 0, 0]])
def test_equals_a_loop_over_experts(monkeypatch, counts, kind, block, cores):
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
    torch.manual_seed(0)
    rows, parts = sum(counts), activation.KINDS[kind].parts
    shapes = [(rows, H), (4, H, parts, F), (4, F, H), (4, parts, F), (rows,)]
    inputs = [4 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[-1][::3] = 0  # a weight of zero has a gradient too
    inputs = [x.requires_grad_() for x in inputs]
    target = torch.randn(rows, H, dtype=torch.float64)

    def ours(x, fc1, fc2, bias, weight):
        return expert_ffn.expert_ffn(x, fc1, fc2, torch.tensor(counts), kind, weight, bias)

    def expected(x, fc1, fc2, bias, weight):
        return loop(x, fc1, fc2, counts, kind, weight, bias)

    found, wanted = ours(*inputs), expected(*inputs)
    torch.testing.assert_close(found, wanted)
    grads = torch.autograd.grad((found * target).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((wanted * target).sum(), inputs, allow_unused=True), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 9, 0, 0], [0, 0, 0, 0]])
def test_few_rows_go_through_grouped_products_all_at_once(monkeypatch, counts, kind, indexed):
    torch.manual_seed(0)
    rows, parts = sum(counts), activation.KINDS[kind].parts
    shapes = [(rows, 8), (4, 8, parts, 12), (4, 12, 8), (4, parts, 12), (rows,)]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    p = sort_by_expert(torch.arange(rows), torch.arange(4).repeat_interleave(torch.tensor(counts)), rows, 4)
    target, found = torch.randn(rows, 8), []
    for block in (2**18, 0):
        monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
        x, fc1, fc2, bias, weight = inputs
        out = expert_ffn.expert_ffn(x, fc1, fc2, p.counts_E, kind, weight, bias, p if indexed else None)
        found.append((out, *torch.autograd.grad((out * target).sum(), inputs)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2**18], ids=["each", "all"])
@pytest.mark.parametrize("tokens", [[0, 0, 1, 2, 2, 2], [], [4], [0, 2, 4]])
def test_gathers_its_rows_and_sums_them_by_token(monkeypatch, tokens, block, cores):
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
    torch.manual_seed(0)
    token = torch.tensor(tokens, dtype=torch.int64)
    p = sort_by_expert(token, torch.randint(0, 4, token.shape), 5, 4)
    shapes = [(5, H), (4, H, 2, F), (4, F, H), (len(tokens),)]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    target = torch.randn(5, H, dtype=torch.float64)
    x, fc1, fc2, weight = inputs
    found = expert_ffn.expert_ffn(x, fc1, fc2, p.counts_E, "swiglu", weight, None, p)
    rows = loop(x[p.token_A], fc1, fc2, p.counts_E.tolist(), "swiglu", weight, torch.zeros(4, 2, F).double())
    expected = torch.zeros(5, H, dtype=torch.float64)
    for token, row in zip(p.token_A.tolist(), rows, strict=True):
        expected = expected + torch.nn.functional.one_hot(torch.tensor(token), 5)[:, None] * row
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad((found * target).sum(), inputs)
    expected = expected + 0 * sum(x.sum() for x in inputs)
    for a, b in zip(grads, torch.autograd.grad((expected * target).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_is_as_exact_as_its_type(monkeypatch, emulated, cores):
    monkeypatch.setattr(expert_ffn_blocked, "_slow_bfloat16", lambda: emulated)
    torch.manual_seed(0)
    counts, weight = [7, 0, 20, 5], torch.rand(32, requires_grad=True)
    x, fc1, fc2 = (torch.randn(s).bfloat16().requires_grad_() for s in ((32, H), (4, H, 2, F), (4, F, H)))
    target = torch.randn(32, H).bfloat16()
    found = expert_ffn.expert_ffn(x, fc1, fc2, torch.tensor(counts), "swiglu", weight)
    wide = [t.detach().double().requires_grad_() for t in (x, fc1, fc2, weight)]
    expected = loop(*wide[:3], counts, "swiglu", wide[3], torch.zeros(4, 2, F).double())
    grads = torch.autograd.grad((found * target).sum(), (x, fc1, fc2, weight))
    wanted = torch.autograd.grad((expected * target.double()).sum(), wide)
    assert found.dtype == torch.bfloat16
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        assert (a.double() - b).norm() / b.norm() < 2e-2


def test_weights_that_are_widened_may_lie_in_memory_as_they_like(monkeypatch):
    monkeypatch.setattr(expert_ffn_blocked, "_slow_bfloat16", lambda: True)
    torch.manual_seed(0)
    counts, x = torch.tensor([5, 3]), torch.randn(8, H).bfloat16()
    fc1, wide = torch.randn(2, H, 2, F).bfloat16(), torch.randn(2, F, H + 1).bfloat16()
    fc2 = wide[..., 1:].requires_grad_()
    (grad,) = torch.autograd.grad(expert_ffn.expert_ffn(x, fc1, fc2, counts).sum(), fc2)
    (expected,) = torch.autograd.grad(expert_ffn.expert_ffn(x, fc1, fc2.contiguous(), counts).sum(), fc2)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_rows_are_as_exact_as_one_product(monkeypatch, dtype):
    monkeypatch.setattr(expert_ffn_blocked, "_slow_bfloat16", lambda: False)
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", 4 * F)
    torch.manual_seed(0)
    given = [torch.randn(s).to(dtype).requires_grad_() for s in ((1024, H), (1, H, 2, F), (1, F, H))]
    counts, target = torch.tensor([1024]), torch.randn(1024, H).to(dtype)
    grads = torch.autograd.grad(expert_ffn.expert_ffn(*given, counts), given, target)
    wide = [t.detach().double().requires_grad_() for t in given]
    wanted = torch.autograd.grad(expert_ffn.reference(*wide, counts), wide, target.double())
    for a, b in zip(grads, wanted, strict=True):
        assert (a.double() - b).norm() / b.norm() < 5e-3


def test_what_is_kept_for_backward_is_the_input_and_one_product():
    x = torch.randn(64, H, requires_grad=True)
    fc1, fc2 = torch.randn(4, H, 2, F, requires_grad=True), torch.randn(4, F, H, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_ffn.expert_ffn(x, fc1, fc2, torch.tensor([16] * 4), "swiglu", torch.rand(64))
    weights = fc1.nbytes + fc2.nbytes
    assert sum(kept.values()) == weights + x.nbytes + 64 * 2 * F * 4 + 64 * 4 + 4 * 8


LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(shape),
    "parts within": lambda *shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).mT,
    "reversed": lambda *shape: torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))),
    "cut out": lambda *shape: torch.randn(*shape[:-1], shape[-1] + 1)[..., 1:],
    "expanded": lambda *shape: torch.randn(*shape[:-1], 1).expand(shape),
}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("block", [0, 2**18], ids=["blocks", "few rows"])
@pytest.mark.parametrize("which", [*range(5), "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_may_lie_in_memory_as_they_like(monkeypatch, layout, which, block, indexed):
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
    torch.manual_seed(0)
    counts, shapes = [10, 0, 25, 5], ((40, 16), (40, 16), (4, 16, 2, 24), (4, 24, 16), (4, 2, 24))
    p = sort_by_expert(torch.arange(40), torch.arange(4).repeat_interleave(torch.tensor(counts)), 40, 4)
    made = [LAYOUTS[layout if which in (i, "all") else "contiguous"](*shape) for i, shape in enumerate(shapes)]
    target, *inputs = [*made, torch.rand(80)[::2]]
    inputs = [t.requires_grad_() for t in inputs]
    x, fc1, fc2, bias, weight = inputs
    found = expert_ffn.expert_ffn(x, fc1, fc2, p.counts_E, "swiglu", weight, bias, p if indexed else None)
    grads = torch.autograd.grad(found, inputs, target)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = loop(*wide[:3], counts, "swiglu", wide[4], wide[3])
    wanted = torch.autograd.grad(expected, wide, target.double())
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("block", [0, 2**18], ids=["blocks", "few rows"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", ["reversed", "cut out"])
def test_what_is_traced_lies_in_memory_as_what_is_computed(monkeypatch, layout, which, block, indexed):
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
    shapes = ((16, 8), (2, 8, 2, 12), (2, 12, 8))
    x, fc1, fc2 = (LAYOUTS[layout if i == which else "contiguous"](*shape) for i, shape in enumerate(shapes))
    index = torch.arange(16) if indexed else None
    given = (x, fc1, fc2, torch.tensor([10, 6]), torch.rand(16), torch.randn(2, 2, 12), index, None, None)

    def strides(*inputs):
        out, h = torch.ops.moesys.expert_ffn(*inputs, "swiglu")
        grads = torch.ops.moesys.expert_ffn_backward(torch.zeros_like(out), *inputs, "swiglu", h, True, True)
        return [t.stride() for t in (out, h, *grads)]

    with FakeTensorMode() as mode:
        traced = strides(*(None if t is None else mode.from_tensor(t) for t in given))
    assert strides(*given) == traced


def routed(device):
    """7 tokens of any number of rows, 11 in all, for 5 experts of which some have none."""
    token, expert = torch.tensor([0, 0, 1, 3, 3, 3, 4, 4, 5, 6, 6]), torch.tensor([0, 3, 3, 1, 3, 0, 3, 1, 0, 0, 1])
    return sort_by_expert(token.to(device), expert.to(device), 7, 5)


def check_on(device, kind, indexed, weighted, biased, hidden, inner):
    torch.manual_seed(0)
    p, parts = routed(device), activation.KINDS[kind].parts
    shapes = [(7 if indexed else 11, hidden), (5, hidden, parts, inner), (5, inner, hidden)]
    shapes += [(5, parts, inner)] * biased + [(11,)] * weighted
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]

    def split(tensors):
        x, fc1, fc2, *rest = tensors
        return x, fc1, fc2, rest[0] if biased else None, rest[-1] if weighted else None

    x, fc1, fc2, bias, weight = split(inputs)
    found = expert_ffn.expert_ffn(x, fc1, fc2, p.counts_E, kind, weight, bias, p if indexed else None)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    x, fc1, fc2, bias, weight = split(wide)
    bias = torch.zeros(5, parts, inner).double() if bias is None else bias
    weight = torch.ones(11).double() if weight is None else weight
    token = p.token_A.cpu()
    expected = loop(x[token] if indexed else x, fc1, fc2, p.counts_E.tolist(), kind, weight, bias)
    if indexed:
        expected = torch.zeros(7, hidden).double().index_add(0, token, expected)
    # An expanded gradient, as that of a sum.
    grads = torch.autograd.grad(found.sum() + found.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.sum() + expected.square().sum(), wide)
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        assert (a.cpu().double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", activation.KINDS)
def test_every_way_equals_a_loop_over_experts(device, kind, indexed):
    for weighted, biased in ((False, True), (True, False)) if indexed else ((False, False), (True, True)):
        check_on(device, kind, indexed, weighted, biased, H, F)


@pytest.mark.parametrize("indexed", [False, True])
def test_with_torchs_grouped_products_in_the_midst_of_triton(triton_device, indexed, monkeypatch):
    """As on Hopper: what they refuse there they refuse on CPU, too."""
    monkeypatch.setenv(choose.VARIABLE, "triton")
    choose.forget()
    monkeypatch.setattr(products, "choose", lambda x, *rest: "torch")
    monkeypatch.setattr(products, "torch_has_grouped_mm", lambda x, w: True)
    check_on(triton_device, "swiglu", indexed, True, True, 8, 12)
    choose.forget()


def kept_bytes(run, *parameters):
    """Bytes that autograd keeps of `run`, beside the parameters."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    assert out.requires_grad
    return sum(kept.values()) - sum(p.nbytes for p in parameters)


def test_a_layer_keeps_what_must_be_kept(fast_device):
    shape = LayerShape(tokens=32, hidden=64, ffn_hidden=64, experts=8, top_k=4)
    layer = build(shape, torch.float32, torch.device(fast_device))
    x = torch.randn(1, 32, 64, device=fast_device, requires_grad=True)
    assert kept_bytes(lambda: layer(x), *layer.parameters()) <= 1.1 * shape.kept_bytes(4)


def test_recomputing_all_but_products_multiplies_nothing_again(fast_device):
    p = routed(fast_device)
    fc1, fc2 = (torch.randn(s, device=fast_device, requires_grad=True) for s in ((5, H, 2, F), (5, F, H)))
    x, weight = torch.randn(7, H, device=fast_device, requires_grad=True), torch.rand(11, device=fast_device)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return expert_ffn.expert_ffn(x.sin(), fc1, fc2, p.counts_E, "swiglu", weight, None, p).cos()

    expected = torch.autograd.grad(Layer()(x).square().sum(), (x, fc1, fc2))
    with FlopCounterMode(display=False) as flops:
        recompute.repeated(Layer().forward, context_fn=recompute.contexts)(x).square().sum().backward()
    assert flops.get_total_flops() == 3 * 2 * 11 * H * F * 3
    for t, grad in zip((x, fc1, fc2), expected, strict=True):
        torch.testing.assert_close(t.grad, grad)


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("block", [0, 2**18], ids=["blocks", "few rows"])
def test_gradients_of_frozen_weights_are_not_computed(fast_device, monkeypatch, block, frozen):
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
    torch.manual_seed(0)
    p, shapes = routed(fast_device), ((7, 8), (5, 8, 2, 12), (5, 12, 8), (11,))
    inputs = [torch.randn(shape, device=fast_device, requires_grad=True) for shape in shapes]

    def grads(*tensors):
        x, fc1, fc2, weight = tensors
        with FlopCounterMode(display=False) as flops:
            out = expert_ffn.expert_ffn(x, fc1, fc2, p.counts_E, "swiglu", weight, None, p)
            return torch.autograd.grad(out.sum(), [t for t in tensors if t.requires_grad]), flops.get_total_flops()

    every, all_flops = grads(*inputs)
    some, flops = grads(*(t.detach() if i in frozen else t for i, t in enumerate(inputs)))
    for a, b in zip(some, [g for i, g in enumerate(every) if i not in frozen], strict=True):
        assert torch.equal(a, b)
    product = 2 * 11 * 8 * 12
    assert all_flops == 9 * product
    assert flops == all_flops - sum({1: 2 * product, 2: product}[i] for i in frozen)


@pytest.mark.parametrize("block", [0, 2**18], ids=["blocks", "few rows"])
def test_operations_keep_their_schema(monkeypatch, block):
    monkeypatch.setattr(expert_ffn_blocked, "BLOCK", block)
    p, shapes = routed("cpu"), ((7, 8), (5, 8, 2, 12), (5, 12, 8))
    given = (*(torch.randn(s) for s in shapes), p.counts_E, torch.rand(11), None, p.token_A, None, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moesys.expert_ffn.default, (*given, "swiglu"), test_utils=tests)
    backward = (torch.randn(7, 8), *given, "swiglu", torch.randn(11, 2, 12))
    for asked in ((True, True), (False, True), (True, False), (False, False)):
        torch.library.opcheck(torch.ops.moesys.expert_ffn_backward.default, (*backward, *asked), test_utils=tests)


def test_a_second_derivative_is_refused(fast_device):
    p, shapes = routed(fast_device), ((7, H), (5, H, 2, F), (5, F, H))
    x, fc1, fc2 = (torch.randn(shape, device=fast_device, requires_grad=True) for shape in shapes)
    out = expert_ffn.expert_ffn(x, fc1, fc2, p.counts_E, p=p)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
