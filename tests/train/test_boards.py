"""What a run tells TensorBoard and Weights & Biases."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from support import changed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moesys.config.schema import Config
from moesys.errors import FileError
from moesys.files import read_json
from moesys.train.metrics import MetricsLog
from moesys.train.wandb_run import identity

RECORD = {
    "step": 1, "loss": 3.5, "balance": 1.25, "imbalance": 1.5, "lr": 0.1, "grad_norm": 2.0, "all_to_all_share": 0.25,
    "tokens_per_second": 1e3, "step_seconds": 0.5, "steps": 4, "eta_s": 2.0, "time": 1.7e9,
}  # fmt: skip


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package: the runs that were begun."""
    begun: list[Any] = []

    def init(**options: Any) -> Any:
        run = SimpleNamespace(**options, logged=[], code=None)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda exit_code: setattr(run, "code", exit_code)
        begun.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return begun


def config(small: dict, **output: Any) -> Config:
    env = {"launch": {"env": {"SECRET_TOKEN": "hush"}}}
    return Config.model_validate(changed(small, env, {"name": "same", "train": {"steps": 4}, "output": output}))


def test_tensorboard_has_groups_configuration_and_load(small: dict, tmp_path: Path) -> None:
    with MetricsLog(config(small), tmp_path, 0) as log:
        log.write(RECORD)
        log.write({"step": 1, "seconds/exposed all-to-all": 0.1, "seconds/all-to-all late": 0.05})
        log.write({"step": 1, "heldout_loss": 3.0})
        log.write_load(1, [[4.0, 0.0, 2.0, 2.0]] * 4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "loss/train", "loss/heldout", "moe/balance_loss", "moe/imbalance", "optimizer/learning_rate",
        "optimizer/gradient_norm", "comm/all_to_all_share", "time/tokens_per_second", "time/step_seconds",
        "time/exposed_all_to_all_seconds", "comm/waiting_late_seconds",
    }  # fmt: skip
    assert tags["images"] == ["moe/load"] and tags["histograms"] == ["moe/load_over_mean"]
    (picture,) = events.Images("moe/load")
    assert (picture.width, picture.height) == (4 * 8, 4 * 8)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert set(texts) == {"run/hyperparameters/text_summary", "run/configuration/text_summary"}
    assert "| experts | 4 |" in texts["run/hyperparameters/text_summary"]
    assert "balance_loss: 0.02" in texts["run/configuration/text_summary"]
    assert "hush" not in "".join(texts.values())


def test_a_resumed_run_is_the_same_one_and_another_folder_is_another(
    small: dict, tmp_path: Path, wandb: list[Any]
) -> None:
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with MetricsLog(config(small, wandb=True, tensorboard=False), tmp_path / folder, 0) as log:
            log.write(RECORD)
    first, again, other = wandb
    assert first.id == again.id != other.id
    assert {run.name for run in wandb} == {"same"} and {run.resume for run in wandb} == {"allow"}
    assert first.logged[0][0] == 1 and first.logged[0][1]["loss/train"] == 3.5 and first.code == 0
    assert not any("eta" in tag for tag in first.logged[0][1])
    assert "hush" not in str(first.config)


def test_a_run_keeps_its_id_where_it_is_moved_but_not_where_it_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    known = identity(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copied = identity(tmp_path / "copy")
    assert copied != known == identity(tmp_path / "a") and copied == identity(tmp_path / "copy")
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert identity(tmp_path / "moved") == known
    (tmp_path / "moved" / "wandb.json").write_text("[")
    with pytest.raises(FileError, match=r"wandb.json is not JSON(?s:.*)remedy: remove it"):
        identity(tmp_path / "moved")
    assert read_json(tmp_path / "copy" / "wandb.json", "")["id"] == copied
