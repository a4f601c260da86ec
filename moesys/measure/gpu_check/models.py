"""The `model` sections of the shipped models, for machines that cannot read YAML.

python -m moesys.measure.gpu_check.models      # writes models.json again, from configs/models
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moesys.files import json_text, write_whole

FILE = Path(__file__).with_name("models.json")

LAYERS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3")
"""The models whose MoE layers run."""

BLOCKS = (*LAYERS, "gpt-oss-20b")
"""The models whose blocks run; the last has attention sinks."""


def sections() -> dict[str, dict[str, Any]]:
    """The section `model` of each configuration in configs/models, with its defaults, by name; from models.json."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def config(section: dict[str, Any]) -> Any:
    """A section's keys as the attributes that `Block` reads from `ModelConfig`; block 0 of the model is MoE."""
    moe = _named(section["moe"])
    moe.zero_computation = moe.zero_experts + moe.copy_experts + moe.constant_experts
    moe.shared_width = moe.shared_experts * (moe.shared_ffn_hidden or moe.ffn_hidden)
    model = _named({**section, "moe": None, "rope_scaling": None})  # which changes angles alone
    model.moe, model.is_moe = moe, lambda layer: True
    model.mixer = lambda layer: (model.attention, "model.attention")
    return model


def _named(section: dict[str, Any]) -> SimpleNamespace:
    """A section's keys as attributes."""
    named = {key: _named(value) if isinstance(value, dict) else value for key, value in section.items()}
    return SimpleNamespace(**named)


def shrunken(section: dict[str, Any]) -> dict[str, Any]:
    """The section with sizes that a CPU computes at once; the kind of model stays."""
    a, m = section["attention"], section["moe"]
    heads = 4
    attention = {key: min(8, value) if type(value) is int else value for key, value in a.items()}
    attention |= {"heads": heads, "kv_heads": a["kv_heads"] and max(1, heads * a["kv_heads"] // a["heads"])}
    attention |= {"head_dim": 8, "qk_rope_head_dim": 4}
    moe = m | {"experts": min(m["experts"], 16), "top_k": min(m["top_k"], 4), "ffn_hidden": 16}
    return section | {"hidden": 32, "attention": attention, "moe": moe}


def shipped() -> dict[str, dict[str, Any]]:
    """`sections`, read from the configurations themselves."""
    from moesys import shipped
    from moesys.config.load import load

    paths = sorted((shipped.CONFIGS / "models").glob("*.yaml"))
    return {path.stem: load(path).config.model.model_dump() for path in paths}


if __name__ == "__main__":
    lines = [f" {json_text(name)}: {json_text(section)}" for name, section in shipped().items()]
    write_whole(FILE, "{\n" + ",\n".join(lines) + "\n}\n")
