"""What ranks keep for backward, beside the estimate: every dimension, both types, every kind of recomputation.

Routing is balanced by force, as the estimate takes it.
"""

from __future__ import annotations

import json

import pytest
from batches import start
from cases import LATENT
from kept_ranks import kept_of_each
from support import changed

from moesys.config import Config
from moesys.data.corpus import vocab_size
from moesys.parallel import dimension
from moesys.parallel.activations import activations
from moesys.parallel.degrees import resolve
from moesys.parallel.dimension import step_shape

LAYOUTS: dict[str, dict] = {
    "tp": {"tp": 2},
    "tp without sp": {"tp": 2, "sp": False},
    "cp": {"cp": 2},
    "shards": {"dp_shard": "full"},
    "ep": {"ep": 2},
    "etp": {"etp": 2},
    "tp ep": {"tp": 2, "ep": 2},
    "tp etp": {"tp": 2, "sp": False, "etp": 2},
    "gathered": {"ep": 2, "dispatch": "all_gather"},
    "chunks": {"ep": 2, "dispatch": {"chunks": 2, "overlap_shared": False}},
    "pp": {"pp": 2},
    "gpipe": {"pp": 2, "pp_schedule": "gpipe"},
    "interleaved": {"pp": 2, "pp_virtual": 2, "pp_schedule": "interleaved-1f1b"},
    "zero-bubble": {"pp": 2, "pp_virtual": 2, "pp_schedule": "zero-bubble"},
    "ep etp": {"ep": 2, "etp": 2},
    "tp cp ep": {"tp": 2, "cp": 2, "ep": 4},
    "shards tp ep": {"dp_shard": "full", "tp": 2, "ep": 2},
    "levels": {"ep": 4, "dispatch": "hierarchical"},
    "pp tp etp": {"pp": 2, "tp": 2, "etp": 2},
    "pp cp ep": {"pp": 2, "cp": 2, "ep": 2, "pp_schedule": "gpipe"},
    "pp shards": {"pp": 2, "dp_shard": "full", "pp_virtual": 2, "pp_schedule": "interleaved-1f1b", "ep": 2},
    "zero-bubble tp": {"pp": 2, "tp": 2, "pp_schedule": "zero-bubble", "ep": 2},
}
FOUR = ("ep etp", "tp cp ep", "shards tp ep", "levels", "pp tp etp", "pp cp ep", "pp shards", "zero-bubble tp")
"""Layouts of four ranks; the others are of two."""

BALANCED = {"kind": "top_k", "force": "balanced"}
MODELS: dict[str, dict] = {
    "dense": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2}},
    "moe": {
        "attention": {"heads": 4, "kv_heads": 4},
        "moe": {"experts": 4, "ffn_hidden": 128, "shared_experts": 1, "gate": BALANCED},
    },
    "mixed": {
        "ffn_hidden": 512,
        "attention": {"heads": 4, "kv_heads": 2, "qk_norm": "head"},
        "moe": {
            **{"experts": 4, "ffn_hidden": 256, "every": 2, "shared_experts": 1, "shared_mix": "residual"},
            "gate": BALANCED,
        },
    },
    "latent": {"ffn_hidden": 512, "attention": {**LATENT["attention"], "q_lora_rank": 64, "kv_lora_rank": 64}},
    "ahead": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2}, "mtp": {"depth": 2}},
    "released": {
        "ffn_hidden": 512,
        "rope_scaling": {"kind": "linear", "factor": 2.0},
        "norm": "layer",
        "attention": {
            **{"heads": 4, "kv_heads": 2, "sinks": True, "bias": "qkv", "rotary_fraction": 0.5},
            **{"output_gate": True, "qk_norm": "full", "clip_qkv": 1.0},
        },
    },
    "windows": {"ffn_hidden": 512, "attention": {"heads": 4, "kv_heads": 2, "window": 16}},
}
WIDE = [("float32", "none"), ("float32", "selective")]
PLAIN, SELECTIVE, FULL = (("bfloat16", recompute) for recompute in ("none", "selective", "full"))
MOE = {
    "tp": [*WIDE, PLAIN, SELECTIVE, FULL],
    "tp without sp": [WIDE[1], PLAIN, SELECTIVE],
    "cp": [WIDE[0], PLAIN, SELECTIVE],
    "etp": [*WIDE, PLAIN, SELECTIVE, FULL],
    "shards": [PLAIN, SELECTIVE, FULL],
    "ep": [PLAIN, SELECTIVE, FULL],
    "tp ep": [PLAIN, SELECTIVE],
    "tp etp": [WIDE[1]],
    **dict.fromkeys(("gathered", "chunks", "ep etp", "tp cp ep", "shards tp ep", "levels"), (SELECTIVE,)),
}
OTHERS = {"tp": [PLAIN, SELECTIVE], "tp without sp": [PLAIN], "cp": [SELECTIVE]}
PIPELINES = [
    ("dense", "pp", "bfloat16", "full"),
    ("moe", "pp", "float32", "selective"),
    ("ahead", "pp", "bfloat16", "none"),
    ("latent", "gpipe", "bfloat16", "selective"),
    ("moe", "interleaved", "float32", "full"),
    ("dense", "interleaved", "bfloat16", "none"),
    ("moe", "zero-bubble", "bfloat16", "none"),
    ("latent", "zero-bubble", "float32", "none"),
    ("moe", "pp tp etp", "bfloat16", "none"),
    ("moe", "pp cp ep", "bfloat16", "selective"),
    ("moe", "pp shards", "bfloat16", "full"),
    ("mixed", "zero-bubble tp", "bfloat16", "none"),
]
KEPT = [
    *(("moe", layout, *how) for layout, hows in MOE.items() for how in hows),
    *((name, at, *how) for name in ("dense", "latent", "ahead", "windows") for at in OTHERS for how in OTHERS[at]),
    *(("mixed", *names) for names in (("tp", *WIDE[0]), ("tp", *PLAIN), ("tp ep", *SELECTIVE))),
    ("latent", "tp", *WIDE[0]),
    *PIPELINES,
]
"""Model, layout, type and recomputation."""


def configuration(small: dict, model: str, layout: str, dtype: str, recompute: str) -> Config:
    world, pipeline = 4 if layout in FOUR else 2, "pp" in LAYOUTS[layout]
    nodes = {"nodes": 2, "ranks_per_node": 2} if layout == "levels" else {"ranks_per_node": world}
    size = {"hidden": 256, "layers": 4 if pipeline else 2}
    train = {"seq_len": 128, "micro_batch": 2, "dtype": dtype, "recompute": recompute}
    raw = changed(small, {"model": size, "parallel": LAYOUTS[layout], "cluster": nodes, "train": train})
    raw["model"] = {**raw["model"], "moe": None, **MODELS[model]}
    degrees, problems = resolve(Config.model_validate(raw))
    assert degrees is not None, problems
    # A pipeline has more micro-batches than stages.
    raw["train"]["global_batch"] = degrees.dp * 2 * (4 if pipeline else 1)
    config = Config.model_validate(raw)
    assert (problems := dimension.check(config)) == [], problems
    return config


@pytest.fixture(scope="module")
def remains(request, small, tmp_path_factory) -> dict[str, list[dict[str, int]]]:
    """What each pipeline rank keeps in the tests that are to run, by type and shape."""
    wanted = {item.callspec.params["names"] for item in request.session.items if item.path == request.path}
    found: dict[str, list[dict[str, int]]] = {}
    for world in (2, 4):
        mine = [names for names in KEPT if names in wanted and (names[1] in FOUR) == (world == 4)]
        mine.sort(key=lambda names: [*LAYOUTS].index(names[1]))
        folder = tmp_path_factory.mktemp("kept")
        if mine:
            start(kept_of_each, world, {" ".join(n): configuration(small, *n) for n in mine}, folder)
        for path in sorted(folder.glob("kept-*.json")):
            for name, sizes in json.loads(path.read_text()).items():
                found.setdefault(name, []).append(sizes)
    return found


@pytest.mark.parametrize("names", KEPT, ids=" ".join)
def test_keeps_what_the_estimate_says(remains, small, names):
    config, found = configuration(small, *names), remains[" ".join(names)]
    degrees, _ = resolve(config)
    assert len(found) == degrees.pp
    for rank, sizes in enumerate(found):
        estimate, measured = activations(step_shape(config, degrees, vocab_size(config), rank)), sum(sizes.values())
        largest = "\n".join(
            f"    {size:10} bytes of {name}" for name, size in sorted(sizes.items(), key=lambda x: -x[1])
        )
        text = f"pipeline rank {rank}: estimated {estimate:.0f}, kept {measured}:\n{largest}"
        assert estimate == pytest.approx(measured, rel=0.1), text
