"""`engine: megatron` against the native engine in one process: losses, gradients, parameters, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_ranks import COUNTED, observed
from planned import differences
from ran import Ran
from support import changed

from moesys.cli import main
from moesys.config.schema import Config
from moesys.launchers.dry_run import plan
from moesys.measure.explain.averages import explain
from moesys.measure.record.step_files import recorded
from moesys.train.manifest import newest
from moesys.train.verify import Trace, compare, reference

LAYOUTS: dict[str, dict[str, Any]] = {
    # First, while all ranks know as many groups: torch names groups that only their members make by that number.
    "hierarchical in chunks": {"ep": 4, "dispatch": {"kind": "hierarchical", "chunks": 2}},
    "tp 2": {"tp": 2},
    "tp 2, etp 2": {"tp": 2, "etp": 2},
    "pp 2": {"pp": 2},
    "pp 2, etp 2": {"pp": 2, "etp": 2},
    "ep 2": {"ep": 2},
    "ep 2, etp 2": {"ep": 2, "etp": 2},
    "ep 4": {"ep": 4},
    "tp 2, ep 2": {"tp": 2, "ep": 2},
    "tp 2, ep 2, etp 2": {"tp": 2, "ep": 2, "etp": 2},
    "pp 2, ep 2": {"pp": 2, "ep": 2},
    "tp 2, pp 2, ep 2": {"tp": 2, "pp": 2, "ep": 2},
    "ep 2, distributed optimizer": {"ep": 2, "dp_shard": "full"},
    "tp 2, ep 2, distributed optimizer": {"tp": 2, "ep": 2, "dp_shard": "full"},
    "interleaved": {"pp": 2, "pp_virtual": 2, "pp_schedule": "interleaved-1f1b", "ep": 2, "dp_shard": "full"},
}

TINY = {"model": {"hidden": 32, "layers": 2}, "train": {"seq_len": 8, "global_batch": 4}}

RICH = {
    "model": {
        "layers": 3,
        "ffn_hidden": 96,
        "tie_embeddings": True,
        "attention": {"qk_norm": "head", "bias": "qkv"},
        "moe": {
            "first_dense": 1,
            "gate": {"score": "sigmoid", "groups": 2, "groups_kept": 1, "group_score": "top2", "noise": "gaussian"},
            "capacity_factor": 1.0,
            "sequence_balance_loss": 0.01,
            "global_balance_loss": 0.02,
            "bias_rate": 0.01,
            "shared_experts": 1,
            "shared_mix": "gate",
            "copy_experts": 2,
        },
    }
}
"""Everything at once: what only some layers, stages or ranks hold, and what changes between steps."""

JOURNEYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "plain": [
        ("megatron", {"tp": 2, "ep": 2, "dp_shard": "full"}),
        ("megatron", {"pp": 2, "ep": 2}),
        ("native", {"tp": 2, "ep": 4}),
        ("megatron", {"ep": 2, "etp": 2, "dp_shard": "full"}),
    ],
    "rich": [
        ("native", {"ep": 2, "dp_shard": "full"}),
        ("megatron", {"pp": 2, "ep": 2, "dp_shard": "full"}),
        ("megatron", {"tp": 2, "ep": 4}),
        ("megatron", {"tp": 2, "pp": 2, "dp_shard": "full"}),
    ],
}
"""Of a run, engine and combination, one after another."""

STEPS, LONG = 2, 20


@pytest.fixture(scope="module")
def configs(small: dict) -> dict[str, tuple[Config, int]]:
    """Cases on four ranks: their configurations and numbers of steps."""
    base = changed(small, {"engine": "megatron", "cluster": {"ranks_per_node": 4}}, TINY)
    rich = changed(base, RICH)
    found = {name: (changed(base, {"parallel": p}), STEPS) for name, p in LAYOUTS.items()}
    found["hierarchical in chunks"][0]["cluster"] |= {"nodes": 2, "ranks_per_node": 2}
    full = {"train": {"recompute": "full"}}
    found["rich: tp 2, ep 2"] = changed(rich, {"parallel": {"tp": 2, "ep": 2}}), STEPS
    found["rich: pp 2, recomputed"] = changed(rich, full, {"parallel": {"pp": 2, "ep": 2, "dp_shard": "full"}}), STEPS
    found["interleaved"][0]["model"]["layers"] = 4  # two parts of the model on each of two stages
    found["long"] = changed(base, {"parallel": {"pp": 2, "ep": 2}}), LONG
    return {name: (Config.model_validate(raw), steps) for name, (raw, steps) in found.items()}


@pytest.fixture(scope="module")
def journeys(small: dict) -> dict[str, list[Config]]:
    base = changed(small, {"cluster": {"ranks_per_node": 4}}, TINY)
    kinds = {"plain": base, "rich": changed(base, RICH)}
    return {
        name: [Config.model_validate(changed(kinds[name], {"engine": e, "parallel": p})) for e, p in stations]
        for name, stations in JOURNEYS.items()
    }


@pytest.fixture(scope="module")
def found(
    configs: dict[str, tuple[Config, int]],
    journeys: dict[str, list[Config]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Trace], dict[str, list[tuple[float, float]]], dict[str, list[int]], dict[str, Any]]:
    """What four ranks computed, by case and by journey; elements that each pipeline rank holds, by case; and what
    they say of a damaged checkpoint, by journey and engine."""
    return observed(configs, journeys, STEPS, 4, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def traces(found: tuple[dict[str, Trace], Any, Any, Any]) -> dict[str, Trace]:
    return found[0]


@pytest.fixture(scope="module")
def expected(configs: dict[str, tuple[Config, int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """The native engine in one process."""
    alone = {name: reference(configs[name][0], "native") for name in ("ep 2", "interleaved", "rich: tp 2, ep 2")}
    plain, interleaved, rich = alone.values()
    cases = {
        "plain": (plain, STEPS),
        "interleaved": (interleaved, STEPS),
        "rich": (rich, STEPS),
        "long plain": (plain, LONG),
        "long rich": (rich, 4 * STEPS),
    }
    return observed(cases, {}, STEPS, 1, tmp_path_factory.mktemp("native"))[0]


@pytest.mark.parametrize("name", [*LAYOUTS, "rich: tp 2, ep 2", "rich: pp 2, recomputed"])
def test_equals_the_native_engine_in_one_process(
    name: str, traces: dict[str, Trace], expected: dict[str, Trace]
) -> None:
    model = next(kind for kind in ("rich", "interleaved", "") if name.startswith(kind)) or "plain"
    report = compare(traces[name], expected[model], 4, 1e-5)
    assert report.passed, str(report)


def test_the_engines_reach_the_same_loss_over_twenty_steps(
    traces: dict[str, Trace], expected: dict[str, Trace]
) -> None:
    assert len(traces["long"].losses) == LONG
    assert traces["long"].losses == pytest.approx(expected["long plain"].losses, rel=1e-4)
    assert traces["long"].losses[-1] < 0.95 * traces["long"].losses[0]


@pytest.mark.parametrize("kind", JOURNEYS)
def test_a_run_continues_under_other_combinations_and_the_other_engine(
    kind: str, found: tuple[Any, dict[str, list[tuple[float, float]]], Any, Any], expected: dict[str, Trace]
) -> None:
    """As if it had never stopped: whatever wrote a checkpoint."""
    whole, count = expected[f"long {kind}"], len(JOURNEYS[kind]) * STEPS
    losses, norms = zip(*found[1][kind], strict=True)
    assert losses == pytest.approx(whole.losses[:count], rel=1e-5)
    assert norms == pytest.approx(whole.norms[:count], rel=1e-4)


@pytest.mark.parametrize("kind", JOURNEYS)
def test_a_damaged_checkpoint_is_the_same_message_on_every_rank_of_both_engines(
    kind: str, found: tuple[Any, Any, Any, dict[str, Any]]
) -> None:
    said = found[3][kind]
    assert said.keys() == {config_engine for config_engine, _ in JOURNEYS[kind]}
    for texts in said.values():
        assert len(texts) == 4 and len(set(texts)) == 1
        assert "is damaged: __" in texts[0] and ".distcp has changed since it was written" in texts[0]


def test_every_rank_holds_what_was_planned(
    configs: dict[str, tuple[Config, int]], found: tuple[Any, Any, dict[str, list[int]], Any]
) -> None:
    for name, (config, _) in configs.items():
        assert [rank["parameters"] for rank in plan(config)["pipeline_ranks"]] == found[2][name], name


@pytest.mark.parametrize("name", COUNTED)
def test_moves_what_was_planned(
    configs: dict[str, tuple[Config, int]], found: tuple[Any, Any, Any, Any, dict[str, Ran]], name: str
) -> None:
    """Dispatch, sends, sums of gradients and of metrics: all but what tensor ranks gather and sum in their own way."""
    lines = differences(configs[name][0], found[4][name])
    own = ("all_gather", "all_reduce") if "tp" in name else ()
    assert not [line for line in lines if not line.strip().startswith(own)], "\n".join(lines)


def test_a_run_through_ray_is_measured_and_explained(small: dict, tmp_path: Path) -> None:
    raw = changed(
        small,
        TINY,
        {
            "engine": "megatron",
            "name": "through-ray",
            "cluster": {"ranks_per_node": 2},
            "parallel": {"ep": 2, "dp_shard": "full"},
            "train": {"steps": 4, "eval_sequences": 4},
            "measure": {"every": 2},
            "output": {"runs": str(tmp_path / "runs"), "tensorboard": False},
        },
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["launch", str(tmp_path / "run.yaml")]) == 0
    run = tmp_path / "runs" / "through-ray"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    e = explain(recorded(run))
    assert e.sentence.startswith("Exposed all-to-all is")
    assert summary["communication"] == e.headline()
    assert [layer.name for layer in e.layers] == [f"layers.{i}" for i in range(2)]
    assert {kind for kind, seconds in e.total.others.items() if seconds > 0} == {"data"}
    assert (run / "report.html").exists()
    assert newest(run / "checkpoints") is not None
