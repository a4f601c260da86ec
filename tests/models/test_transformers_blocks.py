"""One MoE layer against transformers' blocks of the same random weights: output and every gradient."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2SparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moesys.config import Config
from moesys.models.moe import build_moe
from moesys.moe import MoELayer
from moesys.parallel import dimension

H, F, E = 32, 24, 8
PLAIN = {"experts": E, "ffn_hidden": F, "balance_loss": 0.0}


def mixtral():
    config = transformers.MixtralConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(config), {"top_k": 2}


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=4, norm_topk_prob=True
    )
    return Qwen3MoeSparseMoeBlock(config), {"top_k": 4}


def olmoe():
    config = transformers.OlmoeConfig(
        hidden_size=H, intermediate_size=F, num_experts=E, num_experts_per_tok=3, norm_topk_prob=False
    )
    return OlmoeSparseMoeBlock(config), {"top_k": 3, "normalize": False}


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=4, norm_topk_prob=False,
        shared_expert_intermediate_size=40,
    )  # fmt: skip
    shared = {"shared_experts": 1, "shared_ffn_hidden": 40, "shared_mix": "gate"}
    return Qwen2MoeSparseMoeBlock(config), {"top_k": 4, "normalize": False, **shared}


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        hidden_size=H, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=3, n_shared_experts=2,
        n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    gate = {"score": "sigmoid", "groups": 4, "groups_kept": 2, "group_score": "top2"}
    return DeepseekV3MoE(config), {"top_k": 3, "gate": gate, "bias_rate": 1e-3, "scale": 2.5, "shared_experts": 2}


def deepseek_v2():
    config = transformers.DeepseekV2Config(
        hidden_size=H, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=3, n_shared_experts=2,
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=1.5, norm_topk_prob=False,
    )  # fmt: skip
    gate = {"groups": 4, "groups_kept": 2, "group_score": "max"}
    return DeepseekV2Moe(config), {"top_k": 3, "gate": gate, "normalize": False, "scale": 1.5, "shared_experts": 2}


def minimax_m2():
    config = transformers.MiniMaxM2Config(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=3
    )
    return MiniMaxM2SparseMoeBlock(config), {"top_k": 3, "gate": {"score": "sigmoid"}, "selection_bias": True}


def ernie4_5_moe():
    config = transformers.Ernie4_5_MoeConfig(
        hidden_size=H, moe_intermediate_size=F, moe_num_experts=E, moe_k=3, moe_num_shared_experts=2, moe_norm_min=0.4
    )  # some tokens' sums are below it, and others above
    keys = {"top_k": 3, "selection_bias": True, "normalize_min": 0.4, "shared_experts": 2}
    return Ernie4_5_MoeSparseMoeBlock(config), keys


def phimoe():
    config = transformers.PhimoeConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, router_jitter_noise=0.3)
    return PhimoeSparseMoeBlock(config), {"top_k": 2, "gate": {"kind": "sparsemixer", "threshold": 0.3}}


def gpt_oss():
    config = transformers.GptOssConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=4)
    return GptOssMLP(config), {"top_k": 4, "gate": {"bias": True}, "bias": True, "activation": "clipped_swiglu"}


def together(weight: Tensor) -> Tensor:
    """[E, 2F, H] or [E, 2F], gates before linear parts, as ours: [E, H, 2, F] or [E, 2, F]."""
    return weight.unflatten(1, (2, -1)).movedim(3, 1) if weight.ndim == 3 else weight.unflatten(1, (2, -1))


def in_turns(weight: Tensor) -> Tensor:
    """[E, H, 2F] or [E, 2F], gates and linear parts in turns, as ours."""
    return weight.unflatten(-1, (-1, 2)).transpose(-1, -2)


def same(weight: Tensor) -> Tensor:
    return weight


def transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)


NAMES: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {
    "gate.projection.weight": [("gate.weight", same), ("router.weight", same)],
    "gate.projection.bias": [("router.bias", same)],
    "gate.selection_bias": [
        ("gate.e_score_correction_bias", same),
        ("e_score_correction_bias", same),
        ("gate.moe_statics.e_score_correction_bias", lambda bias: bias.flatten()),
    ],
    "experts.fc1": [("experts.gate_up_proj", together)],
    "experts.fc2": [("experts.down_proj", transposed)],
    "experts.fc1_bias": [("experts.gate_up_proj_bias", in_turns)],
    "experts.fc2_bias": [("experts.down_proj_bias", same)],
    **{
        f"shared.{name}.weight": [(f"shared_expert.{name}.weight", same), (f"shared_experts.{name}.weight", same)]
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    "mix.projection.weight": [("shared_expert_gate.weight", same)],
}
"""Our names, and theirs with what makes their tensors ours."""
GPT_OSS = {"experts.fc1": [("experts.gate_up_proj", in_turns)], "experts.fc2": [("experts.down_proj", same)]}


def theirs_of(name: str, tensors: dict[str, Tensor], names: dict) -> Tensor:
    """Their tensor (or gradient) for our parameter or buffer `name`."""
    ((path, convert),) = [(path, convert) for path, convert in names[name] if path in tensors]
    return convert(tensors[path])


def randomise(block: nn.Module) -> nn.Module:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    for buffer in block.buffers():
        nn.init.uniform_(buffer, -0.2, 0.2)
    return block


def build(keys: dict) -> MoELayer:
    """The layer that a configuration with these keys describes."""
    raw = {"model": {"hidden": H, "layers": 1, "attention": {"heads": 4}, "moe": {**PLAIN, **keys}}}
    config = Config.model_validate(raw)
    assert dimension.check(config, 1) == []
    assert config.model.moe is not None
    return build_moe(config.model.moe, H, 0)


FAMILIES = [mixtral, qwen3_moe, olmoe, qwen2_moe, deepseek_v2, deepseek_v3, minimax_m2, ernie4_5_moe, phimoe, gpt_oss]


# Their routers compute in float32 even in a float64 model.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-6)])
@pytest.mark.parametrize("make", FAMILIES, ids=lambda f: f.__name__)
def test_output_and_gradients_equal_transformers(make, dtype, tolerance):
    torch.manual_seed(0)
    block, keys = make()
    block, layer = randomise(block).to(dtype), build(keys).to(dtype)
    names = NAMES | GPT_OSS if make is gpt_oss else NAMES
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    mine = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs_of(name, tensors, names))
    assert sum(t.numel() for t in mine.values()) == sum(t.numel() for t in tensors.values())
    x = torch.randn(3, 17, H, dtype=dtype) * (4 if make is gpt_oss else 1)  # so that its activation clips
    ours, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    # In evaluation: no randomness on their side; ours has none.
    expected = block.eval()(other)
    expected = expected[0] if isinstance(expected, tuple) else expected
    out, target = layer.eval()(ours), torch.randn(3, 17, H, dtype=dtype)

    def close(a: Tensor, b: Tensor, what: str) -> None:
        assert ((a - b).norm() / b.norm()).item() < tolerance, what

    close(out, expected, "output")
    for y in (out, expected):
        (y * target).sum().backward()
    close(ours.grad, other.grad, "gradient of x")
    gradients = {name: p.grad for name, p in block.named_parameters()}
    for name, parameter in layer.named_parameters():
        close(parameter.grad, theirs_of(name, gradients, names), name)
