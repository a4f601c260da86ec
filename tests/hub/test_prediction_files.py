"""Blocks of multi-token prediction in files of DeepSeek-V3 and GLM-4.5, against transformers' own block for drafts."""

from pathlib import Path
from typing import Any

import pytest
import released_models as released
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_layers import MtpLayer

from moesys.config.schema import ModelConfig
from moesys.hub.derive import released as derive
from moesys.hub.family import nested
from moesys.hub.fit import fit
from moesys.hub.folder import INDEX
from moesys.hub.tensors import FolderTensors
from moesys.train.export import Tensors

CASES = {case.family: case for case in released.CASES if case.family in ("deepseek_v3", "glm4_moe") and not case.name}


def prediction(theirs: Any) -> MtpLayer:
    """A random block of multi-token prediction."""
    last = theirs.model.layers[-1]
    made = MtpLayer(theirs.config, type(last), type(last.input_layernorm), theirs.config.num_hidden_layers)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return made.eval()


def as_files_have_it(block: MtpLayer, theirs: Any) -> dict[str, Tensor]:
    """Its tensors by the released files' names: one matrix per expert, embedding and head once more."""
    found = {"embed_tokens.weight": theirs.model.embed_tokens.weight, "shared_head.head.weight": theirs.lm_head.weight}
    for name, tensor in block.state_dict().items():
        inner = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        if inner.endswith("gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found |= {f"mlp.experts.{expert}.gate_proj.weight": gate, f"mlp.experts.{expert}.up_proj.weight": up}
        elif inner.endswith("experts.down_proj"):
            found |= {f"mlp.experts.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            found[inner] = tensor
    prefix = f"model.layers.{theirs.config.num_hidden_layers}."
    return {prefix + name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.fixture(params=sorted(CASES))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, MtpLayer, Path]:
    theirs = released.build(CASES[request.param])
    block = prediction(theirs)
    released.save(theirs, tmp_path)
    save_file(as_files_have_it(block, theirs), tmp_path / "prediction.safetensors")
    (tmp_path / INDEX).unlink()
    return theirs, block, tmp_path


def predicted(theirs: Any, block: MtpLayer, tokens: Tensor, ahead: Tensor) -> Tensor:
    """Logits of the token after the next one, by transformers' block."""
    stream = theirs.model(tokens).last_hidden_state
    positions = torch.arange(tokens.shape[1])[None]
    mask = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)[None, None]
    turned = theirs.model.rotary_emb(stream, positions)
    return theirs.lm_head(block(theirs.model.embed_tokens(ahead), stream, turned, mask, positions, None))


def test_predictions_are_those_of_transformers(saved: tuple[Any, MtpLayer, Path]) -> None:
    theirs, block, path = saved
    found = derive(path)
    assert not found.problems
    assert found.derived.values["mtp.depth"] == 1
    model = ModelConfig.model_validate(nested(found.derived.values))
    fitting = fit(found.folder, model, released.VOCAB)
    prefix = f"model.layers.{model.depth}."
    assert set(fitting.left_out) == {f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight"}
    ours, tokens = released.filled(fitting, model), released.tokens()
    ahead = tokens.roll(-1, 1)
    numbers = torch.arange(tokens.numel()).view_as(tokens)
    logits = ours(tokens, torch.stack((numbers, tokens, ahead), -1))
    wanted = torch.cat((theirs(tokens).logits, predicted(theirs, block, tokens, ahead)))
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert found.family.differences(model) == []
    assert found.family.write(model)["num_nextn_predict_layers"] == 1


def test_copies_of_the_embedding_and_the_head_are_written(saved: tuple[Any, MtpLayer, Path]) -> None:
    _, _, path = saved
    found = derive(path)
    model = ModelConfig.model_validate(nested(found.derived.values))
    weights = released.InMemory(released.filled(fit(found.folder, model, released.VOCAB), model).state_dict())
    written = dict(Tensors(found.family, model, weights, torch.float32, 4000))
    before = FolderTensors(found.folder)
    assert written.keys() == found.folder.tensors.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, before.read(name, (None,) * tensor.ndim)), name


def test_a_model_without_prediction_leaves_its_blocks_out(saved: tuple[Any, MtpLayer, Path]) -> None:
    _, _, path = saved
    found = derive(path)
    values = {key: value for key, value in found.derived.values.items() if not key.startswith("mtp.")}
    model = ModelConfig.model_validate(nested(values))
    left_out = fit(found.folder, model, released.VOCAB).left_out
    assert f"model.layers.{model.depth}.enorm.weight" in left_out
    assert all(name.startswith(f"model.layers.{model.depth}.") for name in left_out)
    assert found.family.write(model)["num_nextn_predict_layers"] == 0


def test_blocks_that_config_names_and_files_lack_are_noted(tmp_path: Path) -> None:
    released.save(released.build(CASES["deepseek_v3"]), tmp_path)
    found = derive(tmp_path)
    assert "mtp.depth" not in found.derived.values
    note = "config.json names 1 block of multi-token prediction, and the files have none"
    assert note in found.derived.notes
