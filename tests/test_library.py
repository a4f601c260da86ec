"""What `import moesys` offers: lazily, documented, and the same to type checkers."""

from __future__ import annotations

import ast
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moesys

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_imports_nothing_heavy():
    code = """
import sys, moesys
names = dir(moesys)
heavy = {"torch", "pydantic", "ray", "numpy", "yaml", "rich"} & set(sys.modules)
assert not heavy and "MoELayer" in names and set(moesys.__all__) <= set(names), heavy
moesys.load_config("configs/quickstart.yaml")
assert "torch" not in sys.modules and "ray" not in sys.modules, "a configuration needs no torch"
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse((ROOT / "moesys" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == moesys._MODULES
    assert list(seen) and set(moesys.__all__) == {*seen, "__version__"}


@pytest.mark.parametrize("name", sorted(moesys._MODULES))
def test_every_name_is_there_and_documented(name):
    value = getattr(moesys, name)
    assert value.__module__ == moesys._MODULES[name] and value.__name__ == name
    assert (value.__doc__ or "").strip(), "a docstring of its own"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'moesys' has no attribute 'TopGate'"):
        moesys.TopGate  # noqa: B018


def test_a_layer_by_the_keys_of_a_configuration():
    layer = moesys.build_moe_layer(16, experts=4, top_k=2, ffn_hidden=8, gate="expert_choice", shared_experts=1)
    assert isinstance(layer, moesys.MoELayer) and isinstance(layer.gate, moesys.ExpertChoiceGate)
    out = layer(torch.randn(2, 3, 16))
    assert out.shape == (2, 3, 16) and out.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"expert": 4, "ffn_hidden": 8}, "did you mean model.moe.experts?"),
        ({"experts": 4, "ffn_hidden": -1}, "model.moe.ffn_hidden is -1: must be a whole number"),
        ({"experts": 4, "ffn_hidden": 8, "top_k": 5}, "model.moe.top_k"),
        ({"experts": 4, "ffn_hidden": 8, "gate": "dense", "capacity_factor": 1.0}, "model.moe.capacity_factor"),
    ],
)
def test_keys_that_no_configuration_may_have_are_refused(keys, said):
    with pytest.raises(moesys.ConfigError) as caught:
        moesys.build_moe_layer(16, **keys)
    assert said in str(caught.value)


def test_a_trainer_in_a_script_of_one_process(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"""
model: {{hidden: 16, layers: 1, attention: {{heads: 2}}, moe: {{experts: 4, top_k: 2, ffn_hidden: 8}}}}
train: {{steps: 2, seq_len: 16, global_batch: 2, eval_sequences: 2}}
data: {{kind: text, path: {text}, heldout: 0.2, cache: {tmp_path / "cache"}}}
cluster: {{device: cpu}}
""")
    code = """
import moesys
trainer = moesys.build_trainer(moesys.load_config("mine.yaml", ["train.steps=3"]))
steps = [trainer.train_step() for _ in range(trainer.config.train.steps)]
print(*(step["loss"] for step in steps), trainer.evaluate())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(word) for word in done.stdout.split()]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses) and losses[2] < losses[0]


GUIDE = [
    block[1] for block in re.finditer(r"^```python\n(.*?)^```", (ROOT / "docs/library.md").read_text(), re.M | re.S)
]


def test_the_guide_calls_what_there_is():
    seen = set()
    for call in (node for text in GUIDE for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "moesys":
            kinds = inspect.signature(getattr(moesys, call.func.attr)).parameters
            free = any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in kinds.values())
            assert free or {word.arg for word in call.keywords} <= set(kinds), ast.unparse(call)
            seen.add(call.func.attr)
    assert {"expert_parallel", "CommunicationRecorder", "build_trainer", "TopKGate"} <= seen


def test_the_guides_layers_run():
    names: dict[str, object] = {}
    for text in GUIDE[:2]:
        exec(text, names)
    assert names["y"].shape == (4, 128, 512) and names["layer"](torch.randn(1, 2, 512)).shape == (1, 2, 512)
