"""Siblings that receive the same tensor run as one product, and as separate layers otherwise."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp8gemm import ENGINES, FP8GemmOptions, FP8Linear, disable_fp8_gemm, enable_fp8_gemm
from fp8gemm.models import warmup as warmup_module
from fp8gemm.models.siblings import SiblingLinear, fuse_siblings, join
from fp8gemm.models.warmup import warmup


class Attention(nn.Module):
    """Three projections, each of which receives what ``given`` makes of the input."""

    def __init__(self, *, bias: bool = True, sizes: tuple[int, int, int] = (32, 16, 16)) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, sizes[0], bias=bias)
        self.k_proj = nn.Linear(24, sizes[1], bias=False)
        self.v_proj = nn.Linear(24, sizes[2], bias=bias)
        self.given: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = _same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.given(x)
        return torch.cat([self.q_proj(q), self.k_proj(k), self.v_proj(v)], dim=-1)


def _same(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x, x, x


def _context_elsewhere(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    context = x * 2
    return x, context, context


def fused(scheme: str = "row", **more) -> tuple[nn.Sequential, nn.Sequential]:
    """A patched model twice: unchanged, and with its siblings fused."""
    model = nn.Sequential(Attention(), Attention(bias=False)).requires_grad_(False)
    model = nn.Sequential(model[0])
    enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))
    twin = copy.deepcopy(model)
    found = fuse_siblings(twin, **more)
    assert found.groups == (("0.q_proj", "0.k_proj", "0.v_proj"),)
    assert found.refused == {}
    return model, twin


def products(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the N of every product that a model runs from now on."""
    found: list[int] = []
    for engine in {type(one) for one in ENGINES.values()}:
        real = engine.linear

        def linear(self, x, weight, bias, out_dtype, real=real):
            found.append(weight.n)
            return real(self, x, weight, bias, out_dtype)

        monkeypatch.setattr(engine, "linear", linear)
    return found


@pytest.mark.parametrize("scheme", ["row", "tensor", "weight_only"])
def test_one_product_after_the_first_pass(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, joined = fused(scheme)
    seen = products(joined, monkeypatch)
    for m in (3, 3, 1, 5):
        x = torch.randn(2, m, 24)
        expected = plain(x)
        seen.clear()
        y = joined(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert seen == [64], "the last pass was one product"


def test_joined_weights_are_the_same_bytes() -> None:
    model, _ = fused("tensor")
    members = [model[0].q_proj, model[0].k_proj, model[0].v_proj]
    weight = join(members).scaled()
    assert weight.data.view(torch.uint8).equal(torch.cat([one.scaled().data.view(torch.uint8) for one in members]))
    scales = torch.cat([one.scaled().scale.expand(one.out_features, 1) for one in members])
    assert weight.scale.equal(scales)


def test_memory_is_not_doubled() -> None:
    _, joined = fused()
    for _ in range(2):
        joined(torch.randn(3, 24))
    group = joined[0].q_proj._place[0]
    data = group.joined.scaled().data
    storages = {one.scaled().data.untyped_storage().data_ptr() for one in group.members}
    assert storages == {data.untyped_storage().data_ptr()}


def test_a_tensor_changed_in_between_is_another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case that comparing data pointers gets wrong."""
    plain, joined = fused()
    for _ in range(2):
        joined(torch.randn(3, 24))
    x = torch.randn(3, 24)
    first, changed = x.clone(), x.clone()
    y = joined[0].q_proj(changed)
    changed.mul_(2)
    torch.testing.assert_close(y, plain[0].q_proj(first))
    torch.testing.assert_close(joined[0].k_proj(changed), plain[0].k_proj(first * 2))
    assert type(joined[0].k_proj) is FP8Linear, "the group is dissolved"


def test_only_those_that_agree_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross attention: k and v receive the context, q does not."""
    plain, joined = fused()
    plain[0].given = joined[0].given = _context_elsewhere
    seen = products(joined, monkeypatch)
    for tokens in range(3, 6):  # a new shape each time, so that no call is bound
        x = torch.randn(tokens, 24)
        expected = plain(x)
        seen.clear()
        torch.testing.assert_close(joined(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == [32, 32]
    assert type(joined[0].q_proj) is FP8Linear


def test_none_agree() -> None:
    plain, joined = fused()
    plain[0].given = joined[0].given = lambda x: (x, x + 1, x + 2)
    for _ in range(3):
        x = torch.randn(3, 24)
        torch.testing.assert_close(joined(x), plain(x))
    assert not any(isinstance(layer, SiblingLinear) for layer in joined.modules())


def test_inference_tensors_need_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    for promise, last in ((False, [32, 16, 16]), (True, [64])):
        plain, joined = fused(share_in_inference_mode=promise)
        with torch.inference_mode(), monkeypatch.context() as patch:
            seen = products(joined, patch)
            for tokens in range(3, 6):
                x = torch.randn(tokens, 24)
                seen.clear()
                y = joined(x)
                ran = list(seen)
                torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
            assert ran == last


def test_other_weights_are_joined_anew() -> None:
    plain, joined = fused()
    for _ in range(2):
        joined(torch.randn(3, 24))
    w = torch.randn(16, 24)
    for model in (plain, joined):
        model[0].k_proj.weight = nn.Parameter(w.clone())
        model[0].q_proj.bias.data.add_(1)
        model[0].v_proj.bias.add_(3)
    for _ in range(2):
        x = torch.randn(3, 24)
        torch.testing.assert_close(joined(x), plain(x), rtol=1e-5, atol=1e-5)


def test_parts_do_not_outlive_their_tensor() -> None:
    _, joined = fused()
    for _ in range(2):
        joined(torch.randn(3, 24))
    x = torch.randn(3, 24)
    joined[0].q_proj(x)
    group = joined[0].q_proj._place[0]
    assert group.waiting is not None
    del x
    gc.collect()
    assert group.waiting is None


def test_gradients() -> None:
    plain, joined = fused()
    for model in (plain, joined):
        model[0].q_proj.bias.requires_grad_(True)
    grads = []
    for model in (plain, joined):
        for _ in range(2):
            x = torch.ones(3, 24, requires_grad=True)
            model.zero_grad()
            model(x).square().sum().backward()
        grads.append((x.grad, model[0].q_proj.bias.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_stand_alone() -> None:
    plain, joined = fused()
    joined[0].given = plain[0].given = _same
    for _ in range(2):
        joined(torch.randn(3, 24))
    for twin in (copy.deepcopy(joined), pickle.loads(pickle.dumps(joined))):
        group = twin[0].q_proj._place[0]
        assert group.members == [twin[0].q_proj, twin[0].k_proj, twin[0].v_proj]
        for _ in range(3):
            x = torch.randn(3, 24)
            torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-5)
        assert group.joined is not None


def test_state_dict_is_as_before() -> None:
    plain, joined = fused()
    for _ in range(2):
        joined(torch.randn(3, 24))
    ours, theirs = plain.state_dict(), joined.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert theirs[name].view(torch.uint8).equal(value.view(torch.uint8)), name


def test_undo() -> None:
    model = nn.Sequential(Attention()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="keep"))
    fuse_siblings(model)
    for _ in range(2):
        model(torch.randn(3, 24))
    disable_fp8_gemm(model)
    assert type(model[0].q_proj) is nn.Linear
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model(torch.randn(3, 24))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "k_proj", nn.Linear(20, 16)), "in_features differs: 24, 20, 24"),
        (lambda model: model.k_proj.half(), "compute_dtype differs: torch.float32, torch.float16, torch.float32"),
        (lambda model: setattr(model, "k_proj", model.q_proj), "they are one shared module"),
    ],
)
def test_refusals_say_why(change: Callable[[nn.Module], object], reason: str) -> None:
    model = Attention()
    change(model)
    enable_fp8_gemm(model)
    found = fuse_siblings(model)
    assert found.groups == ()
    assert list(found.refused.values()) == [reason]


def test_blocks_must_not_straddle() -> None:
    model = Attention()
    enable_fp8_gemm(model, options=FP8GemmOptions(scheme="block"))
    assert list(fuse_siblings(model).refused.values()) == ["blocks of 128 rows would span two layers"]
    model = Attention(sizes=(128, 128, 16))
    enable_fp8_gemm(model, options=FP8GemmOptions(scheme="block"))
    assert len(fuse_siblings(model).groups) == 1


def test_fusing_twice_changes_nothing() -> None:
    _, joined = fused()
    assert fuse_siblings(joined).groups == ()


def test_warmup_runs_each_kind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 8, bias=False))
    enable_fp8_gemm(model, options=FP8GemmOptions(materialize_fp8_on_wrap=False))
    seen = products(model, monkeypatch)
    assert warmup(model, tokens=[4, 1, 4]) == 4
    assert seen == [16, 16, 8, 8]
    assert all(layer.materialized for layer in model)
    with pytest.raises(ValueError, match="tokens must be at least 1, found 0"):
        warmup(model, tokens=[0])


@pytest.mark.parametrize("called", [False, True])
def test_warmup_runs_fused_products(monkeypatch: pytest.MonkeyPatch, called: bool) -> None:
    """Also before the first pass has shown that the siblings receive the same tensor."""
    block = nn.ModuleDict({name: nn.Linear(16, n) for name, n in (("q_proj", 32), ("k_proj", 8), ("v_proj", 8))})
    fuse_siblings(enable_fp8_gemm(block))
    if called:
        x = torch.randn(2, 16)
        for _ in range(2):
            for layer in block.values():
                layer(x)
    seen = products(block, monkeypatch)
    assert warmup(block, tokens=[4]) == 3
    assert sorted(seen) == [8, 32, 48]


def test_warmup_joins_each_kind_of_siblings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(16, n) for name, n in (("q_proj", size), ("k_proj", 8))})
        for size in (32, 32, 20)
    )
    fuse_siblings(enable_fp8_gemm(blocks))
    joined: list[int] = []
    monkeypatch.setattr(warmup_module, "join", lambda members: joined.append(members[0].out_features) or join(members))
    assert warmup(blocks, tokens=[4]) == 5
    assert joined == [32, 20]


def test_tied_weights_stay_tied() -> None:
    """A weight that is tied to another layer is not moved into a fused one."""
    model = nn.ModuleList(nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "k_proj")}) for _ in range(2))
    model[1]["q_proj"].weight = model[0]["q_proj"].weight
    found = fuse_siblings(enable_fp8_gemm(model))
    assert not found.groups
    assert set(found.refused.values()) == {"the weight of one is tied to another layer's"}
    assert model[1]["q_proj"].weight is model[0]["q_proj"].weight
