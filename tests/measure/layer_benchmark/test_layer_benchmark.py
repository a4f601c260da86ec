"""The benchmark of one layer: its sides compute the same, and its figures are right."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from layer_sides import agree, gradients

from moesys import cli, comparisons
from moesys.benchmarks import transformers_layer
from moesys.benchmarks.layer import other_systems
from moesys.measure.interleaved_timing import affordable, alone, interleave, ratio
from moesys.measure.layer_benchmark import command, layer_times, many_ranks, one_device, sides
from moesys.measure.layer_benchmark.layer_times import LayerShape
from moesys.measure.layer_benchmark.other_systems import NONE
from moesys.measure.peak_memory import peak_bytes

TINY = LayerShape(tokens=24, hidden=16, ffn_hidden=12, experts=4, top_k=2)
CPU = torch.device("cpu")
WORDS = [f"--{name}={value}" for name, value in zip(("tokens", "hidden", "ffn-hidden", "experts"), (24, 16, 12, 4))]  # noqa: B905


@pytest.mark.parametrize("scarce", [False, True])
def test_transformers_block_computes_what_the_layer_does(monkeypatch, scarce):
    monkeypatch.setattr(transformers_layer, "scarce", lambda weights, device: scarce)
    torch.manual_seed(0)
    layer = sides.build(TINY, torch.float32, CPU)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, grad = torch.randn(1, 24, 16), torch.randn(1, 24, 16)
    expected = gradients(layer, x, grad)
    blocks = transformers_layer.blocks(layer, TINY)
    assert set(blocks) == {"eager", "grouped_mm"}
    for block in blocks.values():
        for a, b in zip(gradients(block, x, grad), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    eager, grouped = ([p.data_ptr() for p in block.parameters()] for block in blocks.values())
    assert eager == grouped, "one block, whatever the implementation"
    assert ({p.data_ptr() for p in layer.parameters()} == set(eager)) == scarce


@pytest.mark.parametrize("made", [sides.build, sides.dense])
def test_weights_are_made_in_their_type_and_nowhere_else_before(made):
    shape = LayerShape(tokens=1, hidden=64, ffn_hidden=128, experts=8, top_k=2)
    modules: list[torch.nn.Module] = []
    most = peak_bytes(lambda: modules.append(made(shape, torch.bfloat16, CPU)), CPU)
    assert {p.dtype for p in modules[0].parameters()} == {torch.bfloat16}
    assert most < 1.2 * sum(p.nbytes for p in modules[0].parameters())
    assert torch.get_default_dtype() == torch.float32


class Greedy(torch.nn.Module):
    """Runs out of memory when there is a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.grad = torch.ones(16)
        raise torch.OutOfMemoryError


def test_a_side_that_does_not_fit_is_left_out_and_said_so():
    greedy = Greedy()
    others = replace(NONE, on_one_device=lambda layer, shape: {"transformers eager": greedy})
    result = one_device.run(TINY, torch.float32, CPU, 1, others)
    assert result.left_out == ("transformers eager",) and greedy.weight.grad is None
    assert "layer / dense" in result.ratios and "layer / transformers eager" not in result.ratios
    (line,) = (line for line in result.lines() if "transformers eager" in line)
    assert "left out: the device has too little memory for it" in line


def test_a_layer_that_does_not_fit_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(one_device, "build", lambda *_: Greedy()(torch.ones(1)))
    assert cli.main(["bench", "layer", *WORDS, "--dtype=float32", "--rounds=1"]) == 2
    assert "choose fewer --experts or --tokens" in capsys.readouterr().err


def test_a_gpu_is_measured_in_the_type_it_is_trained_in():
    gpu = torch.device("cuda")
    assert command.types_of(None, gpu) == ("bfloat16",) != command.types_of(None, CPU)
    assert command.types_of("float32", gpu) == ("float32",)


@pytest.mark.parametrize(
    ("shape", "on_gpu", "rate", "said"),
    [
        ("deepseek-v3", True, 86.0, "the layer has 86% of the dense product's rate  target 85%: met"),
        ("mixtral-8x7b", True, 84.0, "the layer has 84% of the dense product's rate  target 85%: MISSED"),
        ("deepseek-v3", False, 84.0, "the layer has 84% of the dense product's rate"),
        ("laptop", True, 84.0, "the layer has 84% of the dense product's rate"),
    ],
)
def test_the_share_of_a_dense_products_rate_has_a_target_on_a_gpu_at_published_shapes(shape, on_gpu, rate, said):
    rates = {"layer": rate, "product": 100.0}
    result = layer_times.LayerTimes(layer_times.SHAPES[shape], "bfloat16", {}, {}, rates, 1, 1, 3, "a device", on_gpu)
    assert any(line.endswith(said) for line in result.lines())


def test_what_must_be_kept_is_what_autograd_keeps_but_for_small_change():
    shape = LayerShape(tokens=256, hidden=64, ffn_hidden=128, experts=8, top_k=2)
    layer = sides.build(shape, torch.float32, CPU)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(torch.randn(1, 256, 64, requires_grad=True))
    assert out.requires_grad
    weights = sum(p.nbytes for p in layer.parameters())
    assert sum(kept.values()) - weights == pytest.approx(shape.kept_bytes(4), rel=0.1)


def test_peak_is_the_most_that_lives_at_once():
    def step() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(3000)
        del first
        third = torch.zeros(500)
        del second, third

    assert peak_bytes(step, CPU) == pytest.approx(4 * 4000, rel=0.05)


def test_sides_take_turns():
    order: list[str] = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = interleave(sides, 2, alone(CPU), warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert ratio(seconds, "a", "b") > 0 and len(seconds["a"]) == 2


def test_slow_sides_have_fewer_rounds_and_are_warmed_up_once():
    took, runs = {"slow": 25.0, "fast": 0.5}, []

    def timer(step: object) -> float:
        runs.append(step)
        return took[step]  # type: ignore[index]

    seconds = interleave({name: name for name in took}, None, timer)  # type: ignore[dict-item,arg-type]
    assert {name: len(values) for name, values in seconds.items()} == {"slow": 3, "fast": 3}
    assert runs[:3] == ["slow", "fast", "fast"]
    assert (affordable(1e-3), affordable(6.0), affordable(100.0)) == (31, 10, 3)


def test_the_command_prints_and_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "layer.json"
    assert cli.main(["bench", "layer", *WORDS, "--dtype=float32", "--rounds=1", f"--json={path}"]) == 0
    out = capsys.readouterr().out
    for part in ("layer", "dense", "transformers grouped_mm", "part gate", "part unpermute", "TFLOP/s", "memory:"):
        assert part in out, part
    (facts,) = json.loads(path.read_text())
    assert facts["milliseconds"]["layer"] > 0 and facts["ratios"]["layer / dense"] > 0
    assert facts["shape"] == {"tokens": 24, "hidden": 16, "ffn_hidden": 12, "experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape=mixtral"], "there is no such shape; one of laptop"),
        (["--experts=1"], "--top-k 2 must be at most --experts 1"),
        (["--ranks=3"], "--ranks 3 must divide --experts 8"),
        (["--tokens=0"], "must be at least 1"),
        pytest.param(
            ["--device=cuda"], "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_message(words, said, capsys):
    assert cli.main(["bench", "layer", *words]) == 2
    assert said in capsys.readouterr().err


def test_megatrons_own_layer_on_two_ranks_computes_what_ours_does(tmp_path):
    mp.start_processes(
        agree,
        (
            TINY,
            str(tmp_path),
        ),
        nprocs=2,
        start_method="forkserver",
    )


def test_ranks_are_compared_beyond_their_arithmetic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = many_ranks.run(TINY, torch.float32, 2, 1, other_systems())
    assert {"moesys all_to_all", "megatron alltoall"} <= result.beyond.keys() < result.milliseconds.keys()
    assert any("beyond it" in line for line in result.lines())


def test_a_layer_is_measured_beyond_products_of_the_type_it_multiplies_in(monkeypatch):
    took = {"arithmetic in float32": 1.0, "arithmetic in bfloat16": 5.0}
    took |= {"moesys all_to_all": 1.5, "megatron alltoall": 7.0}

    def no_processes(work, arguments, **options):
        torch.save({name: [value] * 3 for name, value in took.items()}, f"{arguments[4]}/seconds.pt")

    monkeypatch.setattr(many_ranks.mp, "start_processes", no_processes)
    monkeypatch.setattr(many_ranks, "working_type", lambda dtype: torch.float32)
    result = many_ranks.run(TINY, torch.bfloat16, 2, None, other_systems())
    assert result.beyond == {"moesys all_to_all": 500.0, "megatron alltoall": 2000.0} and result.rounds == 3
    assert any("ours / theirs 0.25" in line for line in result.lines())


def test_without_the_repository_the_layer_is_measured_alone(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, comparisons.PACKAGE, None)
    assert cli.main(["bench", "layer", *WORDS, "--dtype=float32", "--rounds=1"]) == 0
    out = capsys.readouterr().out
    assert "other systems' layers are compared in a checkout of the repository alone" in out
    assert "transformers" not in out and "megatron" not in out and "dense" in out
