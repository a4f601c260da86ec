"""Decoding piece by piece gives the logits of one pass over the whole text, and remembers no more than it needs."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from moesys.config.registry import GATES, kinds
from moesys.config.schema import ModelConfig
from moesys.models.decoder import Decoder
from moesys.models.decoding import decoding, dropless, recomputed
from moesys.models.empty import empty
from moesys.models.key_cache import CachedCore, LatentCache, Ring, Rows
from moesys.models.parts.gates.kind import describe

VOCAB, TOKENS = 50, 24
PIECES = [7, 1, 1, 5, 1, 1, 1, 7]
"""Tokens of each piece: a prompt, single ones, more than one behind those before."""
LOCAL = {"heads": 4, "kv_heads": 2, "head_dim": 8, "window": 3}
YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 8, "mscale": 1.0, "mscale_all_dim": 0.7}
LONGROPE = {"kind": "longrope", "original_seq_len": 10, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": {"attention": {"heads": 4, "kv_heads": 2, "bias": True, "qk_norm": "head"}},
    "mha": {"attention": {"heads": 2, "qk_norm": "full"}},
    "mla": {"attention": {"kind": "mla", "heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
                          "qk_rope_head_dim": 4, "v_head_dim": 6}},
    "mla, compressed queries": {"attention": {"kind": "mla", "heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
                                              "qk_rope_head_dim": 4, "v_head_dim": 6, "q_lora_rank": 10}},
    "window": {"attention": LOCAL},
    "window of one": {"attention": LOCAL | {"window": 1}},
    "gated": {"attention": LOCAL | {"output_gate": True, "qk_norm": "head_after_rotary", "clip_qkv": 1.0}},
    "window as long": {"attention": LOCAL | {"window": TOKENS}},
    "sinks": {"attention": {"heads": 4, "kv_heads": 2, "sinks": True, "rotary_fraction": 0.5}},
    "sinks in a window": {"attention": LOCAL | {"sinks": True}},
    "yarn": {"attention": {"kind": "mla", "heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
                           "qk_rope_head_dim": 4, "v_head_dim": 6}, "rope_scaling": YARN},
    "longrope": {"attention": {"heads": 4}, "rope_scaling": LONGROPE},
    "mtp": {"attention": {"heads": 4}, "mtp": {"depth": 2}},
    "pattern": {"attention": {"heads": 4}, "mixers": {"local": LOCAL | {"window": 6}},
                "layers": {"count": 4, "repeat": ["local moe", "attention dense"]}},
}  # fmt: skip
GATE: dict[str, dict[str, Any]] = {
    "base": {"top_k": 1},
    "expert_choice": {"gate": {"kind": "expert_choice", "causal": True}},
    "hash": {},
    "prototype": {},
    "top_k": {"shared_experts": 1, "bias_rate": 0.1, "zero_experts": 1, "gate": {"kind": "top_k", "score": "sigmoid"}},
}
"""Keys of gates beside their kind."""


def model(moe: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    experts = {"experts": 4, "top_k": 2, "ffn_hidden": 16, "capacity_factor": 0.5} | (moe or {})
    if experts.get("gate", {}).get("kind", "top_k") not in ("top_k", "cosine", "prototype"):
        experts.pop("capacity_factor")
    base = {"hidden": 32, "layers": 2, "ffn_hidden": 24, "attention": {"heads": 4}, "init_std": 0.3, "moe": experts}
    return ModelConfig.model_validate(base | keys)


def built(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    found = Decoder(config, VOCAB)
    for name, sinks in found.named_parameters():
        if name.endswith("sinks.weight"):
            sinks.data.normal_()
    for name, buffer in found.named_buffers():
        if name.endswith(("selection_bias", "threshold_E")):
            buffer.uniform_(0.1, 0.4)
    return found.eval()


def text(sequences: int = 2) -> Tensor:
    return torch.randint(VOCAB, (sequences, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole(decoder: Decoder, tokens_BS: Tensor) -> Tensor:
    """Logits [B, S, V] of one pass."""
    numbers = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return decoder(tokens_BS, torch.stack((numbers, tokens_BS), -1))


def assert_pieces_equal_one_pass(decoder: Decoder, tokens_BS: Tensor) -> None:
    expected, end = whole(decoder, tokens_BS), 0
    with decoding(decoder, tokens_BS.shape[1]) as decode:
        for size, piece in zip(PIECES, tokens_BS.split(PIECES, 1), strict=True):
            end += size
            torch.testing.assert_close(decode(piece), expected[:, end - 1], rtol=1e-5, atol=1e-5)


def assert_pieces_equal_each_pass(decoder: Decoder, tokens_BS: Tensor) -> None:
    """The same of models that are not causal: what a later token adds changes the logits of those before."""
    expected = [whole(decoder, tokens_BS[:, :end])[:, -1] for end in accumulate(PIECES)]
    with decoding(decoder) as decode:
        for piece, logits in zip(tokens_BS.split(PIECES, 1), expected, strict=True):
            torch.testing.assert_close(decode(piece), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ATTENTION)
def test_pieces_give_the_logits_of_one_pass(kind: str) -> None:
    config = dropless(model(**ATTENTION[kind]))
    assert recomputed(config) == ""
    assert_pieces_equal_one_pass(built(config), text())


@pytest.mark.parametrize("kind", sorted(set(kinds(GATES)) - {"replay"}))
def test_every_gate_decodes_as_it_evaluates(kind: str) -> None:
    """A gate that routes a token by others computes the text again; its description says so."""
    keys = {"gate": {"kind": kind}} | GATE.get(kind, {})
    config = dropless(model(keys))
    if not describe(config.moe).token_by_token:
        assert recomputed(config) == f"gate {kind} routes whole sequences"
    decoder = built(config)
    check = assert_pieces_equal_one_pass if describe(config.moe).token_by_token else assert_pieces_equal_each_pass
    check(decoder, text(1))


@pytest.mark.parametrize("kind", ["expert_choice", "soft", "smear"])
def test_routing_of_whole_sequences_needs_to_be_computed_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, as if its gate allowed that, such a model gives other logits: the property is no caution."""
    config = model({"gate": {"kind": kind}})
    assert recomputed(config)
    monkeypatch.setattr(kinds(GATES)[kind], "token_by_token", True)
    with pytest.raises(AssertionError, match="not close"):
        assert_pieces_equal_each_pass(built(config), text(1))


def test_a_mixer_without_a_cache_computes_the_text_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesys.models.parts.mixers.grouped_query import GroupedQuery

    monkeypatch.setattr(GroupedQuery, "remembers", False)
    config = dropless(model())
    assert recomputed(config) == "mixer gqa has no cache"
    assert_pieces_equal_one_pass(built(config), text())


def test_capacity_does_not_limit_decoding_but_where_it_is_the_gates_own() -> None:
    limited = model({"pad_to_capacity": True, "min_capacity": 3, "eval_capacity_factor": 2.0})
    free = dropless(limited).moe
    assert (free.capacity_factor, free.eval_capacity_factor, free.min_capacity, free.pad_to_capacity) == (
        None,
        None,
        0,
        False,
    )
    moe = {"experts": 4, "ffn_hidden": 16, "capacity_factor": 0.5, "gate": "expert_choice"}
    chosen = ModelConfig.model_validate({"hidden": 8, "layers": 1, "moe": moe})
    assert dropless(chosen) is chosen
    dense = ModelConfig(hidden=8, layers=1, ffn_hidden=8)
    assert dropless(dense) is dense


def test_the_model_is_afterwards_as_it_was() -> None:
    for kind in ("pattern", "mla"):
        decoder = built(dropless(model(**ATTENTION[kind]))).train()
        before, names = whole(decoder.eval(), text()), [name for name, _ in decoder.named_modules()]
        decoder.train()
        with decoding(decoder) as decode:
            decode(text())
            assert not decoder.training
            assert any(isinstance(m, (CachedCore, LatentCache)) for m in decoder.modules())
        assert decoder.training and decoder.positions is None
        assert [name for name, _ in decoder.named_modules()] == names
        decoder(text()).sum().backward()
        torch.testing.assert_close(whole(decoder.eval(), text()), before, rtol=0, atol=0)


def test_the_head_sees_the_last_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built(dropless(model()))
    seen = []
    decoder.head.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    with decoding(decoder) as decode:
        assert decode(text()).shape == (2, VOCAB)
    assert seen == [(2, 1, 32)]


def test_a_window_keeps_its_own_keys_and_a_latent_its_own_numbers() -> None:
    ring = Ring(4)
    for token in range(10):
        seen = ring.append(torch.full((1, 1, 2), float(token)))
        assert sorted(seen[0, :, 0].tolist()) == list(range(max(0, token - 3), token + 1))
    assert ring.append(torch.tensor([[[10.0], [11.0]]]).expand(1, 2, 2))[0, :, 0].tolist() == [7, 8, 9, 10, 11]
    rows = Rows()
    assert rows.append(torch.zeros(1, 3, 2)).shape == (1, 3, 2) and rows.append(torch.ones(1, 5, 2)).shape == (1, 8, 2)
    cache = LatentCache()
    held = cache(torch.zeros(1, 5, 12), torch.zeros(1, 5, 1, 4))
    assert [tuple(x.shape) for x in held] == [(1, 5, 12), (1, 5, 1, 4)]


def test_matrices_in_the_type_of_the_stream_give_the_same_numbers() -> None:
    config = dropless(model({"shared_experts": 1}, tie_embeddings=True, **ATTENTION["sinks"]))
    torch.manual_seed(0)
    wide = Decoder(config, VOCAB, torch.bfloat16).eval()
    narrow = empty(config, VOCAB, torch.bfloat16, narrow=True)
    narrow.load_state_dict(wide.state_dict())
    types = {name: p.dtype for name, p in narrow.named_parameters()}
    assert types["layers.0.ffn.experts.fc1"] == types["embed.weight"] == torch.bfloat16
    assert types["layers.0.ffn.gate.projection.weight"] == types["norm.weight"] == torch.float32
    assert narrow.head.weight is narrow.embed.weight
    assert torch.equal(whole(narrow, text()), whole(wide, text()))
