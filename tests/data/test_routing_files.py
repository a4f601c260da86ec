"""Recorded routing: written by every rank, read back whole, refused where it does not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from support import changed

from moesys import cli
from moesys.data import routing_files
from moesys.errors import ConfigError, DataError
from moesys.train.validate import load_checked

E = 4


def part(numbers: list[int], width: int = 2) -> tuple:
    number = np.array(numbers)
    expert = np.stack([(number + j) % E for j in range(width)], 1).astype(np.int16)
    return number, expert, np.full(expert.shape, 0.5, dtype=np.float16)


def recording(folder):
    routing_files.write(folder, 1, 0, {0: part([10, 12, 14]), 2: part([10, 12, 14])}, E)
    routing_files.write(folder, 1, 1, {0: part([11, 13, 15], 1)}, E)
    routing_files.write(folder, 2, 0, {0: part([18, 16, 17]), 2: part([11, 13])}, E)
    return folder


def test_tokens_of_all_ranks_and_steps_come_back_in_order(tmp_path):
    first, table = routing_files.read(recording(tmp_path), 0)
    assert first == 10 and table.dtype == np.int16
    expected = [[n % E, (n + 1) % E] if n % 2 == 0 or n > 15 else [n % E, -1] for n in range(10, 19)]
    assert table.tolist() == expected
    assert routing_files.wrong(tmp_path, [0, 2], E) is None


def test_steps_that_will_be_done_again_are_forgotten(tmp_path):
    routing_files.forget(recording(tmp_path), 1)
    assert len(routing_files.read(tmp_path, 0)[1]) == 6
    assert len(list(tmp_path.iterdir())) == 2


def broken(folder, how):
    path = sorted(folder.iterdir())[0]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "foreign":
        np.savez(path, something=np.arange(3))
    elif how == "lost":
        path.unlink()
    elif how == "twice":
        (folder / "step-000001-rank-00002.npz").write_bytes(path.read_bytes())
    elif how == "empty":
        for file in folder.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("how", "layers", "experts", "told"),
    [
        ("cut", [0], E, "step-000001-rank-00000.npz is no recorded routing, or was cut short"),
        ("foreign", [0], E, "step-000001-rank-00000.npz is no recorded routing"),
        ("lost", [0], E, "lacks tokens of layer 0, or has some twice"),
        ("twice", [0], E, "lacks tokens of layer 0, or has some twice"),
        ("empty", [0], E, "holds no recorded routing"),
        ("none", [0, 1], E, "holds no routing of layer 1: it was recorded with another model"),
        ("none", [0], 8, "was recorded with 4 experts per layer, and model.moe.experts is 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_plain_words(tmp_path, how, layers, experts, told):
    broken(recording(tmp_path), how)
    assert told in (routing_files.wrong(tmp_path, layers, experts) or "")
    if experts == E:
        with pytest.raises(DataError, match=r"routing|tokens"):
            for number in layers:
                routing_files.read(tmp_path, number)


def test_a_run_is_recorded_and_can_be_replayed(small, tmp_path, capsys):
    change = {
        "model": {"layers": 2, "moe": {"capacity_factor": 1.0}},
        "train": {"steps": 3, "global_batch": 4, "eval_sequences": 4},
        "output": {"runs": str(tmp_path), "tensorboard": False, "record_routing": 2},
        "launch": {"launcher": "local"},
        "cluster": {"ranks_per_node": 2},
    }
    raw = changed(small, change, {"parallel": {"cp": 2, "ep": 2}})
    assert launch(tmp_path, raw, "real") == 0
    recorded = tmp_path / "real" / "routing"
    assert sorted(p.name for p in recorded.iterdir()) == [
        f"step-00000{step}-rank-0000{rank}.npz" for step in (1, 2) for rank in (0, 1)
    ]
    first, table = routing_files.read(recorded, 1)
    assert first == 0 and table.shape == (2 * 4 * 16, 2)
    dropped = [json.loads(line).get("dropped") for line in (tmp_path / "real/metrics.jsonl").read_text().splitlines()]
    assert (table < 0).sum() > 0 and max(x for x in dropped if x is not None) > 0

    other = changed(raw, {"output": {"record_routing": 0}})
    other["model"]["moe"] = changed(small["model"]["moe"], {"balance_loss": 0.01, "z_loss": 0.0})
    other["model"]["moe"]["gate"] = {"kind": "replay", "path": str(recorded)}
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(other))
    load_checked(path)

    other["model"]["moe"]["gate"]["path"] = str(tmp_path / "nowhere")
    other["model"]["moe"]["experts"] = 8
    path.write_text(yaml.safe_dump(other))
    with pytest.raises(ConfigError, match=r"model\.moe\.gate\.path.*there is no folder .*nowhere"):
        load_checked(path)
    # A dry run needs no data.
    assert load_checked(path, with_data=False).model.moe is not None


def launch(folder, raw, name) -> int:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return cli.main(["launch", str(path)])


@pytest.mark.parametrize(
    ("moe", "told"),
    [(None, "needs MoE layers"), ({"gate": "soft", "balance_loss": 0.01, "z_loss": 0.0}, "gate soft sends no token")],
)
def test_what_cannot_be_recorded_is_refused(small, tmp_path, moe, told):
    raw = changed(small, {"output": {"record_routing": 2}})
    raw["model"]["moe"] = moe and changed(raw["model"]["moe"], moe)
    raw["model"]["ffn_hidden"] = 64
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=rf"output\.record_routing.*{told}"):
        load_checked(path)
