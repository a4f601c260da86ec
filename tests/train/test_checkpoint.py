"""Checkpoints on disk: what they restore, what they say of themselves, and what is made of damaged ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import changed
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from moesys.config import Config
from moesys.data.corpus import Corpus, open_corpus
from moesys.errors import CheckpointError, TrainingError
from moesys.train import checkpoint, manifest, saved_shapes, storage
from moesys.train.engine import engine_of
from moesys.train.loop import Trainer

FILE = "__0_0.distcp"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return {
        "seed": 1,
        "model": {
            "hidden": 8,
            "layers": 2,
            "attention": {"heads": 2},
            "ffn_hidden": 8,
            "moe": {"experts": 2, "ffn_hidden": 4, "first_dense": 1, "bias_rate": 0.01},
        },
        "train": {"seq_len": 8, "global_batch": 2},
        "data": {"kind": "text", "path": str(folder / "text.txt"), "heldout": 0.2, "cache": str(folder / "cache")},
        "cluster": {"device": "cpu"},
        "output": {"keep": 2},
    }


@pytest.fixture(scope="module")
def trainer(raw: dict) -> Iterator[Callable[..., Trainer]]:
    """Makes trainers on one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def make(*changes: dict, corpus: Corpus | None = None, draw: bool = True) -> Trainer:
        config = Config.model_validate(changed(raw, *changes))
        return Trainer(config, engine_of(config).connect(config), corpus or open_corpus(config), draw=draw)

    yield make
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    run = trainer()
    for _ in range(2):
        run.train_step()
        checkpoint.save(folder, run.engine, run.corpus, run.step, run.seen, {"skipped": run.step})
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def older(path: Path) -> None:
    """Make it one of those that were written without checksums."""
    meta = json.loads((path / manifest.META).read_text())
    for key in ("files", "checksum"):
        del meta[key]
    (path / manifest.META).write_text(json.dumps(meta))


def test_a_checkpoint_restores_the_step_the_place_and_what_was_kept_with_it(trainer, written):
    whole, again = trainer(), trainer()
    for _ in range(2):
        whole.train_step()
    assert again.resume(written) == written / "step-00000002"
    assert (again.step, again.seen) == (2, 4)
    assert again.resumed.state == {"skipped": 2} and again.resumed.changes == [] == again.resumed.fresh
    assert again.train_step()["loss"] == whole.train_step()["loss"]


def test_the_folder_alone_gives_the_model(trainer, raw, written, tmp_path):
    """No configuration, no data: both are gone. One process computes what the run did."""
    run = trainer()
    run.resume(written)
    alone = tmp_path / "taken-elsewhere"
    shutil.copytree(written / "step-00000002", alone)
    model = checkpoint.model(alone)
    weights = run.engine.weights()
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)
    assert "layers.1.ffn.gate.selection_bias" in found
    tokens = torch.arange(8)[None]
    assert model(tokens, torch.stack([tokens, tokens], -1)).shape == (1, 8, 320)
    meta = json.loads((alone / manifest.META).read_text())
    assert (meta["step"], meta["samples"], meta["seed"], meta["vocab_size"]) == (2, 4, 1, 320)
    assert meta["engine"] == "native" and meta["dtype"] == {"weights": "float32", "computation": "float32"}
    assert meta["tokenizer"]["kind"] == "bytes" and meta["tokenizer"]["end_of_document"] == 256
    assert meta["versions"]["torch"] == torch.__version__ and meta["versions"].keys() == {"moesys", "torch", "python"}
    assert meta["world_size"] == 1 and meta["layout"]["ep"] == 1
    assert meta["data"]["train_tokens"] > meta["data"]["heldout_tokens"] > 0 and len(meta["data"]["digest"]) == 32
    assert meta["config"]["model"]["vocab_size"] == 320 and meta["config"]["train"]["seq_len"] == 8
    assert meta["files"].keys() == {".metadata", FILE}


def test_the_newest_good_checkpoint_is_not_of_skipped_steps(trainer, copy):
    run = trainer()
    run.resume(copy)
    assert manifest.newest_good(copy) == copy / "step-00000002"
    state = {"skips": {"consecutive": 2, "total": 2}}
    checkpoint.save(copy, run.engine, run.corpus, 3, run.seen, state)
    assert manifest.newest(copy) == copy / "step-00000003" and manifest.newest_good(copy) == copy / "step-00000002"
    shutil.rmtree(copy / "step-00000002")
    shutil.rmtree(copy / "step-00000001", ignore_errors=True)
    assert manifest.newest_good(copy) == copy / "step-00000003"


def test_the_model_in_a_checkpoint_of_another_version_is_read_if_its_unknown_keys_are_harmless(copy):
    path = copy / "step-00000002"
    meta = json.loads((path / manifest.META).read_text())

    def write(**keys: Any) -> None:
        config = changed(meta["config"], {"model": {"moe": keys}, "output": {"colour": "red"}})
        del config["model"]["moe"]["zero_tau"]  # a key that the writer did not know
        other = {key: value for key, value in meta.items() if key != "checksum"} | {"config": config}
        (path / manifest.META).write_text(json.dumps(other | {"checksum": manifest.checksum(other)}))

    write(sinks=False, window={"size": None, "kind": "none"})
    assert checkpoint.model(path).layers["1"].ffn.gate.selection_bias.shape == (2,)
    write(sinks=False, window={"size": 4, "kind": "none"})
    with pytest.raises(
        CheckpointError, match=r"has keys of another version: model\.moe\.window\.size\n    remedy: use"
    ):
        checkpoint.model(path)


def test_what_a_balanced_hash_gate_learned_of_the_data_comes_along(trainer, tmp_path):
    change = {"model": {"moe": {"gate": {"kind": "hash", "table": "balanced"}, "bias_rate": 0.0}}}
    run = trainer(change)
    path = run.save(tmp_path / "run" / "checkpoints")
    (gate,) = [layer.gate for layer in run.engine.moe_layers().values()]
    assert torch.equal(checkpoint.model(path).layers["1"].ffn.gate.table_Vk, gate.table_Vk)


def test_a_tokenizer_of_its_own_lies_in_the_checkpoint(trainer, raw, tmp_path):
    vocabulary = {chr(number): number for number in range(32, 127)} | {"\n": 10, "</s>": 1}
    file = tmp_path / "own.json"
    content = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": " "},
    }
    file.write_text(json.dumps(content))
    run = trainer({"data": {"tokenizer": str(file)}, "model": {"vocab_size": 320}}, corpus=_own(raw, file))
    file.unlink()
    path = run.save(tmp_path / "run" / "checkpoints")
    assert json.loads((path / checkpoint.TOKENIZER).read_text()) == content
    meta = json.loads((path / manifest.META).read_text())
    assert meta["tokenizer"]["kind"] == "tokenizer.json" and checkpoint.TOKENIZER in meta["files"]


def _own(raw: dict, file: Path) -> Corpus:
    from moesys.data.tokenizers import HFTokenizer

    plain = open_corpus(Config.model_validate(changed(raw, {"model": {"vocab_size": 320}})))
    tokenizer = HFTokenizer(file)
    assert tokenizer.end_of_document == 1
    return replace(plain, tokenizer=tokenizer)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, bit: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    where = len(content) // 2 * 8 + 3 if bit is None else bit
    content[where // 8] ^= 1 << where % 8
    path.write_bytes(content)


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "older"])
@pytest.mark.parametrize("name", [FILE, saved_shapes.METADATA])
@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, flip], ids=["cut", "empty", "deleted", "flipped"])
def test_damage_is_one_message_with_the_way_on(trainer, copy, damage, name, checksums):
    path = copy / "step-00000002"
    if not checksums:
        if damage is flip:
            return  # nothing but a checksum shows it
        older(path)
    damage(path / name)
    with pytest.raises(CheckpointError) as caught:
        trainer().resume(copy)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged: ") and name in message and message.count("\n") == 1
    assert f"the same command will go on from step-00000001: mv {path} {copy.parent}/damaged-step-00000002" in message
    os.rename(path, copy.parent / "damaged-step-00000002")
    assert trainer().resume(copy) == copy / "step-00000001"


def spread(count: int) -> list[int]:
    return torch.linspace(0, count - 1, 64).long().tolist()


def test_no_flipped_bit_is_accepted(copy):
    """Of either file some sixty, from the first to the last."""
    path = copy / "step-00000002"
    meta = manifest.read(path)
    for name in (FILE, saved_shapes.METADATA):
        content = (path / name).read_bytes()
        for bit in spread(len(content) * 8):
            flip(path / name, bit)
            assert manifest.verify(path, meta.files) is not None, (name, bit)
            (path / name).write_bytes(content)
    assert manifest.verify(path, meta.files) is None


def test_a_damaged_metadata_file_of_an_older_checkpoint_never_ends_in_a_traceback(copy):
    path = copy / "step-00000002"
    older(path)
    content = (path / saved_shapes.METADATA).read_bytes()
    refused = 0
    for bit in spread(len(content) * 8):
        flip(path / saved_shapes.METADATA, bit)
        try:
            storage.read_metadata(path)
        except CheckpointError as error:
            refused += 1
            assert "\n    remedy: " in str(error)
        (path / saved_shapes.METADATA).write_bytes(content)
    assert refused > 5


class Planted:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("where", ["metadata", "inside"])
def test_code_in_the_metadata_is_not_run(trainer, copy, tmp_path, where):
    path, made = copy / "step-00000002", tmp_path / "made"
    older(path)
    planted: Any = Planted(made)
    if where == "inside":
        planted = storage.read_metadata(path)
        planted.planner_data = {"model": Planted(made)}
    (path / saved_shapes.METADATA).write_bytes(pickle.dumps(planted))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it names posix.mkdir, which no checkpoint"):
        trainer().resume(copy)
    assert not made.exists()
    pickle.loads((path / saved_shapes.METADATA).read_bytes())
    assert made.exists(), "the test plants nothing"


def test_code_among_the_tensors_is_not_run(trainer, copy, tmp_path):
    """Neither in an entry that is said to be no tensor, which torch unpickles freely, nor in a tensor's place."""
    path, made = copy / "step-00000002", tmp_path / "made"
    older(path)
    metadata = storage.read_metadata(path)
    key = "model.layers.0.attention.q_proj.weight"
    (index,) = [index for index in metadata.storage_data if index.fqn == key]
    torch.save(Planted(made), path / "__9_0.distcp")
    place = replace(metadata.storage_data[index], relative_path="__9_0.distcp", offset=0)
    metadata.storage_data[index] = replace(place, length=(path / "__9_0.distcp").stat().st_size)
    tensor = metadata.state_dict_metadata[key]
    for said in (BytesStorageMetadata(), tensor):
        metadata.state_dict_metadata[key] = said
        (path / saved_shapes.METADATA).write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="is damaged"):
            trainer().resume(copy)
        assert not made.exists()


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "a/b.distcp"])
def test_a_place_outside_of_the_checkpoint_is_refused(copy, name):
    path = copy / "step-00000002"
    metadata = storage.read_metadata(path)
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=name)
    (path / saved_shapes.METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="is damaged"):
        storage.read_metadata(path)


def test_a_missing_tensor_and_another_shape_are_named(tmp_path):
    path = tmp_path / "step-00000001"
    dcp.save({"model": {"a": torch.zeros(3), "b": torch.zeros(2, 2)}}, checkpoint_id=path)
    with pytest.raises(CheckpointError, match=r"step-00000001 lacks model.c, which this configuration needs\n.*remedy"):
        storage.load({"model": {"a": torch.ones(3), "c": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match=r"model.b has the shape \[2, 2\] there, and \[4\] in this model"):
        storage.load({"model": {"b": torch.ones(4)}}, path)
    with pytest.raises(CheckpointError, match=r"model.a is of torch.float32 there, and should be of torch.int64"):
        storage.load({"model": {"a": torch.ones(3, dtype=torch.int64)}}, path)
    state = {"model": {"a": torch.ones(3), "c": torch.ones(1)}}
    assert storage.load(state, path, optional={"model.c"}) == {"model.c"}
    assert state["model"].keys() == {"a"} and state["model"]["a"].sum() == 0


@pytest.mark.parametrize("said", ["[pair.cc:534] gloo: Connection closed by peer", "gloo: Timed out waiting 300000ms"])
def test_what_befalls_another_rank_is_no_damage(tmp_path, monkeypatch, said):
    path = tmp_path / "step-00000001"
    storage.save({"model": {"a": torch.ones(3)}}, path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(dcp, "load", fail)
    with pytest.raises(RuntimeError, match="gloo"):
        storage.load({"model": {"a": torch.ones(3)}}, path)


def test_a_selection_bias_may_be_switched_on_later(trainer, tmp_path):
    off = {"model": {"moe": {"bias_rate": 0.0}}}
    path = trainer(off).save(tmp_path / "run" / "checkpoints")
    run = trainer()
    assert run.resume(path.parent) == path
    assert run.resumed.fresh == ["model.layers.1.ffn.gate.selection_bias"]
    assert [c.arrow() for c in run.resumed.changes] == ["model.moe.bias_rate: 0.0 → 0.01"]


def test_another_batch_goes_on_at_the_same_sample_another_length_at_the_same_share(trainer, written):
    run = trainer({"train": {"global_batch": 4}})
    run.resume(written)
    assert (run.step, run.seen) == (2, 4)
    run = trainer({"train": {"seq_len": 16, "resume_changed": ["train.seq_len"]}})
    run.resume(written)
    assert (run.step, run.seen) == (2, 2)


def test_other_text_is_refused_by_content(trainer, raw, written, tmp_path):
    text = Path(raw["data"]["path"]).read_text()
    (tmp_path / "moved.txt").write_text(text)
    run = trainer({"data": {"path": str(tmp_path / "moved.txt")}})
    assert run.resume(written) and [c.key for c in run.resumed.changes] == ["data.path"]
    (tmp_path / "other.txt").write_text(text.replace("lazy", "idle"))
    with pytest.raises(CheckpointError, match=r"data.path: saved \d+ \+ \d+ tokens (.|\n)*\[data.path\]"):
        trainer({"data": {"path": str(tmp_path / "other.txt")}}).resume(written)


def test_saving_leaves_what_is_not_its_own(trainer, copy):
    mine = ["step-best", "step-00000001-best", ".partial-mine", "notes.txt"]
    for name in mine[:3]:
        shutil.copytree(copy / "step-00000001", copy / name)
    (copy / "notes.txt").write_text("keep")
    (copy / ".partial-00000007").mkdir()
    outside = copy.parent / "outside"
    os.rename(copy / "step-00000001", outside)
    (copy / "step-00000001").symlink_to(outside)
    run = trainer({"output": {"keep": 1}})
    assert run.resume(copy) == copy / "step-00000002"
    run.train_step()
    run.save(copy)
    assert {p.name for p in copy.iterdir()} == {*mine, "step-00000003"}
    assert (outside / manifest.META).exists(), "a link is removed, not what it leads to"


def test_a_checkpoint_that_cannot_be_written_is_one_message(trainer, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    said = r"could not be written: OSError: \[Errno 28\] No space left(.|\n)*remedy"
    with pytest.raises(CheckpointError, match=said):
        trainer().save(tmp_path / "run" / "checkpoints")
    assert manifest.newest(tmp_path / "run" / "checkpoints") is None


def test_a_checkpoint_may_be_written_before_the_first_step(trainer, tmp_path):
    whole, run = trainer(), trainer()
    assert run.resume(whole.save(tmp_path / "run" / "checkpoints").parent)
    assert [run.train_step()["loss"] for _ in range(2)] == [whole.train_step()["loss"] for _ in range(2)]


def test_nothing_is_drawn_that_a_checkpoint_overwrites(trainer, written, monkeypatch):
    whole = trainer()
    whole.resume(written)
    monkeypatch.setattr("moesys.parallel.initialise.Normals", None)
    again = trainer(draw=False)
    assert all(p.isnan().all() for p in again.engine.model.named_parameters().values())
    again.resume(written)
    ours, theirs = again.engine.weights(), whole.engine.weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.train_step()["loss"] == whole.train_step()["loss"]


def test_what_was_not_drawn_is_not_trained_without_a_checkpoint(trainer, written, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="the checkpoint that was there a moment ago is gone"):
        trainer(draw=False).resume(tmp_path)
    # A tensor that no checkpoint gave back is told by name.
    run = trainer(draw=False)
    load = run.engine.load

    def without_one(folder: Path) -> set[str]:
        kept = run.engine.model.named_parameters()["norm.weight"]
        fresh = load(folder)
        kept.data.fill_(torch.nan)
        return fresh

    monkeypatch.setattr(run.engine, "load", without_one)
    with pytest.raises(TrainingError, match=r"step-00000002: not finite: norm\.weight"):
        run.resume(written)
