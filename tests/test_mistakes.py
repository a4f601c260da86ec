"""Mistakes in YAML, through the command: one clear message, exit code 2, at once, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import changed

from moesys import cli

MOE = {"experts": 8, "top_k": 2, "ffn_hidden": 32}
BASE = {
    "model": {"hidden": 64, "layers": 4, "attention": {"heads": 4, "kv_heads": 2}, "moe": MOE},
    "train": {"seq_len": 64, "global_batch": 16, "micro_batch": 1},
    "cluster": {"ranks_per_node": 4, "device": "cpu"},
}

RULES = {
    "world is not the product": ({"parallel": {"dp": 3, "tp": 2}}, "dp(3) · tp(2) · pp(1) · cp(1) = 6 must be the world of 4 ranks"),
    "world is no multiple": ({"parallel": {"tp": 2, "pp": 3}}, "the world of 4 ranks must be a multiple of tp(2) · pp(3) · cp(1) = 6"),
    "shards do not divide dp": ({"parallel": {"dp_shard": 3}}, "parallel.dp_shard is 3: must divide dp = 4"),
    "experts' ranks": ({"parallel": {"ep": 8}}, "ep(8) · etp(1) = 8 must divide dp(4) · cp(1) · tp(1) = 4"),
    "experts over ranks": ({"model": {"moe": {"experts": 6}}, "parallel": {"ep": 4}}, "ep(4) must divide model.moe.experts(6)"),
    "inner size of experts": ({"model": {"moe": {"ffn_hidden": 33}}, "parallel": {"etp": 2}}, "etp(2) must divide model.moe.ffn_hidden(33)"),
    "ep without experts": ({"model": {"moe": None, "ffn_hidden": 64}, "parallel": {"ep": 2}}, "needs MoE layers"),
    "more choices than experts": ({"model": {"moe": {"top_k": 9}}}, "model.moe.top_k is 9: must be at most model.moe.experts(8)"),
    "no MoE layer left": ({"model": {"moe": {"first_dense": 4}, "ffn_hidden": 64}}, "must be less than model.layers(4)"),
    "heads over tp": ({"model": {"attention": {"kind": "mla", "heads": 2, "kv_heads": None}}, "parallel": {"tp": 4}}, "tp(4) must divide model.attention.heads(2)"),
    "key heads over tp": ({"parallel": {"tp": 4}}, "tp(4) must divide model.attention.kv_heads(2)"),
    "vocabulary over tp": ({"model": {"vocab_size": 257}, "parallel": {"tp": 2}}, "tp(2) must divide model.vocab_size(257)"),
    "feed-forward over tp": ({"model": {"moe": {"first_dense": 1}, "ffn_hidden": 65}, "parallel": {"tp": 2}}, "tp(2) must divide model.ffn_hidden(65)"),
    "sequence over tp": ({"train": {"seq_len": 63}, "parallel": {"tp": 2}}, "cp(1) · tp(2) = 2 must divide train.seq_len(63)"),
    "sequence over cp": ({"train": {"seq_len": 62}, "parallel": {"cp": 2}}, "2 · cp(2) = 4 must divide train.seq_len(62)"),
    "batch over ranks": ({"train": {"global_batch": 6}}, "dp(4) · micro_batch(1) = 4 must divide global_batch(6)"),
    "batch below ranks": ({"train": {"global_batch": 2}}, "remedy: set it to 4"),
    "more stages than layers": ({"model": {"layers": 3}, "parallel": {"pp": 4}}, "pp(4) · pp_virtual(1) = 4 stages need as many of model.layers(3)"),
    "a split of other length": ({"parallel": {"pp": 2, "pp_split": [1, 1, 2]}}, "needs 2 numbers (pp · pp_virtual)"),
    "a split of other sum": ({"parallel": {"pp": 2, "pp_split": [1, 2]}}, "with the sum of model.layers(4); these are 2 with the sum 3"),
    "virtual stages in 1f1b": ({"parallel": {"pp": 2, "pp_virtual": 2}}, "1f1b runs one stage per rank, and pp_virtual is 2"),
    "virtual stages without stages": ({"parallel": {"pp_virtual": 2}}, "needs pipeline stages, and pp is 1"),
    "zero bubble with shards": ({"parallel": {"pp": 2, "pp_schedule": "zero-bubble", "dp_shard": "full"}}, "does not go with sharded data"),
    "zero bubble with recomputation": ({"parallel": {"pp": 2, "pp_schedule": "zero-bubble"}, "train": {"recompute": "full"}}, "does not go with recomputation"),
    "zero bubble with compile": ({"parallel": {"pp": 2, "pp_schedule": "zero-bubble"}, "train": {"compile": True}}, "does not go with train.compile"),
    "micro-batches of an interleaved schedule": (
        {"parallel": {"pp": 4, "pp_schedule": "interleaved-1f1b"}, "train": {"global_batch": 6}},
        "6 micro-batches: interleaved-1f1b needs a multiple of pp(4)",
    ),
    "micro-batches of 1f1b": ({"parallel": {"pp": 4}, "train": {"global_batch": 2}}, "2 micro-batches: 1f1b needs at least pp(4)"),
    "context in Megatron": ({"engine": "megatron", "parallel": {"cp": 2}}, "Megatron's context parallelism needs Transformer Engine"),
    "a schedule not Megatron's": ({"engine": "megatron", "parallel": {"pp": 2, "pp_schedule": "gpipe"}}, "Megatron's schedules are 1f1b and interleaved-1f1b"),
    "hybrid sharding in Megatron": ({"engine": "megatron", "parallel": {"dp_shard": 2}}, "is over all data ranks (4) or none"),
    "experts under tp without sp in Megatron": ({"engine": "megatron", "parallel": {"tp": 2, "sp": False}}, "with sequence parallelism alone"),
    "latent attention in Megatron": ({"engine": "megatron", "model": {"attention": {"kind": "mla", "kv_heads": None}}}, "mixer mla is not in engine: megatron"),
    "biases of attention in Megatron": ({"engine": "megatron", "model": {"attention": {"bias": True}}}, "no attention with a bias on every projection"),
    "a norm over all heads in Megatron": ({"engine": "megatron", "model": {"attention": {"qk_norm": "full"}}}, "norm of queries and keys is per head"),
    "LoRA in Megatron": ({"engine": "megatron", "model": {"moe": {"lora_rank": 2}}}, "LoRA experts are not in engine: megatron"),
    "split biases in Megatron": ({"engine": "megatron", "model": {"moe": {"bias": True}}, "parallel": {"etp": 2}}, "are not split along their inner size"),
    "frozen in Megatron": ({"engine": "megatron", "train": {"freeze": ["embed.weight"]}}, "frozen parameters are not in engine: megatron"),
    "compiled in Megatron": ({"engine": "megatron", "train": {"compile": True}}, "torch.compile of blocks is not in engine: megatron"),
    "heads over hidden": ({"model": {"hidden": 62}}, "must divide model.hidden(62) unless model.attention.head_dim is given"),
    "key heads over heads": ({"model": {"attention": {"kv_heads": 3}}}, "must divide model.attention.heads(4)"),
    "odd heads": ({"model": {"attention": {"head_dim": 15}}}, "the size 15 must be even"),
    "no size for dense layers": ({"model": {"moe": None}}, "is needed: some layers are dense"),
    "phases beyond the end": (
        {"train": {"steps": 5, "schedule": {"kind": "wsd", "warmup": 3, "decay": 3}}},
        "warmup(3) + decay(3) must be at most train.steps(5)",
    ),
    "apex is not there": ({"train": {"optimizer": {"kind": "apex"}}, "cluster": {"device": "auto"}}, "needs NVIDIA apex with its FusedAdam"),
    "apex on CPU": ({"train": {"optimizer": {"kind": "apex"}}}, "apex computes on a GPU alone"),
    "wandb is not there": ({"output": {"wandb": True}}, "needs the package wandb"),
    "no such data": ({"data": {"kind": "text", "path": "nowhere"}}, "data.path is 'nowhere'"),
    "no path": ({"data": {"kind": "text"}}, "data.path"),
    "no such tokenizer": ({"data": {"tokenizer": "nowhere.json"}}, "data.tokenizer is 'nowhere.json'"),
    "a wrong type": ({"parallel": {"tp": "two"}}, "parallel.tp is 'two': must be a whole number of at least 1"),
    "a misspelt key": ({"parallel": {"tpp": 2}}, "did you mean"),
    "a key of another section": ({"lr": 0.1}, "train.optimizer.lr"),
    "a missing key": ({"model": {"moe": {"experts": None}}}, "model.moe.experts"),
    "a wrong choice": ({"parallel": {"pp_schedule": "gpip"}}, "must be one of gpipe, 1f1b, interleaved-1f1b, zero-bubble"),
}  # fmt: skip

FILES = {
    "broken YAML": "model: [1, 2",
    "an empty file": "",
    "a list": "- model",
    "a missing include": "include: nowhere.yaml\nmodel: {hidden: 8, layers: 1, ffn_hidden: 8}",
    "a key twice": "model: {hidden: 64, layers: 2, ffn_hidden: 64}\nseed: 1\nseed: 2\n",
}


def run(path: Path, capsys, *words: str) -> str:
    code = cli.main(["launch", str(path), *words])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("moesys launch: 1 problem in the configuration"), error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(("change", "message"), RULES.values(), ids=RULES)
def test_a_broken_rule_has_one_message_with_its_place(tmp_path, capsys, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(changed(BASE, change)))
    error = run(path, capsys)
    assert message in error, error
    assert f"{path}:" in error


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_an_unreadable_file_has_one_message(tmp_path, capsys, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert str(path) in run(path, capsys)


def test_a_missing_file_and_a_folder(tmp_path, capsys):
    assert "nowhere.yaml" in run(tmp_path / "nowhere.yaml", capsys)
    assert str(tmp_path) in run(tmp_path, capsys)


DATA = {
    "an empty folder": {},
    "empty files": {"a.txt": b"", "b.py": b""},
    "jsonl without its key": {"a.jsonl": b'{"body": "x"}\n'},
    "jsonl that is none": {"a.jsonl": b"hello\n"},
}


@pytest.mark.parametrize("files", DATA.values(), ids=DATA)
def test_data_that_cannot_be_read(tmp_path, capsys, files):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(changed(BASE, {"data": {"kind": "text", "path": str(folder)}})))
    assert "data." in run(path, capsys)


def test_all_mistakes_are_told_at_once(tmp_path, capsys):
    change = {
        "parallel": {"tp": 4, "ep": 3},
        "train": {"seq_len": 63, "schedule": {"kind": "wsd", "warmup": 1000}},
        "data": {"kind": "text"},
    }
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(changed(BASE, change)))
    assert cli.main(["launch", str(path)]) == 2
    error = capsys.readouterr().err
    assert all(key in error for key in ("parallel.ep", "train.schedule.decay", "data.path")), error


SLOW = ("torch", "ray", "transformers", "megatron", "matplotlib", "tensorboard", "datasets", "triton", "wandb")
"""What takes longer to import than it takes to answer."""


def test_a_fresh_process_answers_before_it_imports_anything_slow(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(changed(BASE, {"parallel": {"tp": 4}})))
    code = f"""
import sys
from moesys import cli
code = cli.main(["launch", {str(path)!r}])
print(*(name for name in {SLOW!r} if name in sys.modules))
sys.exit(code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stdout.split() == []
