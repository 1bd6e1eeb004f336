"""Every kind of module that owns matrices: how they are planned, and that products are correct and on FP8."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from fp8gemm import FP8GemmOptions, FP8Weight, disable_fp8_gemm, enable_fp8_gemm, plan, report
from fp8gemm.models.first_forward import FirstForward
from fp8gemm.models.owners import CONVOLUTIONS, UNSEEN, role_of
from fp8gemm.models.reading import uses
from fp8gemm.weights.products import MOST_GROUPS


def seeded(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


class Turned(nn.Module):
    """Conv1D, as in GPT-2."""

    def __init__(self, k: int = 32, n: int = 48) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(seeded(k, n)), nn.Parameter(seeded(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.weight.shape[1])


class Transposing(nn.Linear):
    """A Linear with its own forward, as in Falcon."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Packed(nn.Module):
    """Row ranges of one weight for queries, keys and values, accessed by an alias and by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(seeded(96, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv.chunk(3)
        return self.mix(x) + F.linear(x, q) * torch.matmul(x, k.t()) + torch.einsum("btk,nk->btn", x, v)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qkv[:32].mT


class Experts(nn.Module):
    """A stack whose matrices are used one after the other in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(seeded(3, 16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, self.weight[i]) for i in range(3)], dim=-1)


class Biased(nn.Module):
    """A stack of square blocks with biases, as the gates of RecurrentGemma."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.bias = nn.Parameter(seeded(2, 16, 16)), nn.Parameter(seeded(2, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, 2, 16).transpose(0, 1)
        y = torch.baddbmm(self.bias[:, None, :], x, self.gate)
        return y + torch.baddbmm(self.bias[:, None, :], x, self.gate, beta=0.5, alpha=2)


class Flat(nn.Module):
    """Experts concatenated in matrices, as in DBRX."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.width = 4, 24
        self.w1, self.w2 = nn.Parameter(seeded(96, 32)), nn.Parameter(seeded(96, 32) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for expert in range(4):
            up, down = (w.view(4, 24, 32)[expert] for w in (self.w1, self.w2))
            x = x + F.silu(x @ up.T) @ down / 8
        return x


class Grouped(nn.Linear):
    """A block-diagonal weight: groups of rows, each for tokens of its own, as in DeepSeek-V4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight.view(4, -1, x.shape[-1]).transpose(1, 2)
        y = torch.bmm(x.reshape(-1, 4, x.shape[-1]).transpose(0, 1), w).transpose(0, 1)
        rows = self.weight.unflatten(0, (4, -1))
        return (
            y.reshape(*x.shape[:-2], -1)
            + torch.einsum("btgk,gnk->btgn", x, rows).flatten(2)
            + F.linear(x, rows[1]).flatten(2)
        )


class Sideways(nn.Module):
    """The weight as the left factor, as when mixing along time; and inputs that are not contiguous rows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(seeded(24, 5)), nn.Parameter(seeded(24, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.left @ x  # [24, 5] @ [2, 5, 32]
        y = x.transpose(0, 1) @ self.right.T
        return (
            mixed @ self.right.mT
            + torch.einsum("nk,btk->btn", self.right, mixed)
            + y.mean()
            + (torch.einsum("nk,btk->bnt", self.right, x) @ torch.ones(5, 24))
        )


class Headed(nn.Module):
    """Projections with a separate dimension for heads, as in XLNet."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Parameter(seeded(32, 4, 16)), nn.Parameter(seeded(24, 4, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ibnd,hnd->ibh", torch.einsum("ibh,hnd->ibnd", x, self.q), self.o)


class Head(nn.Conv1d):
    """A convolution over tokens, as in Parakeet's CTC head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Standardized(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, self.weight - self.weight.mean(), self.bias)


class Rescaled(nn.Conv1d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return F.conv1d(x, weight * 2, bias)


class Borrowed(nn.Module):
    """The weight of a Linear used as that of a 1x1 convolution, as in DETR's segmentation heads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.linear.weight.unsqueeze(-1).unsqueeze(-1), self.linear.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 8


class TiedScaled(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Scaled(40, 32)
        self.head.weight = self.embed.weight


class Bare(nn.Module):
    """Parameters whose use is not visible in the code of their own module."""

    def __init__(self) -> None:
        super().__init__()
        weights = {
            "up": seeded(64, 32),
            "down": seeded(64, 32),
            "grouped": seeded(3, 32, 32) / 4,
            "added": seeded(5, 32),
        }
        self.weights = nn.ParameterDict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.weights
        x = F.gelu(x @ p["up"].T) @ p["down"] + p["added"]
        return torch.bmm(x.expand(3, *x.shape), p["grouped"]).sum(0)


X = seeded(2, 5, 32)
IDS = torch.arange(7).view(1, 7) * 5
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
    "turned": (Turned, (X,)),
    "transposing": (lambda: Transposing(32, 24), (X,)),
    "doubling": (lambda: Doubling(32, 24), (X,)),
    "packed": (Packed, (X,)),
    "experts": (Experts, (X,)),
    "biased blocks": (Biased, (X,)),
    "flat experts": (Flat, (X[0],)),
    "attention": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), (X, X, X)),
    "cross attention": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), (X, X.flip(1), X.flip(1))),
    "three inputs": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), (X, X.flip(1), X.flip(0))),
    "other widths": (
        lambda: nn.MultiheadAttention(32, 4, kdim=16, vdim=48, batch_first=True),
        (X, seeded(2, 6, 16), seeded(2, 6, 48)),
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (X,)),
    "bilinear": (lambda: nn.Bilinear(20, 32, 12), (seeded(2, 5, 20), X)),
    "1x1": (lambda: nn.Conv2d(32, 24, 1), (seeded(2, 32, 6, 5),)),
    "patches": (lambda: nn.Conv2d(3, 24, 4, stride=4), (seeded(2, 3, 13, 8),)),
    "patches in time": (lambda: nn.Conv3d(2, 24, (1, 4, 2), stride=(1, 4, 2), bias=False), (seeded(2, 2, 3, 8, 6),)),
    "one dimension": (lambda: nn.Conv1d(32, 24, 1), (seeded(2, 32, 9),)),
    "transposed": (lambda: nn.ConvTranspose2d(32, 24, 2, stride=2), (seeded(2, 32, 6, 5),)),
    "transposed in time": (lambda: nn.ConvTranspose1d(32, 24, 4, stride=4, bias=False), (seeded(2, 32, 6),)),
    "transposed 1x1": (lambda: nn.ConvTranspose3d(32, 24, 1), (seeded(2, 32, 2, 3, 4),)),
    "grouped rows": (lambda: Grouped(32, 96, bias=False), (seeded(2, 5, 4, 32),)),
    "sideways": (Sideways, (X,)),
    "around": (lambda: Head(32, 24, 1), (X,)),
    "heads": (Headed, (X,)),
    "borrowed": (Borrowed, (seeded(2, 32, 6, 5),)),
    "tied": (Tied, (IDS,)),
    "tied and scaled": (TiedScaled, (IDS,)),
}


def first(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def against_its_own_weights(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """The model's output is that of its dequantized weights."""
    dense, _ = disable_fp8_gemm(copy.deepcopy(model))
    assert not any(isinstance(parameter, FP8Weight) for parameter in dense.parameters())
    found, expected = first(model(*inputs)), first(dense(*inputs))
    assert found.shape == expected.shape
    if type(model) in CONVOLUTIONS:
        assert found.is_contiguous() == expected.is_contiguous()
    # Both sum in float32 in different orders: at most K = 96 terms per row, and up to eight consecutive products.
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", ["row", "block", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_all_products_run_on_fp8(name: str, scheme: str) -> None:
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        before = first(model(*inputs))
        enable_fp8_gemm(model, options=FP8GemmOptions(scheme=scheme))  # type: ignore[arg-type]
        after = first(model(*inputs))
        assert 0 < (after - before).norm() / before.norm() < 0.1
        against_its_own_weights(model, inputs)
    found = report(model)
    assert not found.kept
    assert found.coverage is not None
    assert found.coverage.share == 1
    assert not found.coverage.dequantized
    assert all(row.dequantizations == 0 for row in found.rows)
    found.check(coverage=1.0)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_inputs(name: str) -> None:
    make, inputs = CASES[name]
    if not inputs[0].is_floating_point():
        return  # token ids
    torch.manual_seed(0)
    model = enable_fp8_gemm(make().eval())
    dense, _ = disable_fp8_gemm(copy.deepcopy(model))
    grads = []
    for one in (model, dense):
        x = inputs[0].clone().requires_grad_()
        y = first(one(x, *inputs[1:]))
        (y * seeded(*y.shape)).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


@pytest.mark.parametrize("storage", ["keep", "discard"])
@pytest.mark.parametrize("name", CASES)
def test_state_dicts_copies_and_undo(name: str, storage: str) -> None:
    make, inputs = CASES[name]
    torch.manual_seed(0)
    plain = make().eval()
    options = FP8GemmOptions(fp16_weight_storage=storage)  # type: ignore[arg-type]
    model = enable_fp8_gemm(plain, options=options, inplace=False)
    other = enable_fp8_gemm(make().eval(), options=options)
    with torch.no_grad():
        expected = first(model(*inputs))
        other.load_state_dict(model.state_dict())
        assert torch.equal(first(other(*inputs)), expected)
        assert torch.equal(first(copy.deepcopy(model)(*inputs)), expected)
        assert torch.equal(first(pickle.loads(pickle.dumps(model))(*inputs)), expected)
        dense = make().eval()
        dense.load_state_dict(plain.state_dict())
        other.load_state_dict(dense.state_dict())  # dense values are quantized
        assert torch.equal(first(other(*inputs)), expected)
    undone, _ = disable_fp8_gemm(model)
    assert [type(module) for module in undone.modules()] == [type(module) for module in plain.modules()]
    for (key, value), (wanted, there) in zip(undone.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == wanted
        assert value.shape == there.shape
        if storage == "keep":
            assert torch.equal(value, there)
    assert len({id(parameter) for parameter in undone.parameters()}) == len(list(plain.parameters()))


def test_what_does_more_than_multiply_stays_dense_with_its_reason() -> None:
    class Equalized(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(input, self.weight * 0.5, self.bias)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(seeded(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight @ self.weight.T

    model = nn.ModuleDict(
        {
            "equalized": Equalized(32, 32),
            "both": Both(),
            "overlapping": nn.Conv2d(4, 8, 3),
            "padded": nn.Conv2d(4, 8, 1, padding=1),
            "groups": nn.Conv2d(4, 8, 1, groups=2),
            "standardized": Standardized(4, 8, 1),
            "rescaled": Rescaled(4, 8, 1),
            "spread": nn.ConvTranspose2d(4, 8, 3, stride=2),
            "lengthened": nn.ConvTranspose2d(4, 8, 2, stride=2, output_padding=1),
            "recurrent": nn.LSTM(8, 8),
            "plain": nn.Linear(8, 8),
            "positions": nn.Embedding(9, 32),
        }
    )
    enable_fp8_gemm(model)
    reasons = {row.name: row.reason for row in report(model).kept}
    assert reasons.pop("equalized") == "Equalized does more than multiply by it: self.weight * 0.5"
    assert "by its transpose" in reasons.pop("both")
    for name in ("overlapping", "padded", "groups", "standardized", "rescaled", "spread", "lengthened"):
        assert (
            "convolution, whose windows overlap or which has groups, padding, dilation or another forward"
            in reasons.pop(name)
        )
    assert reasons.keys() == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}
    assert [row.name for row in report(model).converted] == ["plain"]


def test_the_source_is_read_not_guessed() -> None:
    """Aliases, conditions, methods and unknown calls."""

    class Many(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.a is not None and x.dtype == self.a.dtype:
                w = self.a.to(x.dtype)
                x = F.linear(input=x, weight=w, bias=None)
            y = torch.addmm(self.bias, x, self.b)
            self.helper(self.c)
            z = [self.d[i] for i in range(3)]
            e = getattr(self, "e")  # noqa: B009
            y = y + self.h.view(3, -1, 8)[0] @ self.i.unflatten(0, (3, -1))[1] + self.i.view(8, 8)
            y = y + torch.einsum("bk,ckn->bcn", y, self.j).sum(1) + torch.einsum("bk,knm->bnm", y, self.k).sum(1)
            return torch.einsum("bk,kn->bn", y, e) @ z[0] + self.f @ self.b

        def helper(self, w: torch.Tensor) -> None:
            self.g.add_(1)

    assert uses(Many, "a").straight == 1
    assert uses(Many, "b").turned == 2
    assert uses(Many, "b").others == []
    assert uses(Many, "c").others == ["self.helper(self.c)"]
    assert uses(Many, "d").others
    assert uses(Many, "e").turned == 1
    assert uses(Many, "f").straight == 1
    assert uses(Many, "h").others == []
    assert uses(Many, "h").straight == 1
    assert len(uses(Many, "i").others) == 2  # a sum over some rows; a view of two dimensions
    assert uses(Many, "j").others
    assert (uses(Many, "k").turned, uses(Many, "k").folded) == (1, 1)
    assert uses(Many, "g").others == ["self.g.add_(1)"]
    assert uses(Many, "absent").products == 0
    scope: dict[str, Any] = {"nn": nn}
    exec("class Unread(nn.Module):\n    def forward(self, x):\n        return x @ self.weight", scope)
    assert uses(scope["Unread"], "weight") is None
    unread = scope["Unread"]()
    unread.weight = nn.Parameter(seeded(16, 16))
    assert "cannot be read" in role_of(unread, "weight").reason


class Spelled(nn.Module):
    """Products as people spell them, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("matmul", "mm", "addmm", "method"):
            setattr(self, name, nn.Parameter(seeded(16, 24) * 0.1, requires_grad=False))
        for name in ("out", "place", "pair", "turned", "aten"):
            setattr(self, name, nn.Parameter(seeded(24, 16) * 0.1, requires_grad=False))
        self.bias = nn.Parameter(torch.zeros(24, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(input=x, other=self.matmul) + torch.mm(x, mat2=self.mm)
        y = y + torch.addmm(input=self.bias, mat1=x, mat2=self.addmm) + x.matmul(other=self.method)
        room = torch.empty(x.shape[0], 24, dtype=x.dtype)
        y = y + torch.addmm(self.bias, x, self.out.t(), out=room)
        y = y.addmm_(x, self.place.T)
        w, bias = self.pair, self.bias
        return y + F.linear(x, w, bias) + x @ torch.transpose(self.turned, 0, 1) + torch.ops.aten.linear(x, self.aten)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, x) * 2


class InParts(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, w) for w in self.weight.chunk(2) if len(w)], dim=-1) + self.bias


class Summed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(w for w in self.weight.chunk(1)) @ x[0]


class Normed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, x) + self.weight.norm()


def test_calls_of_a_base_by_its_name_and_comprehensions_are_followed() -> None:
    model = nn.ModuleDict({kind.__name__: kind(16, 24) for kind in (Doubled, InParts, Summed, Normed)})
    dense = copy.deepcopy(model)
    enable_fp8_gemm(model)
    found = {row.name: row for row in report(model).converted}
    assert found.keys() == {"Doubled", "InParts"}
    assert {row.name for row in report(model).kept} == {"Summed", "Normed"}
    x = seeded(5, 16)
    for name in found:
        y, wanted = model[name](x), dense[name](x)
        assert 0 < (y - wanted).norm() / wanted.norm() < 0.1
    assert [(row.calls, row.dequantizations) for row in report(model).converted] == [(1, 0), (2, 0)]


def test_products_however_they_are_spelled() -> None:
    model = Spelled()
    names = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    observed = enable_fp8_gemm(copy.deepcopy(model), example_inputs=X[0][:5, :16])
    enable_fp8_gemm(model)
    for patched in (model, observed):
        assert {row.name for row in report(patched).converted} == names
        patched(X[0][:5, :16])
        found = report(patched)
        found.check(coverage=1.0)
        assert found.coverage.total == 5 * 9 * 16 * 24
        assert all(row.calls == 1 and not row.dequantizations for row in found.converted)


def test_bare_parameters_are_watched_not_guessed() -> None:
    model = Bare().eval()
    with pytest.raises(ValueError, match=r"nothing to convert.*example_inputs"):
        enable_fp8_gemm(model)
    assert {step.name: step.reason for step in plan_of(model)}["weights.up"] == UNSEEN
    plain = copy.deepcopy(model)
    enable_fp8_gemm(model, example_inputs=X[0])
    names = {name for name, parameter in model.named_parameters() if isinstance(parameter, FP8Weight)}
    assert names == {"weights.up", "weights.down", "weights.grouped"}
    with torch.no_grad():
        before, after = plain(X[0]), model(X[0])
        assert 0 < (after - before).norm() / before.norm() < 0.1
        against_its_own_weights(model, (X[0],))
    report(model).check(coverage=1.0)


def plan_of(model: nn.Module) -> list[Any]:
    with pytest.warns(UserWarning, match="nothing to convert"):
        return plan(model, options=FP8GemmOptions(strict=False))


def observing(model: nn.Module) -> bool:
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    return any(isinstance(getattr(hook, "__self__", None), FirstForward) for hook in hooks)


@pytest.mark.parametrize("copied", [False, True])
def test_the_first_call_can_be_what_is_watched(copied: bool) -> None:
    model = enable_fp8_gemm(
        Bare().eval(), example_inputs="first call", module_filter=lambda name, module: "grouped" not in name
    )
    if copied:
        model = copy.deepcopy(model)
    assert not any(isinstance(parameter, FP8Weight) for parameter in model.parameters())
    with torch.no_grad():
        expected = Bare()(X[0])
        assert torch.equal(model(X[0]), expected)  # not converted yet
        assert sum(isinstance(parameter, FP8Weight) for parameter in model.parameters()) == 2
        with pytest.raises(ValueError, match="no forward pass was seen yet"):
            report(model).check(coverage=0.0)  # on FP8
        assert 0 < (model(X[0]) - expected).norm() / expected.norm() < 0.1
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.dense.keys() == {"weights.grouped"}
    assert not observing(model)


def test_watching_leaves_no_trace() -> None:
    class Noisy(Bare):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise AssertionError("batch statistics would have changed")
            return super().forward(F.dropout(x)) + torch.rand(())

    model = Noisy().train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    enable_fp8_gemm(model, example_inputs={"x": X[0]})
    assert torch.equal(torch.rand(4), expected)
    assert all(module.training for module in model.modules())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        enable_fp8_gemm(Bare(), example_inputs=())


def test_the_report_says_what_ran_dense() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Conv1d(2, 2, 3, padding=1), nn.LSTM(32, 16))
    enable_fp8_gemm(model, module_filter="!1").eval()
    with pytest.raises(ValueError, match="no forward pass was seen yet"):
        report(model).check()
    assert report(model).rows[0].share is None
    model(seeded(4, 2, 32))
    found = report(model)
    counts = {"0.weight": 8 * 32 * 32, "1.weight": 8 * 32 * 32, "2.weight": 4 * 2 * 32 * 6}
    counts |= {"3.weight_ih_l0": 8 * 64 * 32, "3.weight_hh_l0": 8 * 64 * 16}
    assert found.coverage is not None
    assert found.coverage.fp8 == {"0.weight": counts.pop("0.weight")}
    assert found.coverage.total == found.coverage.fp8["0.weight"] + sum(counts.values())
    with pytest.raises(ValueError, match=r"asked for 99.00 %") as caught:
        found.check()
    assert "1.weight" in str(caught.value)
    assert "module_filter: !1" in str(caught.value)
    assert "recurrent kernels" in str(caught.value)
    assert str(found).endswith(str(found.coverage))
    assert abs(sum(row.share or 0 for row in found.rows) - 1) < 1e-6
    found.check(coverage=0.1)


def test_products_that_are_dequantized_count_as_such() -> None:
    class Sideways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) @ self.linear.weight  # contracts N, along which the scales vary

    model = enable_fp8_gemm(Sideways())
    model(X)
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.share == 0.5
    assert coverage.dequantized == {"linear.weight": 10 * 32 * 32}
    with pytest.raises(ValueError, match="dequantized at each call"):
        report(model).check()


def test_products_by_values_made_of_a_weight_count_as_dequantized() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.other = nn.Linear(32, 32, bias=False), nn.Parameter(torch.ones(8, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                F.linear(x, self.linear.weight * 0.5)
                + F.linear(x, torch.cat([self.linear.weight, self.other]))[..., 8:]
            )

    model = enable_fp8_gemm(Halved())
    model(X)
    coverage = report(model).coverage
    assert coverage is not None
    assert not coverage.fp8
    assert coverage.dequantized == {"linear.weight": 10 * 32 * (32 + 40)}


def test_more_groups_of_rows_than_one_by_one_would_pay_are_dequantized() -> None:
    class Many(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.weight.view(MOST_GROUPS + 1, -1, x.shape[-1]).transpose(1, 2))

    model = enable_fp8_gemm(Many(16, 2 * (MOST_GROUPS + 1), bias=False))
    x = seeded(MOST_GROUPS + 1, 3, 16)
    with torch.no_grad():
        against_its_own_weights(model, (x,))
    assert report(model).rows[0].dequantizations


def test_compiled_models_are_compiled_though_their_first_pass_is_watched() -> None:
    counter = CompileCounter()
    inner = torch.compile(lambda x: x.sin() + 1, backend=counter)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner(self.linear(x))

    model = enable_fp8_gemm(Model().eval())
    with torch.no_grad():
        model(X)
        assert report(model).coverage is not None
        model(X)
    assert counter.frame_count == 1
    whole = enable_fp8_gemm(nn.Sequential(nn.Linear(32, 32)).eval())
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        assert report(whole).coverage is None  # the whole model has not been observed
        whole(X)
    assert report(whole).coverage is not None


def test_an_error_in_the_first_pass_leaves_no_mode_behind() -> None:
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(RuntimeError):
        model(seeded(3, 31))
    assert torch._C._len_torch_dispatch_stack() == 0
    model(X)


def test_a_first_pass_left_by_ctrl_c_is_tidied_up_at_the_next() -> None:
    """torch runs no hook for exceptions that are not an Exception."""

    class Interrupted(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return super().forward(x)

    model = enable_fp8_gemm(nn.Sequential(nn.Linear(32, 32), Interrupted(32, 32)))
    with pytest.raises(KeyboardInterrupt):
        model(X)
    with torch.no_grad():
        model(X)
    assert torch._C._len_torch_dispatch_stack() == 0
    report(model).check(coverage=1.0)
    assert not observing(model)


def test_only_one_of_several_threads_is_watched() -> None:
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    left: list[int] = []

    def run() -> None:
        model(X)
        left.append(torch._C._len_torch_dispatch_stack())

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == [0] * 8
    coverage = report(model).coverage
    assert coverage is not None
    assert coverage.fp8 == {"0.weight": 10 * 32 * 32, "1.weight": 10 * 32 * 32}


@pytest.mark.parametrize("scheme", ["row", "block", "tensor"])
def test_embeddings_are_converted_where_that_is_asked(scheme: str) -> None:
    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    model = enable_fp8_gemm(Untied(), options=FP8GemmOptions(scheme=scheme))  # type: ignore[arg-type]
    assert type(model.embed.weight) is nn.Parameter
    options = FP8GemmOptions(scheme=scheme, embeddings=True)  # type: ignore[arg-type]
    model = enable_fp8_gemm(Untied(), options=options)
    assert isinstance(model.embed.weight, FP8Weight)
    assert tuple(model.embed.weight.scaled().scale.shape) == (40, 1)  # a scale per row, whatever the scheme
    expected = model.embed.weight.dequantize()
    before = report(model).rows[0].dequantizations
    assert torch.equal(model.embed(IDS), expected[IDS])
    assert report(model).rows[0].dequantizations == before


def test_ties_stay() -> None:
    model = Tied()
    with pytest.raises(ValueError, match="module_filter"):
        enable_fp8_gemm(model, module_filter="!embed")  # a pattern that excludes any occurrence keeps the weight
    enable_fp8_gemm(model, module_filter="head")
    assert model.head.weight is model.embed.weight
    assert [(row.name, row.ties) for row in report(model).converted] == [("head", ("embed",))]
    with torch.no_grad():
        model.embed.weight[3] = 0.5
        assert torch.equal(model.embed(torch.tensor(3)), torch.full((32,), 0.5))
        assert torch.allclose(model.head(torch.ones(1, 32))[0, 3], torch.tensor(16.0))
    model, _ = disable_fp8_gemm(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight[3], torch.full((32,), 0.5))
