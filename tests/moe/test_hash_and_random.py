"""Gates without parameters: by the token's id, and by its number."""

from __future__ import annotations

import pytest
import torch
from gate_cases import feed_forward, layer, routed, vectors

from moesys.moe import Tokens
from moesys.moe.gates.hash import HashGate, balanced_table
from moesys.moe.gates.random import RandomGate
from moesys.moe.routing import MicroBatch

E, K = 6, 2
IDS = torch.arange(3000) % 500


def chosen(gate, tokens):
    output = gate(torch.zeros(len(tokens.number_T), 1), tokens, MicroBatch())
    assert torch.equal(output.weight_A, torch.full_like(output.weight_A, 1 / K))
    return output.expert_A.view(-1, K)


@pytest.mark.parametrize("gate", [HashGate(E, K, 7), RandomGate(E, K, 7)], ids=lambda gate: type(gate).__name__)
def test_every_set_of_experts_is_as_likely(gate):
    number = torch.arange(30_000)
    experts = chosen(gate, Tokens(number, id_T=number)).sort(-1).values
    pairs = torch.bincount(experts[:, 0] * E + experts[:, 1], minlength=E * E)
    wanted = torch.tensor([30_000 / 15 if a < b else 0.0 for a in range(E) for b in range(E)])
    # Five standard deviations of a count of 2,000.
    assert (pairs - wanted).abs().max() < 5 * 2000**0.5


def test_hash_goes_by_the_id_and_random_by_the_number():
    number = torch.randperm(len(IDS))
    by_id = chosen(HashGate(E, K, 7), Tokens(number, id_T=IDS))
    assert torch.equal(by_id, by_id[:500].repeat(6, 1))
    by_number = chosen(RandomGate(E, K, 7), Tokens(number, id_T=IDS))
    again = chosen(RandomGate(E, K, 7), Tokens(number.flip(0), id_T=IDS))
    assert torch.equal(by_number.flip(0), again)
    assert (by_number != by_number[:500].repeat(6, 1)).any()
    for gate in (HashGate(E, K, 8), RandomGate(E, K, 8)):
        other = chosen(gate, Tokens(number, id_T=IDS))
        assert (other != (by_id if isinstance(gate, HashGate) else by_number)).float().mean() > 0.5


def test_a_layer_gives_the_mean_of_the_chosen_experts():
    built = layer(RandomGate(E, K, 3))
    x = vectors(10)
    out = built(x[None])[0]
    experts = chosen(built.gate, Tokens(torch.arange(10)))
    for t in range(10):
        expected = sum(feed_forward(built.experts, e, x[t]) for e in experts[t].tolist()) / K
        torch.testing.assert_close(out[t], expected)


def greedy(counts: list[int], k: int) -> list[int]:
    """Loads of k-fold greedy assignment, most frequent first, each id counted once more than it occurs."""
    loads = [0] * E
    for count in sorted(counts, reverse=True):
        for e in sorted(range(E), key=lambda e: loads[e])[:k]:
            loads[e] += count + 1
    return sorted(loads)


@pytest.mark.parametrize("k", [1, 2])
def test_balanced_hash_gives_experts_equally_many_tokens(k):
    counts = (100_000 / torch.arange(1, 301) ** 1.1).long()
    counts[200:] = 0
    table = balanced_table(counts, E, k, key=7)
    assert table.shape == (300, k) and (k == 1 or (table[:, 0] != table[:, 1]).all())
    loads = torch.zeros(E, dtype=torch.int64).index_add(0, table.flatten(), (counts + 1).repeat_interleave(k))
    assert sorted(loads.tolist()) == greedy(counts.tolist(), k)
    # No id alone is more than an expert's share here, so all but equal loads are possible.
    assert loads.max() / loads.double().mean() < 1.3
    assert (table != balanced_table(counts, E, k, key=8)).any()
    gate = HashGate(E, k, 7, balanced=True)
    gate.fit(counts)
    assert torch.equal(
        gate(torch.zeros(300, 1), Tokens(IDS[:300], id_T=IDS[:300]), MicroBatch()).expert_A.view(-1, k), table
    )
    assert dict(gate.state_dict_buffers()).keys() == {"table_Vk"}


def test_a_hash_gate_needs_ids_and_a_balanced_one_their_counts():
    with pytest.raises(ValueError, match="needs the tokens' ids"):
        routed(HashGate(E, K, 7), vectors(3))
    with pytest.raises(ValueError, match="needs the counts of ids"):
        routed(HashGate(E, K, 7, balanced=True), vectors(3), Tokens(IDS[:3], id_T=IDS[:3]))
