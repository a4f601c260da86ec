"""A user's own model and loop with experts over ranks computes what one process computes."""

from collections.abc import Iterator

import own_models
import pytest
import torch
from standing import Standing


@pytest.fixture(scope="module")
def four() -> Iterator[Standing]:
    standing = Standing(own_models.WORLD)
    yield standing
    standing.close()


@pytest.fixture(scope="module")
def alone() -> dict:
    return own_models.alone()


CASES = [
    (2, "fsdp", False, "mean", {}),
    (2, "ddp", False, "mean", {"chunks": 2}),
    (2, "plain", True, "sum", {"dispatcher": "hierarchical"}),
    (1, "fsdp", True, "mean", {"dispatcher": "all_gather"}),
    (1, "ddp", False, "mean", {"overlap_shared": False}),
    (4, "fsdp", False, "mean", {"reshard_after_forward": False}),
]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, of whole tensors."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("data", "loop", "groups", "gradients", "options"), CASES)
def test_loss_gradients_and_norm_equal_one_process(four, alone, data, loop, groups, gradients, options):
    answers = four.ask(own_models.together, data, loop, groups, gradients, options)
    total = sum(answer["loss"] for answer in answers) / (1 if gradients == "sum" else own_models.WORLD)
    assert total == pytest.approx(alone["loss"], rel=1e-5)
    for answer in answers:
        assert answer["norm"].item() == pytest.approx(alone["norm"].item(), rel=1e-5)
        for kind in ("gradients", "clipped"):
            assert answer[kind].keys() == alone[kind].keys()
            worst = {name: difference(answer[kind][name], one) for name, one in alone[kind].items()}
            assert max(worst.values()) < 1e-5, (kind, max(worst, key=worst.get), worst)


def test_gates_that_follow_the_load_follow_that_of_all_ranks(four):
    one = own_models.biases(0, 0)
    assert all(bias.abs().max() > 0 for bias in one)
    for answer in four.ask(own_models.biases, 2):
        torch.testing.assert_close(answer, one)


def test_what_does_not_fit_is_refused_with_a_remedy(four):
    said = four.ask(own_models.refusals)[0]
    rules = (
        "Linear holds no moesys.MoELayer",
        "an expert group of 2 ranks in a world of 4 leaves open which ranks hold copies",
        "the data group has ranks [0, 1], and those at this rank's place in their expert groups are [0, 0]",
        "expert_parallel cannot use a mesh of 2 axes without names",
        "has 6 experts, which 4 ranks cannot share evenly",
        "has experts that are split already",
        "parallel.dispatch.kind is 'all_too_all'",
        "parallel.dispatch.chunks is 0: must be a whole number of at least 1",
        "gradients='average' is neither 'mean' nor 'sum'",
        "has a SmearGate, which mixes the weights of all experts",
    )
    assert len(said) == len(rules)
    for text, rule in zip(said, rules, strict=True):
        assert rule in text and ("remedy: " in text or "must be" in text)


def test_a_model_made_on_the_meta_device_gets_its_values_afterwards(four):
    answers = four.ask(own_models.from_meta)
    for answer in answers:
        assert answer["held"] * own_models.WORLD == answer["fc1"].numel(), "each rank holds its part alone"
        assert answer["fc1"].abs().max() < 0.5 and answer["fc1"].std() > 0.1, "as nn.Linear starts, a step later"
        assert torch.equal(answer["fc1"], answers[0]["fc1"])
        assert not answer["bias"].any() and answer["loss"] < 10


def test_the_recorder_tells_what_an_own_loop_sends(four):
    (sentence, phases, moved), *others = four.ask(own_models.recorded)
    assert others == [("", [], [])] * 3, "rank 0 alone has the explanation"
    assert "xposed all-to-all is" in sentence and sentence.endswith("['data']"), "FSDP2's collectives are data's"
    layers = [("blocks.0.moe", "blocks.1.moe")]
    ways = {("dispatch", False), ("combine", False), ("combine", True), ("dispatch", True)}
    assert set(phases) == {(layer, *way) for layer in layers[0] for way in ways}
    groups = [[0, 1], [2, 3]]
    assert all(
        (moved[a][b] > 0) == (a != b and any({a, b} <= set(g) for g in groups)) for a in range(4) for b in range(4)
    )
