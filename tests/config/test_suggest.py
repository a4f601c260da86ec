"""What a wrong word most likely means."""

from __future__ import annotations

import pytest

from moesys.config import legal
from moesys.config.load import attempt
from moesys.config.suggest import ELSEWHERE, SAME

MODEL = "model: {hidden: 64, layers: 2, ffn_hidden: 128, moe: {experts: 4, ffn_hidden: 8}}\n"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("cluster.device=gpu", "cuda"),
        ("cluster.device=GPU", "cuda"),
        ("cluster.device=gloo", "cpu"),
        ("model.moe.gate=topk", "top_k"),
        ("model.moe.gate=Top-K", "top_k"),
        ("model.moe.gate={kind: topk}", "top_k"),
        ("train.dtype=bf16", "bfloat16"),
        ("train.dtype=fp32", "float32"),
        ("train.dtype=fp16", "bfloat16"),
        ("train.optimizer.kind=adam", "adamw"),
        ("parallel.dispatch=a2a", "all_to_all"),
        ("parallel.dispatch=AllGather", "all_gather"),
        ("parallel.pp_schedule=1F1B", "1f1b"),
        ("parallel.pp_schedule=interleaved_1f1b", "interleaved-1f1b"),
        ("launch.launcher=torchrun", "local"),
        ("data.kind=hf", "huggingface"),
        ("engine=mcore", "megatron"),
    ],
)
def test_another_word_for_one_of_ours(tmp_path, override, word):
    path = tmp_path / "run.yaml"
    path.write_text(MODEL)
    (problem,) = attempt(path, [override]).problems
    assert problem.remedy == f"did you mean {word}?" and problem.given


@pytest.mark.parametrize("override", ["train.recompute=on", "parallel.dispatch=deepep"])
def test_a_word_that_means_none_of_ours_gets_no_guess(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(MODEL)
    (problem,) = attempt(path, [override]).problems
    assert not problem.remedy


def test_every_answer_is_legal_somewhere():
    keys = list(legal.keys())
    words = {word for key in keys for word in legal.choices(legal.type_at(key.split(".")))}
    assert {ours for ours, *_ in SAME} <= words
    assert set(ELSEWHERE.values()) <= set(keys)
