"""Which checkpoint a run goes on from, and under which changes: asked before anything starts."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import changed
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from moesys import cli
from moesys.config import Config
from moesys.config.differences import saved_form
from moesys.errors import CheckpointError, ConfigError, FileError
from moesys.models.size import weights
from moesys.train import manifest, metrics, resume, run_folder, saved_shapes, validate
from moesys.train.validate import load_checked

RAW: dict = {
    "model": {"vocab_size": 320, "hidden": 16, "layers": 1, "moe": {"experts": 4, "ffn_hidden": 8}},
    "train": {"steps": 9, "seq_len": 16},
}
DATA = {"train_tokens": 900, "heldout_tokens": 100, "digest": "aa"}


def config(*changes: dict) -> Config:
    return Config.model_validate(changed(RAW, *changes))


def write(folder: Path, step: int = 4, **more: Any) -> Path:
    """A checkpoint's folder as far as the launcher sees it."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    tokenizer = {"kind": "bytes", "name": "bytes", "identity": "bytes"}
    meta = {"step": step, "samples": 8 * step, "config": saved_form(config()), "data": DATA, "tokenizer": tokenizer}
    meta |= more
    (path / manifest.META).write_text(json.dumps(meta | {"checksum": manifest.checksum(meta)}))
    describe(path, {w.name: w.shape for w in weights(config().model, 320)})
    return path


def describe(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write `.metadata` as torch does, of weights of these shapes."""
    tensors = {
        f"model.{name}": TensorStorageMetadata(TensorProperties(), torch.Size(shape), [])
        for name, shape in shapes.items()
    }
    (path / saved_shapes.METADATA).write_bytes(pickle.dumps(Metadata(tensors)))


def judged(path: Path, *changes: dict, data: dict | None = DATA) -> list[str]:
    return [change.arrow() for change in resume.require_compatible(manifest.read(path), config(*changes), data)]


def test_names_are_matched_whole_and_ordered_by_number(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (20, 5, 123456789)]
    for name in ("step-best", "step-00000020-best", "xstep-00000099", "step-99", "step-99999999.old"):
        shutil.copytree(paths[0], tmp_path / name)
    (tmp_path / "step-00000021").mkdir()  # without its metadata: not complete
    (tmp_path / "step-00000022").write_text("a file")
    assert manifest.complete(tmp_path) == [paths[1], paths[0], paths[2]]
    assert manifest.newest(tmp_path) == paths[2] and manifest.previous(paths[2]) == paths[0]
    assert manifest.previous(paths[1]) is None and manifest.newest(tmp_path / "none") is None
    shutil.rmtree(paths[2])
    assert manifest.incomplete(tmp_path)[0].startswith(f"{tmp_path / 'step-00000021'} has no moesys.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds a JSON list, not an object"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\udc80", "is not JSON"),
        ("{}", "step must be a whole number of at least 0, and is null"),
        ('{"step": "4", "samples": 8, "config": {}}', 'step must be a whole number of at least 0, and is "4"'),
        ('{"step": -1, "samples": 8}', "is -1"),
        ('{"step": 4.0, "samples": 8}', "is 4.0"),
        ('{"step": true, "samples": 8}', "is true"),
        ('{"step": 4, "samples": 1e99}', "samples must be a whole number"),
        ('{"step": 4, "samples": 100000000000000000000}', "samples must be a whole number"),
        ('{"step": 5, "samples": 8, "model": {}}', "is of step 5"),
        ('{"step": 4, "samples": 8}', "lacks the model"),
        ('{"step": 4, "samples": 8, "model": []}', "model must be an object"),
        ('{"step": 4, "samples": 8, "config": {}}', "lacks the model"),
        ('{"step": 4, "samples": 8, "model": {}, "files": {"../x": [1, 2]}}', "files must have"),
        ('{"step": 4, "samples": 8, "model": {}, "files": {"x": 1}}', "files must have"),
    ],
)  # fmt: skip
def test_damaged_metadata_are_one_message(tmp_path: Path, text: str, said: str) -> None:
    before = write(tmp_path, 3)
    path = write(tmp_path, 4)
    (path / manifest.META).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        manifest.read(path)
    message = str(caught.value)
    assert f"{path} is damaged: moesys.json" in message and said in message
    assert f"remedy: move it away, and the same command will go on from {before.name}: mv {path} " in message


def test_one_changed_character_of_the_metadata_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path) / manifest.META
    path.write_text(path.read_text().replace('"hidden": 16', '"hidden": 17'))
    with pytest.raises(CheckpointError, match=r"moesys\.json was changed since it was written"):
        manifest.read(path.parent)


def test_missing_and_cut_files_are_found_before_anything_starts(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", files={"__0_0.distcp": [10, 1]})
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        resume.check(tmp_path, config())
    (path / "__0_0.distcp").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match="has 5 bytes, and had 10 when it was written") as caught:
        resume.check(tmp_path, config())
    assert "start again from the beginning" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"model": {"moe": {"balance_loss": 0.5}}}, ["model.moe.balance_loss: 0.01 → 0.5"]),
        ({"model": {"moe": {"z_loss": 0.001}}}, ["model.moe.z_loss: 0.0 → 0.001"]),
        ({"model": {"moe": {"capacity_factor": 1.5}}}, ["model.moe.capacity_factor: null → 1.5"]),
        ({"train": {"optimizer": {"lr": 0.5}}}, ["train.optimizer.lr: 0.0003 → 0.5"]),
        ({"train": {"global_batch": 16}, "parallel": {"ep": 2}}, ["train.global_batch: 8 → 16", "parallel.ep: 1 → 2"]),
        ({"output": {"keep": 9}, "measure": {"every": 2}, "name": "new"}, []),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_may_change_is_told(tmp_path: Path, change: dict, told: list[str]) -> None:
    assert judged(write(tmp_path), change) == told


@pytest.mark.parametrize(
    ("change", "row", "key"),
    [
        ({"seed": 2}, "seed: saved 0, now 2", "seed"),
        ({"train": {"seq_len": 32}}, "train.seq_len: saved 16, now 32", "train.seq_len"),
        ({"data": {"heldout": 0.3}}, "data.heldout: saved 0.05, now 0.3", "data.heldout"),
        ({"model": {"rope_theta": 5e5}}, "model.rope_theta: saved 10000.0, now 500000.0", "model.rope_theta"),
        ({"model": {"moe": {"top_k": 1}}}, "model.moe.top_k: saved 2, now 1", "model.moe.top_k"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_changes_the_run_is_refused_unless_it_is_named(tmp_path: Path, change: dict, row: str, key: str) -> None:
    path = write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        judged(path, change)
    said = str(caught.value)
    assert f"\n  {row} (changes numbers)\n    remedy: restore {key}; or, if this is meant, add " in said
    assert said.endswith(f"'train.resume_changed=[{key}]'")
    assert judged(path, change, {"train": {"resume_changed": [key]}})


def test_another_model_is_refused_whatever_is_named(tmp_path: Path) -> None:
    path, change = write(tmp_path), {"model": {"moe": {"experts": 8}}, "seed": 3}
    with pytest.raises(CheckpointError) as caught:
        judged(path, change, {"train": {"resume_changed": ["seed"]}})
    assert str(caught.value) == (
        f"{path} is of another model:\n  model.moe.experts: saved 4, now 8 (cannot fit)"
        "\n  also changed: seed: saved 0, now 3 (changes numbers)"
        "\n  layers.0.ffn.gate.projection.weight has the shape [4, 16] there, and [8, 16] in this model"
        "\n  layers.0.ffn.experts.fc1 has the shape [4, 16, 2, 8] there, and [8, 16, 2, 8] in this model"
        "\n  layers.0.ffn.experts.fc2 has the shape [4, 8, 16] there, and [8, 8, 16] in this model"
        "\n    remedy: restore the keys that cannot fit, or choose another run: name=NAME"
    )


def test_a_configuration_without_the_keys_of_later_versions_has_their_defaults(tmp_path: Path) -> None:
    old = {
        "seed": 0,
        "model": {"vocab_size": 320, "hidden": 16, "layers": 1, "moe": {"experts": 4, "ffn_hidden": 8}},
        "train": {"steps": 9, "seq_len": 16, "optimizer": {"lr": 0.0003}},
        "data": {"kind": "python-stdlib"},
    }
    write(tmp_path / "checkpoints", config=old)
    assert resume.check(tmp_path, config()) == []
    coefficient = config({"model": {"moe": {"balance_loss": 0.5, "z_loss": 0.1}}, "parallel": {"ep": 2}})
    assert resume.check(tmp_path, coefficient) == [
        "changed since step 4: model.moe.balance_loss: 0.01 → 0.5 (changes numbers)",
        "changed since step 4: model.moe.z_loss: 0.0 → 0.1 (changes numbers)",
        "changed since step 4: parallel.ep: 1 → 2 (harmless)",
    ]


def test_a_section_that_an_older_version_lacks_is_as_by_default(tmp_path: Path) -> None:
    dense = {"model": {"moe": None, "ffn_hidden": 8}}
    saved = saved_form(config(dense))
    del saved["model"]["moe"]
    assert judged(write(tmp_path, config=saved), dense) == []
    with pytest.raises(CheckpointError, match=r"model\.moe: saved null, now given \(cannot fit\)"):
        judged(tmp_path / "step-00000004", {"model": {"ffn_hidden": 8, "moe": {"experts": 8}}})


def test_keys_of_another_version_are_refused_unless_they_change_no_number(tmp_path: Path) -> None:
    harmless = changed(saved_form(config()), {"model": {"moe": {"novelty": None, "sinks": False}}})
    harmless = changed(harmless, {"train": {"echo": 0, "mode": "none"}, "output": {"colour": "red"}})
    assert judged(write(tmp_path / "a", config=harmless)) == []
    other = changed(harmless, {"model": {"moe": {"novelty": 2}}, "train": {"echo": 3}})
    path = write(tmp_path / "b", config=other, versions={"moesys": "9.9"})
    with pytest.raises(CheckpointError) as caught:
        judged(path)
    assert str(caught.value) == (
        f"{path} has keys of another version:"
        "\n  model.moe.novelty: saved 2, now absent (unknown to this version)"
        "\n  train.echo: saved 3, now absent (unknown to this version)"
        "\n    remedy: go on with moesys 9.9, which wrote it, or choose another run: name=NAME"
    )


def test_a_key_of_a_named_mixer_may_change_if_it_is_named(tmp_path: Path) -> None:
    pattern = {"model": {"layers": {"count": 1, "repeat": ["local moe"]}, "mixers": {"local": {"heads": 4}}}}
    path, change = write(tmp_path, config=saved_form(config(pattern))), {"model": {"mixers": {"local": {"window": 8}}}}
    with pytest.raises(CheckpointError, match=r"add 'train.resume_changed=\[model\.mixers\.local\.window\]'"):
        judged(path, pattern, change)
    named = {"train": {"resume_changed": ["model.mixers.local.window"]}}
    assert judged(path, pattern, change, named) == ["model.mixers.local.window: null → 8"]
    assert validate.training(config(pattern, named).train) == []
    (problem,) = validate.training(config({"train": {"resume_changed": ["model.mixers.local.widow"]}}).train)
    assert problem.key == "train.resume_changed"


def test_a_key_that_decides_weights_may_change_where_all_fit_if_it_is_named(tmp_path: Path) -> None:
    """Twice as many heads of half the size have the same matrices, and compute something else."""
    path, change = write(tmp_path), {"model": {"attention": {"heads": 8}}}
    with pytest.raises(CheckpointError, match=r"\n  model\.attention\.heads: saved 4, now 8 \(changes numbers\)\n"):
        judged(path, change)
    named = {"train": {"resume_changed": ["model.attention.heads"]}}
    assert judged(path, change, named) == ["model.attention.heads: 4 → 8"]


def test_weights_of_another_version_are_refused_by_name_before_the_start(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints")
    shapes = {weight.name: weight.shape for weight in weights(config().model, 320)}
    gate = shapes.pop("layers.0.ffn.gate.projection.weight")
    describe(path, shapes | {"layers.0.ffn.router.weight": gate, "layers.0.ffn.gate.selection_bias": (4,)})
    with pytest.raises(CheckpointError) as caught:
        resume.check(tmp_path, config())
    assert str(caught.value) == (
        f"{path} is of another model:\n  layers.0.ffn.gate.projection.weight [4, 16] is missing there"
        "\n  layers.0.ffn.router.weight [4, 16] is there, and not in this model"
        "\n    remedy: use the version that wrote it, or choose another run: name=NAME"
    )


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", pickle.dumps(shutil.rmtree), pickle.dumps({"a": 1})])
def test_damaged_tensor_descriptions_are_found_before_the_start(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "checkpoints")
    (path / saved_shapes.METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: \.metadata cannot be read: "):
        resume.check(tmp_path, config())


def test_other_content_of_the_data_is_refused_and_a_moved_file_is_told(tmp_path: Path) -> None:
    path, other = write(tmp_path), {"train_tokens": 901, "heldout_tokens": 100, "digest": "bb"}
    assert judged(path, {"data": {"kind": "text", "path": "/moved"}}) == [
        "data.kind: python-stdlib → text",
        "data.path: null → /moved",
    ]
    with pytest.raises(CheckpointError, match=r"data.path: saved 900 \+ 100 tokens \(aa\), now 901 \+ 100 tokens"):
        judged(path, data=other)
    assert judged(path, {"train": {"resume_changed": ["data.path"]}}, data=other)
    # Another share held out gives other tokens on both sides: who names that means this.
    assert judged(path, {"train": {"resume_changed": ["data.heldout"]}, "data": {"heldout": 0.1}}, data=other)


def test_another_tokenizer_is_told_by_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, tokenizer={"kind": "tokenizer.json", "name": "/a/tokenizer.json", "identity": "0123456789"})
    row = r"data.tokenizer: saved /a/tokenizer.json \(01234567\), now bytes"
    with pytest.raises(CheckpointError, match=row):
        judged(path)


def test_a_run_without_a_step_left_refuses_other_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "checkpoints", 9)
    assert judged(path, {"parallel": {"ep": 2}}) and judged(path) == []
    with pytest.raises(CheckpointError) as caught:
        resume.check(tmp_path / "run", config({"train": {"optimizer": {"lr": 0.5}}}))
    assert "no step left to train (9 are done, train.steps is 9)" in str(caught.value)
    row = "train.optimizer.lr: saved 0.0003, now 0.5 (changes numbers)"
    assert f"{row}\n    remedy: choose another run" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"train\.steps: saved 9, now 5"):
        judged(path, {"train": {"steps": 5}})


def test_a_checkpoint_of_the_first_format_is_compared_by_what_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "step-00000004"
    path.mkdir()
    model = config().model.model_dump(mode="json")
    del model["moe"]["zero_tau"]
    (path / manifest.META).write_text(json.dumps({"step": 4, "samples": 32, "model": model, "seed": 0, "freeze": []}))
    assert judged(path, {"train": {"seq_len": 64}, "model": {"moe": {"balance_loss": 0.0}}}) == [
        "model.moe.balance_loss: 0.01 → 0.0"
    ]
    with pytest.raises(CheckpointError, match="seed: saved 0, now 1"):
        judged(path, {"seed": 1})


def test_only_keys_that_need_it_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps(changed(RAW, {"train": {"resume_changed": ["seed", "data.helduot"]}})))
    with pytest.raises(ConfigError, match=r"'data.helduot' is not a key whose change must be named"):
        load_checked(file, with_data=False)


@pytest.mark.parametrize("name", run_folder.FOLDERS)
def test_a_file_where_a_folder_belongs_is_told_before_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileError, match=f"{name} is a file, and a folder of this name is to be written"):
        run_folder.check(tmp_path)


@pytest.mark.parametrize("name", run_folder.FILES)
def test_a_folder_where_a_file_belongs_is_told_before_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(FileError, match=f"{name} is a folder, and a file of this name is to be written\n    remedy"):
        run_folder.check(tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("errors", False), ("launch.lock", True)])
def test_the_command_says_it_in_one_message(small: dict, tmp_path: Path, capsys, name: str, folder: bool) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps(changed(small, {"output": {"runs": str(tmp_path / "runs")}})))
    path = tmp_path / "runs" / "a" / name
    path.mkdir(parents=True) if folder else (path.parent.mkdir(parents=True), path.write_text("mine"))
    assert cli.main(["launch", str(tmp_path / "a.yaml"), "--launcher", "local"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"moesys launch: {path} is a f") and said.count("\n") == 2 and "remedy: move it away" in said
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_what_stands_in_the_way_of_the_folder_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(FileError, match="runs is a file"):
        run_folder.check(tmp_path / "runs" / "a")
    write(tmp_path / "b" / "checkpoints")
    (tmp_path / "b" / "checkpoints" / "step-00000005").write_text("mine")
    with pytest.raises(FileError, match="step-00000005 is a file"):
        run_folder.check(tmp_path / "b")
    run_folder.check(tmp_path / "none")


def test_a_refused_configuration_does_not_replace_the_run_s(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with run_folder.proposed(tmp_path, "first"):
        pass  # ended before it had a checkpoint: nothing is lost
    write(tmp_path / "checkpoints")
    with run_folder.proposed(tmp_path, "refused"):
        assert path.read_text() == "refused"
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), run_folder.proposed(tmp_path, "stopped"):
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    with run_folder.proposed(tmp_path, "accepted"):
        run_folder.accept(tmp_path)
    assert path.read_text() == "accepted" and not (tmp_path / run_folder.BEFORE).exists()


def test_records_with_damaged_lines_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 2.5}', b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": "2"}', b"null", b"3",
             '{"step": 2, "text": "a\u2028b"}'.encode(), b'{"step": 3}', b'{"step": 2, "lo']  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    with metrics._continued(path, 2) as file:
        file.write('{"step": 3}\n')
    kept = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert kept == [{"step": 1, "loss": 2.5}, {"step": 2, "text": "a\u2028b"}, {"step": 3}]
