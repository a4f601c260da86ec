"""What a trained model is good for: text and losses, of a run, of its checkpoint, of a released model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import changed
from torch import Tensor

from moesys import cli
from moesys.data.samples import Samples
from moesys.models.sampling import Sampler
from moesys.train import checkpoint
from moesys.train.generate import generate
from moesys.train.open_model import open_model

SEQUENCES = 6
"""Held-out sequences of an evaluation: less than the global batch of 8."""
TEXT = "für größere Modelle: each of the experts 🙂 sees its tokens\n" * 12


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(small: dict, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers with experts over both, a capacity, and a held-out text beside its own."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"steps": 6, "eval_every": 3, "eval_sequences": SEQUENCES, "eval": {"other": {"path": str(other)}}}
    raw = changed(small, {"train": train | {"micro_batch": 4}, "output": {"runs": str(folder), "tensorboard": False}})
    raw |= {"parallel": {"ep": 2}, "cluster": {"device": "cpu", "ranks_per_node": 2}}
    raw["model"] |= {"layers": 2, "moe": raw["model"]["moe"] | {"capacity_factor": 1.0}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    words = [sys.executable, "-m", "moesys.cli", "launch", str(path), "--launcher", "local"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "other " in done.stdout and "loss of other" in done.stdout, done.stdout
    return folder / "tiny"


def lines(run: Path) -> Iterator[dict]:
    return map(json.loads, (run / "metrics.jsonl").read_text().splitlines())


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def evaluated(capsys: pytest.CaptureFixture, folder: Path, *words: str) -> dict:
    path = folder / "figures.json"
    assert cli.main(["eval", *words, "--launcher", "local", "--json", str(path)]) == 0
    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    for name, text in found["texts"].items():
        assert name in shown and f"{text['loss']:.4f}" in shown
    return found


def test_every_text_is_reported_by_its_name(run):
    found = [line for line in lines(run) if "heldout_loss" in line]
    assert [line["step"] for line in found] == [3, 6]
    summary = json.loads((run / "summary.json").read_text())
    for line in found:
        bits = line["eval/other/loss"] / log(2) / (len(TEXT.encode()) / (len(TEXT.encode())))
        assert line["eval/other/bits_per_byte"] == pytest.approx(bits, rel=1e-2), "ends of documents have no bytes"
    assert {key: summary[key] for key in found[-1] if key != "step"} == {
        k: v for k, v in found[-1].items() if k != "step"
    }
    assert found[-1]["eval/other/loss"] != found[-1]["heldout_loss"]


def test_eval_finds_the_losses_of_the_run_and_leaves_it_as_it_was(run, tmp_path, capsys):
    before, last = contents(run), [line for line in lines(run) if "heldout_loss" in line][-1]
    found = evaluated(capsys, tmp_path, str(run))
    texts = found["texts"]
    assert list(texts) == ["held-out", "other"] and found["world_size"] == 2
    assert texts["held-out"]["loss"] == last["heldout_loss"] and texts["other"]["loss"] == last["eval/other/loss"]
    assert texts["held-out"]["bits_per_byte"] == last["heldout_bits_per_byte"]
    assert texts["held-out"]["sequences"] == SEQUENCES and texts["held-out"]["tokens"] == SEQUENCES * 16
    assert texts["other"]["perplexity"] == pytest.approx(exp(texts["other"]["loss"]))
    assert contents(run) == before


def test_another_text_in_another_layout_has_the_loss_of_one_pass(run, other, tmp_path, capsys):
    path = run / "checkpoints" / "step-00000006"
    words = ["--all", "--data", str(other), "parallel.ep=1", "parallel.dp_shard=full", "train.micro_batch=1"]
    words.append("data.path=/nowhere")  # the run's own data need not be there
    found = evaluated(capsys, tmp_path, str(path), *words, "model.moe.capacity_factor=null")
    (name,) = found["texts"]
    text = found["texts"][name]
    windows = Samples(np.array([*TEXT.encode(), 256]), 16)
    assert name == "other" and text["sequences"] == len(windows)
    expected = mean_loss(checkpoint.model(path), windows, free=True)
    assert text["loss"] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def mean_loss(model, windows: Samples, free: bool = False) -> float:
    for block in model.blocks() if free else []:
        block.ffn.gate.capacity = type(block.ffn.gate.capacity)()
    ids = torch.stack([torch.from_numpy(window) for window in windows])
    tokens, labels = ids[:, :-1], ids[:, 1:]
    logits = model(tokens, torch.stack((torch.arange(tokens.numel()).view_as(tokens), tokens), -1))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()).item()


def test_generate_writes_what_the_model_gives_and_the_same_for_a_seed(run):
    words = [sys.executable, "-m", "moesys", "generate", str(run), "--prompt", "-", "--tokens", "24", "--seed", "5"]
    before = contents(run)
    done = subprocess.run(words, input="größe".encode(), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    opened = open_model(run)
    sampler = Sampler(0.8, 0.95, 5, 257)
    prompt = np.frombuffer("größe".encode(), np.uint8)
    tokens = [*generate(opened.model, prompt, sampler, 24, 256)]
    text = ("größe".encode() + bytes(tokens)).decode("utf-8", "replace")
    assert done.stdout.decode() == f"{text}\n"
    told = done.stderr.decode()
    assert f"{len(tokens)} tokens in " in told and "step-00000006" in told
    assert "the text may have 31 tokens; the model was trained on sequences of 16" in told
    assert contents(run) == before


@torch.no_grad()
def test_greedy_text_is_the_most_probable_of_whole_passes(run):
    opened, start = open_model(run / "checkpoints" / "step-00000006"), [1, 2, 3]
    text = [*start, *generate(opened.model, np.array(start), Sampler(0.0, known=257), 8)]
    assert len(text) == len(start) + 8
    tokens = torch.tensor([text])
    logits = opened.model(tokens, torch.stack((torch.arange(len(text))[None], tokens), -1))
    assert logits[0, 2:-1, :257].argmax(-1).tolist() == text[3:]


def test_a_document_begins_where_no_prompt_is_given_and_ends_the_text(run, monkeypatch, capsys):
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits_BV: ends.pop(0))
    ends: list[Tensor] = [torch.tensor([104]), torch.tensor([105]), torch.tensor([256])]
    assert cli.main(["generate", str(run), "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "hi\n" and "2 tokens in " in shown.err and "then the end of the document" in shown.err


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A random Mixtral in a folder as transformers writes it, with a tokenizer of bytes and some pairs."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("released") / "mixtral"
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, **special))
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=12,
        max_position_embeddings=32, initializer_range=0.3, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, model


def test_a_released_model_writes_what_transformers_does(released):
    folder, model = released
    opened = open_model(folder)
    prompt = opened.tokenizer.encode(b"the gate of")
    found = [*generate(opened.model, prompt, Sampler(0.0), 12)]
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert found == expected[0, len(prompt) :].tolist()


@torch.no_grad()
def test_a_released_model_has_the_loss_of_transformers(released, other, tmp_path, capsys):
    folder, model = released
    found = evaluated(capsys, tmp_path, str(folder), "--data", str(other), "train.eval_sequences=4")
    opened = open_model(folder)
    end = opened.tokenizer.end_of_document
    windows = Samples(np.array([*opened.tokenizer.encode(TEXT.encode()), end]), 32, seed=0)
    losses = [model(ids[:, :-1]).logits.double() for ids in (torch.from_numpy(windows[n])[None] for n in range(4))]
    labels = [torch.from_numpy(windows[n])[None, 1:] for n in range(4)]
    expected = torch.nn.functional.cross_entropy(torch.cat(losses).flatten(0, 1), torch.cat(labels).flatten()).item()
    assert found["texts"]["other"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_opened_or_evaluated_is_said(run, released, tmp_path, capsys):
    def told(*words: str) -> str:
        assert cli.main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    assert f"{tmp_path} has neither config.json nor a checkpoint\n    remedy: name a run" in told("generate", tmp_path)
    assert f"{tmp_path}/gone does not exist" in told("eval", tmp_path / "gone")
    assert "is a released model, and has no held-out data of its own\n    remedy: name a text" in told(
        "eval", released[0]
    )
    message = told("eval", run, f"data.tokenizer={released[0] / 'tokenizer.json'}", "--launcher", "local")
    assert "data.tokenizer" in message and "not the tokenizer of the model" in message
    message = told("eval", run, "train.seq_len=0")
    assert "train.seq_len is 0: must be a whole number of at least 1" in message and "/eval" not in message
    assert "train.eval.nix.path" in told("eval", run, "--data", "nix.txt")
