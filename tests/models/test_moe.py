"""Mixture-of-experts models keep their code and run their experts on FP8."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fp8gemm import ENGINES, FP8GemmOptions, FP8Linear, FP8Weight, disable_fp8_gemm, enable_fp8_gemm, report, warmup
from fp8gemm.weights.einsum import batched_operands
from fp8gemm.weights.structure import is_transposed

TOKENS = torch.arange(2 * 11).view(2, 11) % 99
COMMON = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def mixtral(**more):
    return transformers.MixtralConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=96, num_local_experts=4, **more
    )


def qwen3_moe(**more):
    return transformers.Qwen3MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        head_dim=16,
        **more,
    )


def deepseek_v3(**more):
    return transformers.DeepseekV3Config(
        **COMMON,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        **more,
    )


def gpt_oss(**more):
    return transformers.GptOssConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, num_local_experts=4, head_dim=16, **more
    )


def olmoe(**more):
    return transformers.OlmoeConfig(**COMMON, intermediate_size=48, num_experts=8, num_experts_per_tok=2, **more)


def granite_moe(**more):
    return transformers.GraniteMoeConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **more
    )


def llama4(**more):
    return transformers.Llama4TextConfig(
        **COMMON,
        num_key_value_heads=2,
        intermediate_size=48,
        intermediate_size_mlp=96,
        num_local_experts=4,
        head_dim=16,
        **more,
    )


MODELS = [mixtral, qwen3_moe, deepseek_v3, gpt_oss, olmoe, granite_moe, llama4]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def make(config, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.05)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def calls_of_experts(model: nn.Module) -> dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """Inputs and outputs of every expert block in a run of the model, with the model's own routing."""
    calls = {}
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: calls.__setitem__(name, (inputs, output))
            )
    with torch.no_grad():
        model(input_ids=TOKENS)
    assert calls
    return calls


@pytest.mark.parametrize("scheme", ["row", "tensor", "block"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("config", MODELS)
def test_transformers_experts_run_on_fp8(config, implementation: str, scheme: str) -> None:
    plain = make(config())
    if config is not llama4:  # its experts have only one implementation
        plain.set_experts_implementation(implementation)
    model = enable_fp8_gemm(copy.deepcopy(plain), options=FP8GemmOptions(scheme=scheme), module_filter="*experts*")
    for name, (inputs, expected) in calls_of_experts(plain).items():
        with torch.no_grad():
            assert 0 < relative(model.get_submodule(name)(*inputs), expected) <= 0.08, name
    rows = report(model)
    assert rows.converted
    assert all(row.name.endswith(("gate_up_proj", "down_proj")) for row in rows.converted if "shared" not in row.name)
    for row in rows.converted:
        assert row.calls >= 1, f"{row.name} did not run"
        assert row.dequantizations == 0, f"{row.name} was dequantized"
    kinds = {type(module).__name__ for module in plain.modules()}
    assert kinds <= {type(module).__name__ for module in model.modules()} | {"Linear"}


@pytest.mark.parametrize("config", MODELS)
def test_by_default_experts_are_converted_and_routers_are_not(config) -> None:
    model = make(config(), torch.bfloat16)
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="discard"))
    with torch.no_grad():
        model(input_ids=TOKENS)
    for name, module in model.named_modules():
        if name.endswith(("gate", "router")):
            assert not isinstance(module, FP8Linear), name
    stacks = [p for p in model.parameters() if isinstance(p, FP8Weight) and p.dim() == 3]
    assert stacks
    assert all(stack._home.stored is not None for stack in stacks)


@pytest.mark.parametrize("storage", ["keep", "cpu_offload", "discard"])
@pytest.mark.parametrize("config", [mixtral, gpt_oss])
def test_undo_copies_and_moves(config, storage: str) -> None:
    plain = make(config())
    kinds = [type(module) for module in plain.modules()]
    model = enable_fp8_gemm(copy.deepcopy(plain), options=FP8GemmOptions(fp16_weight_storage=storage))
    with torch.no_grad():
        expected = model(input_ids=TOKENS)[0]
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            enable_fp8_gemm(plain, options=FP8GemmOptions(fp16_weight_storage=storage), inplace=False),
        ):
            assert torch.equal(twin(input_ids=TOKENS)[0], expected)
        assert relative(model.bfloat16().float()(input_ids=TOKENS)[0], expected) < 0.02
    disable_fp8_gemm(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(plain.state_dict()) or set(model.state_dict()) == set(plain.state_dict())
    with torch.no_grad():
        found, expected = model(input_ids=TOKENS)[0], plain(input_ids=TOKENS)[0]
    assert relative(found, expected) < (0.08 if storage == "discard" else 0.02)


def test_state_dict_round_trip() -> None:
    model = enable_fp8_gemm(make(mixtral()))
    state = model.state_dict()
    assert state["layers.0.mlp.experts.gate_up_proj"].dtype == torch.float8_e4m3fn
    assert state["layers.0.mlp.experts.gate_up_proj_scale"].shape == (4, 192, 1)
    with torch.device("meta"):
        empty = transformers.AutoModel.from_config(mixtral())
    enable_fp8_gemm(empty)
    empty.load_state_dict(state, assign=True)
    ours, theirs = model.layers[0].mlp.experts, empty.layers[0].mlp.experts
    x = torch.randn(5, 64)
    assert torch.equal(F.linear(x, ours.gate_up_proj[2]), F.linear(x, theirs.gate_up_proj[2]))


def test_per_tensor_scales_are_one_for_each_expert_and_half() -> None:
    model = enable_fp8_gemm(make(mixtral()), options=FP8GemmOptions(scheme="tensor"))
    experts = model.layers[0].mlp.experts
    assert tuple(experts.gate_up_proj.scaled().scale.shape) == (4, 2, 1)
    assert tuple(experts.down_proj.scaled().scale.shape) == (4, 1, 1)


def test_orientation_is_told_or_seen() -> None:
    owner = nn.Module()
    owner.gate_up_proj, owner.down_proj = nn.Parameter(torch.empty(2, 96, 32)), nn.Parameter(torch.empty(2, 32, 48))
    assert not is_transposed(owner, "gate_up_proj")
    owner.gate_up_proj, owner.down_proj = nn.Parameter(torch.empty(2, 32, 96)), nn.Parameter(torch.empty(2, 48, 32))
    assert is_transposed(owner, "gate_up_proj")
    owner.is_transposed = False
    assert not is_transposed(owner, "gate_up_proj")


class Einsum(nn.Module):
    def __init__(self, equation: str, *shape: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(*shape))
        self.equation = equation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, x, self.w1)


@pytest.mark.parametrize(
    ("equation", "x_shape", "runs"),
    [
        ("ebk,enk->ebn", (4, 5, 32), True),
        ("bk,enk->ben", (5, 32), True),
        ("bek,enk->bne", (5, 4, 32), True),
        ("abek,enk->aben", (2, 3, 4, 32), True),
        ("ebn,enk->ebk", (4, 5, 24), False),
        ("ek,enk->en", (4, 32), True),
        ("ebk,enk->bn", (4, 5, 32), False),
    ],
)
def test_einsum_over_a_stack(equation: str, x_shape: tuple[int, ...], runs: bool) -> None:
    plain = Einsum(equation, 4, 24, 32)
    model = enable_fp8_gemm(copy.deepcopy(plain))
    x = torch.randn(x_shape)
    found = model(x)
    dense = torch.einsum(equation, x, model.w1.dequantize())
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    row = report(model).converted[0]
    assert (row.calls, row.dequantizations) == ((1, 1) if runs else (0, 2))


def test_warmup_spreads_tokens_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks of one kind run once per M, with ends that increase to M."""
    model = enable_fp8_gemm(nn.ModuleList([Einsum("ebk,enk->ebn", 4, 24, 32) for _ in range(2)]))
    stack = next(model.parameters())
    assert isinstance(stack, FP8Weight)
    engine = type(ENGINES[stack.engine or ""])
    real, found = engine.grouped, []

    def grouped(self, x, weight, ends, bias, out_dtype):
        found.append((x.shape[0], ends.tolist()))
        return real(self, x, weight, ends, bias, out_dtype)

    monkeypatch.setattr(engine, "grouped", grouped)
    assert warmup(model, tokens=[8, 2]) == 2
    assert found == [(2, [0, 1, 1, 2]), (8, [2, 4, 6, 8])]


def test_equations_that_are_no_such_product() -> None:
    for equation in ("ebk,enk", "eb...k,enk->eb...n", "ebk,eek->ebn", "ebkk,enk->ebn", "ebkn,enk->ebn"):
        assert batched_operands(equation, 1, stack_is_transposed=False) is None


def test_a_module_list_of_experts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4, bias=False)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, chosen = self.gate(x).softmax(-1).topk(2)
            return sum(
                weights[:, i, None]
                * torch.stack([self.experts[e](t) for e, t in zip(chosen[:, i].tolist(), x, strict=True)])
                for i in range(2)
            )

    plain = Block()
    model = enable_fp8_gemm(copy.deepcopy(plain))
    x = torch.randn(6, 32)
    assert relative(model(x), plain(x)) < 0.08
    kept = report(model).kept
    assert [(row.name, row.reason.split(":")[0]) for row in kept] == [("gate", "it is the router of experts")]
    enable_fp8_gemm(model, module_filter="gate")
    assert isinstance(model.gate, FP8Linear)


def test_stacks_of_unknown_names_wait_for_a_filter() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.banks = nn.Parameter(torch.randn(3, 32, 16))
            self.other = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x @ bank.T for bank in self.banks])

    class Odd(Read):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack(list(map(lambda bank: x @ bank.T, self.banks)))  # noqa: C417

    assert {row.name for row in report(enable_fp8_gemm(Read())).converted} == {"banks", "other"}
    plain = Odd()
    model = enable_fp8_gemm(copy.deepcopy(plain))
    assert report(model).kept[0].reason.startswith("a stack of matrices, perhaps not experts")
    assert isinstance(model.banks, nn.Parameter)
    model = enable_fp8_gemm(copy.deepcopy(plain), module_filter="banks")
    x = torch.randn(5, 16)
    assert relative(model(x), plain(x)) < 0.05
    assert report(model).converted[0].calls == 3


def test_gradients_reach_the_tokens() -> None:
    model = enable_fp8_gemm(make(mixtral()))
    experts = model.layers[0].mlp.experts
    dense = experts.down_proj[1].dequantize()
    x = torch.randn(5, 96, requires_grad=True)
    F.linear(x, experts.down_proj[1]).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, 96), rtol=1e-4, atol=1e-4)
    stack = torch.randn(4, 5, 96, requires_grad=True)
    torch.bmm(stack, experts.down_proj.transpose(1, 2)).sum().backward()
    expected = experts.down_proj.dequantize().sum(1, keepdim=True).expand(4, 5, 96)
    torch.testing.assert_close(stack.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [mixtral, gpt_oss])
def test_writing_to_a_stack_writes_to_its_experts(config) -> None:
    plain = make(config())
    model = enable_fp8_gemm(copy.deepcopy(plain))
    for one in (plain, model):
        experts = one.layers[0].mlp.experts
        with torch.no_grad():
            experts.down_proj[0].zero_()
            experts.gate_up_proj[2].mul_(1.5)
            experts.gate_up_proj.data[1, 3:5] = 0.25
    with torch.no_grad():
        assert relative(model(input_ids=TOKENS)[0], plain(input_ids=TOKENS)[0]) < 0.08
    assert not model.layers[0].mlp.experts.down_proj[0].dequantize().any()


def test_tokens_of_absent_experts_give_zeros() -> None:
    experts = enable_fp8_gemm(make(mixtral())).layers[0].mlp.experts
    x, ends = torch.randn(9, 96), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    y = torch._grouped_mm(x, experts.down_proj.transpose(-2, -1), offs=ends)
    w = experts.down_proj.dequantize()
    expected = torch.cat([x[0:2] @ w[0].T, x[2:5] @ w[2].T, x[5:6] @ w[3].T, torch.zeros(3, 64)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_memory_of_a_model_that_is_mostly_experts() -> None:
    """Experts are nine tenths of the weights: at most 0.56 of the bfloat16 bytes remain."""
    config = qwen3_moe()
    config.num_experts, config.moe_intermediate_size, config.hidden_size, config.vocab_size = 32, 256, 256, 500
    model = make(config, torch.bfloat16)
    before = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    experts = sum(parameter.nbytes for name, parameter in model.named_parameters() if "experts" in name)
    assert experts >= 0.9 * before
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="discard"))
    after = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert after <= 0.56 * before
