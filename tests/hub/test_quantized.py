"""FP8 and MXFP4 files, written here by plain loops, read in whole and in slices."""

import json
from pathlib import Path

import pytest
import released_models as released
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moesys.config.schema import ModelConfig
from moesys.errors import FileError
from moesys.hub.family import nested
from moesys.hub.fit import fit
from moesys.hub.folder import open_folder
from moesys.hub.tensors import FolderTensors


def encode_fp8(weight: Tensor, powers: bool, block: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of 8 bits, a factor per block, and what they stand for; `powers`: factors are powers of two."""
    rows, columns = weight.shape
    numbers, decoded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(-(-rows // block), -(-columns // block))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            factor = weight[here].abs().max() / 448
            scale[i, j] = torch.exp2(factor.log2().ceil()) if powers else factor
            numbers[here] = (weight[here] / scale[i, j]).to(torch.float8_e4m3fn)
            decoded[here] = numbers[here].float() * scale[i, j]
    return numbers, scale, decoded


def exponents(scale: Tensor, kind: str) -> Tensor:
    """Factors as files hold them."""
    if kind == "float32":
        return scale
    as_bytes = (scale.log2().round() + 127).to(torch.uint8)
    return as_bytes if kind == "uint8" else as_bytes.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("ending", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("kind", ["float32", "float8_e8m0fnu", "uint8"])
def test_fp8_with_ragged_blocks(tmp_path: Path, kind: str, ending: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 260) * torch.logspace(-3, 3, 300).unsqueeze(1)
    numbers, scale, decoded = encode_fp8(weight, powers=kind != "float32")
    save_file({"w": numbers, f"w{ending}": exponents(scale, kind)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    folder = open_folder(tmp_path)
    assert {name: tensor.shape for name, tensor in folder.decoded.items()} == {"w": (300, 260)}
    files = FolderTensors(folder)
    torch.testing.assert_close(files.read("w", (None, None)), decoded, rtol=0, atol=0)
    rows, columns = [299, 0, 127, 128, 255, 256], [259, 3, 200]
    part = files.read("w", (rows, columns))
    torch.testing.assert_close(part, decoded[rows][:, columns], rtol=0, atol=0)


def test_fp8_is_what_transformers_decodes(tmp_path: Path) -> None:
    numbers, scale, _ = encode_fp8(torch.randn(256, 384, generator=torch.Generator().manual_seed(0)), powers=False)
    save_file({"w": numbers, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    theirs = Fp8Dequantize(None)._dequantize_one(numbers, scale, torch.float32)
    found = FolderTensors(open_folder(tmp_path)).read("w", (None, None))
    torch.testing.assert_close(found, theirs, rtol=0, atol=0)


def test_fp8_without_factors_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match="w is of 8 bits, and its factors w_scale_inv are missing"):
        _ = open_folder(tmp_path).decoded


def test_fp8_with_factors_of_another_tensor_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": torch.ones(8, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"w_scale_inv has the shape \[8, 1\], which does not fit w of \[4, 4\]"):
        _ = open_folder(tmp_path).decoded


VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def encode_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scales, and what they stand for, of `weight` [E, R, C]: 32 elements of C share an exponent."""
    experts, rows, columns = weight.shape
    blocks = torch.zeros(experts, rows, columns // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(experts, rows, columns // 32, dtype=torch.uint8)
    decoded, table = torch.zeros_like(weight), torch.tensor(VALUES)
    for e in range(experts):
        for r in range(rows):
            for g in range(columns // 32):
                group = weight[e, r, 32 * g : 32 * g + 32]
                exponent = int((group.abs().max() / 6).log2().ceil().item())
                scales[e, r, g] = exponent + 127
                near = (group.abs().unsqueeze(1) / 2.0**exponent - table).abs().argmin(1)
                code = near + 8 * (group < 0)
                decoded[e, r, 32 * g : 32 * g + 32] = table[near] * torch.where(group < 0, -1.0, 1.0) * 2.0**exponent
                blocks[e, r, g] = (code[0::2] + 16 * code[1::2]).to(torch.uint8)
    return blocks, scales, decoded


def test_mxfp4_of_gpt_oss_whose_matrices_are_square(tmp_path: Path) -> None:
    case = released.Case(
        "gpt_oss", {**released.HEAD, **released.LOCAL, "num_hidden_layers": 1, "intermediate_size": 32}, "square"
    )
    theirs = released.build(case)
    released.save(theirs, tmp_path)
    decoded: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            blocks, scales, rows = encode_mxfp4(tensors.pop(name).transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded[name] = rows.transpose(1, 2)
            wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            torch.testing.assert_close(decoded[name], wanted, rtol=0, atol=0)
        save_file(tensors, file)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    assert len(decoded) == 2
    folder = open_folder(tmp_path)
    files = FolderTensors(folder)
    for name, tensor in decoded.items():
        assert folder.decoded[name].shape == tensor.shape
        part = files.read(name, ([3, 1], [31, 0, 5], [17, 2]))
        torch.testing.assert_close(part, tensor[[3, 1]][:, [31, 0, 5]][:, :, [17, 2]], rtol=0, atol=0)
    with torch.no_grad():
        experts = theirs.model.layers[0].mlp.experts
        experts.gate_up_proj.copy_(decoded["model.layers.0.mlp.experts.gate_up_proj"])
        experts.down_proj.copy_(decoded["model.layers.0.mlp.experts.down_proj"])
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    model = ModelConfig.model_validate(nested(released.family("gpt_oss").read(raw).values))
    ours = released.filled(fit(folder, model, released.VOCAB), model)
    logits, wanted = ours(released.tokens()), theirs(released.tokens()).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["deepseek_v3", "minimax_m2", "qwen3_moe"])
def test_a_released_fp8_model_is_decoded_on_the_way(tmp_path: Path, kind: str) -> None:
    case = next(case for case in released.CASES if case.family == kind)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    released.save(released.build(case), packed)
    plain.mkdir()
    (plain / "config.json").write_bytes((packed / "config.json").read_bytes())
    count = 0
    for file in packed.glob("*.safetensors"):
        tensors = load_file(file)
        decoded = dict(tensors)
        for name in [n for n in tensors if "_proj" in n or ".experts." in n]:
            if tensors[name].ndim == 2:
                count += 1
                tensors[name], tensors[f"{name}_scale_inv"], decoded[name] = encode_fp8(tensors[name], False, 8)
        save_file(tensors, file)
        save_file(decoded, plain / file.name)
    (packed / "model.safetensors.index.json").unlink()
    assert count > 30
    every = []
    for path in (packed, plain):
        folder = open_folder(path)
        derived = released.family(kind).read(folder.config, folder.tensors)
        model = ModelConfig.model_validate(nested(derived.values))
        every.append(released.filled(fit(folder, model, released.VOCAB), model).state_dict())
    for name, tensor in every[0].items():
        torch.testing.assert_close(tensor, every[1][name], rtol=0, atol=0, msg=name)
