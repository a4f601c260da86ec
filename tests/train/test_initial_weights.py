"""Runs that start from weights: of a released model, or of a checkpoint; and a released model out of a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
import yaml
from released import SIZES, mixtral
from safetensors.torch import load_file
from support import changed

from moesys.config import Config
from moesys.config.load import attempt, load
from moesys.data.corpus import open_corpus
from moesys.data.tokenizers import ByteTokenizer
from moesys.errors import CheckpointError, ConfigError, FileError
from moesys.hub import tokenizer
from moesys.hub.choose import NoFamily
from moesys.hub.folder import open_folder
from moesys.launchers.released import import_command
from moesys.train import checkpoint, initial_weights, optimizer
from moesys.train.engine import engine_of
from moesys.train.export import export
from moesys.train.fill import fill
from moesys.train.loop import Trainer
from moesys.train.validate import load_checked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "mixtral"
    mixtral(path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def file(folder: Path, small: dict) -> Callable[..., Path]:
    """Writes a configuration that starts from the released model."""

    def write(*changes: dict, place: Path = folder.parent / "run.yaml") -> Path:
        base = {key: value for key, value in small.items() if key not in ("model", "train")}
        base |= {"model": {"from": str(folder)}, "train": {"seq_len": 16, "global_batch": 4}}
        place.write_text(yaml.safe_dump(changed(base, *changes)))
        return place

    return write


@pytest.fixture(scope="module")
def make() -> Iterator[Callable[..., Trainer]]:
    """Makes trainers on one process, started as `train.init` says."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def trainer(config: Config) -> Trainer:
        start = initial_weights.find(config)
        made = Trainer(config, engine_of(config).connect(config), open_corpus(config), draw=start is None)
        if start is not None:
            fill(made.engine, start)
        return made

    yield trainer
    dist.destroy_process_group()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for shard in path.glob("*.safetensors") for name, value in load_file(shard).items()}


# ---- model: {from: FOLDER}


def test_a_released_model_gives_the_model_section_the_weights_and_nothing_else(file, folder):
    config = load_checked(file({"model": {"moe": {"balance_loss": 0.5, "capacity_factor": 2.0}}}))
    assert (config.model.hidden, config.model.depth, config.model.vocab_size) == (32, 2, 320)
    assert config.model.attention.head_dim == 12
    assert config.model.moe is not None
    assert (config.model.moe.balance_loss, config.model.moe.capacity_factor) == (0.5, 2.0), "training is one's own"
    assert config.train.init == str(folder)
    assert config.data.tokenizer == "bytes", "the folder has no tokenizer"


def test_keys_that_would_change_its_numbers_are_refused_with_their_places(file):
    found = attempt(file({"model": {"norm_eps": 1e-6, "moe": {"top_k": 1}, "attention": {"qk_norm": "head"}}}))
    assert {problem.key for problem in found.problems} == {
        "model.norm_eps", "model.moe.top_k", "model.attention.qk_norm",
    }  # fmt: skip
    for problem in found.problems:
        assert "config.json" in problem.rule
        assert "run.yaml:" in problem.where


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/nowhere", "does not exist"),
        (3, "must be the path"),
        (".", "has no config.json"),
    ],
)
def test_a_folder_that_is_none_is_one_message(file, given, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(file({"model": {"from": given}}, place=tmp_path / "run.yaml"))
    (problem,) = error.value.problems  # and not that model.hidden is missing
    assert problem.key == "model.from" and said in str(problem)


def test_what_a_config_json_says_that_cannot_be_followed_is_refused(folder, file, tmp_path):
    raw = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps(raw | {"hidden_act": "tanh", "new_key": 3, "top_p": 0.9}))
    with pytest.raises(ConfigError) as error:
        load(file({"model": {"from": str(tmp_path / "odd")}}, place=tmp_path / "run.yaml"))
    text = str(error.value)
    assert "hidden_act" in text and "new_key" in text and "top_p" not in text


# ---- train.init


def test_training_equals_transformers_from_the_same_weights(file, folder, make):
    """20 steps with the same batches and the same AdamW: the losses differ by 1e-4 at most."""
    t = {"steps": 20, "optimizer": {"lr": 1e-3, "clip": 0.5}, "schedule": {"kind": "constant"}}
    config = load_checked(file({"train": t, "model": {"moe": {"balance_loss": 0.0}}}))
    trainer = make(config)
    theirs = transformers.MixtralForCausalLM.from_pretrained(folder).train()
    o = config.train.optimizer
    decays = [p for p in theirs.parameters() if p.ndim > 1]
    norms = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": decays, "weight_decay": o.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    for step in range(20):
        windows = torch.from_numpy(np.stack([trainer.samples[4 * step + n] for n in range(4)]).astype(np.int64))
        logits = theirs(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), o.clip)
        for group in adam.param_groups:
            group["lr"] = optimizer.learning_rate(config.train, step + 1)
        adam.step()
        adam.zero_grad()
        assert trainer.train_step()["loss"] == pytest.approx(loss.item(), abs=1e-4), step


def test_a_checkpoint_gives_its_weights_and_no_optimizer(file, make, tmp_path):
    first = make(load_checked(file()))
    first.train_step()
    saved = first.save(tmp_path / "first" / "checkpoints")
    config = load_checked(file({"train": {"init": str(tmp_path / "first")}}))
    second = make(config)
    assert second.step == 0
    for (name, one), (_, other) in zip(first.engine.weights().items(), second.engine.weights().items(), strict=True):
        assert torch.equal(one, other), name
    assert not second.engine.optimizer.state
    assert initial_weights.find(config).path == saved


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(file, make, tmp_path, small):
    trainer = make(load_checked(file()))
    saved = trainer.save(tmp_path / "checkpoints")
    other = Config.model_validate(changed(small, {"train": {"init": str(saved)}}))
    with pytest.raises(CheckpointError, match=r"of another model:\n.*model.hidden"):
        initial_weights.find(other)
    raw = trainer.config.model_dump()
    raw["model"]["norm_eps"], raw["train"]["init"] = 1e-4, str(saved)
    with pytest.raises(CheckpointError, match=r"computes otherwise:\n.*model.norm_eps"):
        initial_weights.find(Config.model_validate(raw))
    raw["train"]["resume_changed"] = ["model.norm_eps"]
    assert initial_weights.find(Config.model_validate(raw)).path == saved


def test_a_released_model_of_another_computation_is_refused(file, folder):
    raw = load_checked(file()).model_dump()
    raw["model"]["rope_theta"] = 10.0
    with pytest.raises(FileError, match=r"of another model:\n  model.rope_theta is 10.0, and 1000000.0 there"):
        initial_weights.find(Config.model_validate(raw))


def test_a_weight_that_is_not_finite_is_named(file, folder, make, tmp_path):
    model = transformers.MixtralForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] = torch.inf
    model.save_pretrained(tmp_path / "bad")
    config = load_checked(file({"model": {"from": str(tmp_path / "bad")}}, place=tmp_path / "run.yaml"))
    with pytest.raises(CheckpointError, match=r"layers.1.attention.k_proj.weight is not finite"):
        make(config)


# ---- moesys export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [10**9, 20_000], ids=["one file", "many files"])
def test_what_was_imported_is_exported_byte_for_byte(dtype, size, file, make, tmp_path):
    mixtral(tmp_path / "in", dtype, num_hidden_layers=2)
    config = load_checked(file({"model": {"from": str(tmp_path / "in")}}, place=tmp_path / "run.yaml"))
    saved = make(config).save(tmp_path / "checkpoints")
    done = export(saved, tmp_path / "out", str(dtype).removeprefix("torch."), size)
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype == dtype
        assert torch.equal(value, after[name]), name
    shards = [path for path in (tmp_path / "out").glob("*.safetensors")]
    assert done.files == len(shards) and (len(shards) == 1) == (size > 20_000)
    assert max(path.stat().st_size for path in shards) < max(size, 320 * 32 * 4) + 20_000
    # The index, headers and files agree.
    assert open_folder(tmp_path / "out").tensors.keys() == before.keys()


def test_transformers_opens_what_is_exported_and_computes_the_same(file, make, tmp_path):
    trainer = make(load_checked(file()))
    trainer.train_step()
    saved = trainer.save(tmp_path / "checkpoints")
    export(saved, tmp_path / "out", shard_size=30_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    ours, ids = checkpoint.model(saved), torch.randint(320, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("rope_theta", "rope_parameters", "torch_dtype", "dtype"):  # old and new readers
        assert key in raw


def test_an_export_is_complete_or_absent(file, make, tmp_path, monkeypatch):
    saved = make(load_checked(file())).save(tmp_path / "checkpoints")
    calls = 0

    def full(*arguments: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        real(*arguments, **more)

    from moesys.hub import writer

    real = writer.save_file
    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(FileError, match=r"out cannot be written: No space left"):
        export(saved, tmp_path / "out", shard_size=20_000)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
    monkeypatch.undo()
    export(saved, tmp_path / "out")
    with pytest.raises(FileError, match="exists already"):
        export(saved, tmp_path / "out")


def test_a_model_that_no_family_has_names_what_is_in_the_way(small, make, tmp_path):
    config = Config.model_validate(changed(small, {"model": {"moe": {"gate": {"kind": "cosine"}}}}))
    saved = make(config).save(tmp_path / "checkpoints")
    with pytest.raises(NoFamily, match=r"the nearest, but for\n.*model.moe.gate.kind: 'cosine'"):
        export(saved, tmp_path / "out")


def test_the_tokenizer_of_bytes_is_one_for_transformers():
    files = tokenizer.files(ByteTokenizer())
    from tokenizers import Tokenizer

    theirs, ours = Tokenizer.from_str(files["tokenizer.json"].decode()), ByteTokenizer()
    for text in ("def f(x):\n\treturn x  # ¬é漢字🙂\n", "", " \x00\x7f"):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text.encode()).tolist()
        assert theirs.decode(ids).encode() == ours.decode(np.asarray(ids))
    assert theirs.encode("<|endoftext|>").ids == [ours.end_of_document]


# ---- moesys import


def test_import_writes_a_configuration_that_trains_on(folder, tmp_path, capsys):
    assert import_command(folder, tmp_path / "run.yaml") == 0
    assert "every weight is there" in capsys.readouterr().out
    config = load(tmp_path / "run.yaml").config
    assert initial_weights.find(config).path == folder
    assert config.model.hidden == SIZES["hidden_size"]
    with pytest.raises(FileError, match="exists, and is left as it is"):
        import_command(folder, tmp_path / "run.yaml")
