"""What is said where apex cannot be used, and parameters of which a rank holds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesys.config.schema import Config, OptimizerConfig
from moesys.errors import MoesysError
from moesys.train.optimizer import build
from moesys.train.validate import apex

STAND_IN = Path(__file__).parent.parent / "stand_in"


def rules(**sections: object) -> str:
    config = {"model": {"hidden": 8, "layers": 1, "ffn_hidden": 8}, "train": {"optimizer": {"kind": "apex"}}}
    return "\n".join(map(str, apex(Config.model_validate(config | sections))))


def test_missing_apex_is_named():
    assert "which is not installed" in rules() and "build NVIDIA/apex from source" in rules()
    assert "cluster.device is cpu" in rules(cluster={"device": "cpu"})
    assert "Megatron-Core takes the fused Adam that it finds itself" in rules(engine="megatron")
    with pytest.raises(MoesysError, match=r"train\.optimizer\.kind: apex: .*No module named 'apex'\n.*remedy"):
        build(OptimizerConfig(kind="apex"), {"w": torch.nn.Parameter(torch.ones(2))}, bool)


@pytest.mark.parametrize("name", ["apex/__init__.py", "apex.py"])
def test_another_project_of_that_name_is_told_and_not_imported(name, tmp_path, monkeypatch):
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("raise SystemExit('of another project')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"{other} is another project of that name, from the registry" in rules()


def test_apex_is_found_and_gets_no_part_without_elements(monkeypatch):
    """apex launches nothing of a group after a part without elements; their states are there all the same."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    assert rules() == ""
    try:
        parameters = {name: torch.nn.Parameter(torch.ones(size, 2)) for name, size in (("full", 3), ("none", 0))}
        optimizers = {kind: build(OptimizerConfig(kind=kind, lr=0.1), parameters, bool) for kind in ("apex", "adamw")}
        results = {}
        for kind, optimizer in optimizers.items():
            with torch.no_grad():
                parameters["full"].fill_(1.0)
            for step in range(3):
                for p in parameters.values():
                    p.grad = torch.full_like(p, 0.5 + step)
                optimizer.step()
                optimizer.zero_grad()
            results[kind] = parameters["full"].detach().clone()
            assert {name: p.grad for name, p in parameters.items()} == {"full": None, "none": None}
        torch.testing.assert_close(results["apex"], results["adamw"], rtol=1e-6, atol=0)
        for name, p in parameters.items():
            ours, theirs = (optimizers[kind].state[p] for kind in ("apex", "adamw"))
            assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}, name
            assert int(ours["step"]) == 3 and ours["exp_avg"].shape == p.shape
    finally:
        import sys

        for module in ("apex", "apex.optimizers"):
            sys.modules.pop(module, None)
