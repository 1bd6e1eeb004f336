"""Bound calls: whatever changes between two calls of the same shape, the result is that of an unbound call."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fp8gemm import FP8GemmOptions, FP8Linear, disable_fp8_gemm, enable_fp8_gemm
from fp8gemm.engines import ENGINES, Engine, PackedWeight
from fp8gemm.engines.reference import ReferenceEngine
from fp8gemm.weights import Activity, bound
from fp8gemm.weights.activity import KEPT_KERNEL
from fp8gemm.weights.bound import SHAPES, UNBOUND, Bound

BF16 = torch.bfloat16


class Binding(ReferenceEngine):
    """The reference engine, which counts bound calls as the compiled kernels and Triton do, on every machine."""

    name = "reference"

    def __init__(self) -> None:
        self.bound = 0

    def bind(self, x, weight, bias, out_dtype):
        fixed = (weight, bias, out_dtype, tuple(x.shape))

        def run(given: torch.Tensor) -> torch.Tensor:
            self.bound += 1
            assert tuple(given.shape) == fixed[3]
            assert given.is_contiguous()
            y = self.linear(given.reshape(-1, given.shape[-1]), *fixed[:3])
            return y.view(*given.shape[:-1], weight.n)

        return run


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Binding:
    binding = Binding()
    monkeypatch.setattr(bound, "ENGINES", {**ENGINES, "reference": binding})
    return binding


def layer_of(k: int = 64, n: int = 48, *, dtype: torch.dtype = BF16, bias: bool = True, **options: object) -> FP8Linear:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
    return FP8Linear.from_linear(linear, FP8GemmOptions(engine="reference", **options))  # type: ignore[arg-type]


def long_way(layer: FP8Linear, x: torch.Tensor) -> torch.Tensor:
    return layer._run(x, layer.weight, layer.bias)


def test_the_third_call_is_short_and_the_same(engine: Binding) -> None:
    layer = layer_of()
    for shape in ((64,), (3, 64), (2, 5, 64), (1, 1, 1, 64)):
        before = engine.bound
        for _ in range(4):
            x = torch.randn(shape, dtype=BF16)
            assert layer(x).equal(long_way(layer, x))
        assert engine.bound == before + 2
    assert layer.activity.calls == 4 * 4 * 2


def _replace_bias(layer: FP8Linear) -> None:
    layer.bias = nn.Parameter(torch.randn(48, dtype=BF16), requires_grad=False)


def _move_bias(layer: FP8Linear) -> None:
    assert layer.bias is not None
    layer.bias.data = torch.randn(48, dtype=BF16)


def _drop_bias(layer: FP8Linear) -> None:
    layer.bias = None


def _plain_bias(layer: FP8Linear) -> None:
    del layer.bias
    layer.bias = torch.randn(48, dtype=BF16)


def _write_bias(layer: FP8Linear) -> None:
    assert layer.bias is not None
    layer.bias.fill_(3)


def _write_kept(layer: FP8Linear) -> None:
    assert layer.original_weight is not None
    layer.original_weight.mul_(-2)


def _replace_weight(layer: FP8Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(48, 64, dtype=BF16), requires_grad=False)


def _load(layer: FP8Linear) -> None:
    other = layer_of()
    layer.load_state_dict(other.state_dict())


def _move_weight(layer: FP8Linear) -> None:
    """Replaces the memory of the same parameter, as offloading hooks do."""
    layer.weight.data = layer_of().weight.data


def _write_weight(layer: FP8Linear) -> None:
    layer.weight[3:7].mul_(2)


def _write_data(layer: FP8Linear) -> None:
    layer.weight.data.view(-1)[100:300] = 1


def _assign_by_key(layer: FP8Linear) -> None:
    layer._parameters["weight"] = layer_of().weight


def _invalidate(layer: FP8Linear) -> None:
    layer.invalidate_weight_cache()


CHANGES: list[Callable[[FP8Linear], None]] = [
    _replace_bias,
    _move_bias,
    _drop_bias,
    _plain_bias,
    _write_bias,
    _write_kept,
    _replace_weight,
    _load,
    _move_weight,
    _write_weight,
    _write_data,
    _assign_by_key,
    _invalidate,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_every_change_is_noticed(change: Callable[[FP8Linear], None], engine: Binding) -> None:
    layer = layer_of(fp16_weight_storage="keep" if change is _write_kept else "discard")
    x = torch.randn(3, 64, dtype=BF16)
    before = [layer(x) for _ in range(3)][-1]
    assert engine.bound == 1
    change(layer)
    after = layer(x)
    assert after.equal(long_way(layer, x))
    assert after.equal(before) == (change is _invalidate)
    for _ in range(3):
        assert layer(x).equal(after)


@torch.no_grad()
def test_a_moved_bias_is_bound_again(engine: Binding) -> None:
    """Casts the layer at every call, as layerwise casting does."""
    layer = layer_of()
    x = torch.randn(3, 64, dtype=BF16)
    for _ in range(3):
        layer(x)
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.clone()
    layer(x)
    before = engine.bound
    assert layer(x).equal(long_way(layer, x))
    assert engine.bound == before + 1


def test_inputs_that_need_more_go_the_long_way(engine: Binding) -> None:
    layer = layer_of()
    x = torch.randn(4, 64, dtype=BF16)
    for _ in range(3):
        layer(x)
    assert engine.bound == 1
    across = torch.randn(64, 4, dtype=BF16).t()
    shifted = torch.empty(4 * 64 + 1, dtype=BF16)[1:].view(4, 64).copy_(x)
    for other in (across, shifted):
        assert layer(other).equal(long_way(layer, other))
    needs = x.clone().requires_grad_()
    layer(needs).sum().backward()
    assert needs.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(long_way(layer, x))
    assert engine.bound == 1
    assert layer(torch.randn(4, 64)).dtype == torch.float32  # cast, as ever
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        layer(torch.randn(4, 63, dtype=BF16))


def test_a_trained_bias_gets_its_gradient(engine: Binding) -> None:
    layer = layer_of()
    assert layer.bias is not None
    x = torch.randn(4, 64, dtype=BF16)
    for _ in range(3):
        layer(x)
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.bias.grad is not None
    assert layer.bias.grad.eq(4).all()


def test_forward_mode_derivatives_are_not_lost(engine: Binding) -> None:
    layer = layer_of(dtype=torch.float32)
    x, along = torch.randn(4, 64), torch.randn(4, 64)
    for _ in range(3):
        layer(x)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, along)))
    torch.testing.assert_close(y, layer(x))
    expected = along @ layer.weight.dequantize().T
    assert (tangent - expected).norm() < 0.06 * expected.norm()  # the tangent is rounded as any input
    assert layer(x).equal(long_way(layer, x))


def test_casting_the_layer_casts_its_calls(engine: Binding) -> None:
    layer = layer_of()
    x = torch.randn(4, 64, dtype=BF16)
    for _ in range(3):
        layer(x)
    layer.float()
    for _ in range(3):
        assert layer(x).dtype == BF16
        assert layer(x).equal(long_way(layer, x))
    assert layer(x.float()).dtype == torch.float32
    assert engine.bound == 1


def test_copies_and_pickles_bind_anew(engine: Binding) -> None:
    layer = layer_of()
    x = torch.randn(4, 64, dtype=BF16)
    expected = [layer(x) for _ in range(3)][-1]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._bound == {}
        assert twin(x).equal(expected)
    other = copy.copy(layer)  # a replica: its own parameters
    other._parameters = {name: None if p is None else copy.deepcopy(p) for name, p in layer._parameters.items()}
    before = engine.bound
    assert other(x).equal(expected)
    assert engine.bound == before


def test_functional_call_uses_the_bias_it_is_given(engine: Binding) -> None:
    layer = layer_of()
    x = torch.randn(4, 64, dtype=BF16)
    for _ in range(3):
        layer(x)
    zero = torch.func.functional_call(layer, {"bias": torch.zeros(48, dtype=BF16)}, (x,))
    assert zero.equal(layer._run(x, layer.weight, None))


def test_only_so_many_shapes_stay_bound(engine: Binding) -> None:
    layer = layer_of()
    for m in range(1, 3 * SHAPES):
        for _ in range(2):
            layer(torch.randn(m, 64, dtype=BF16))
        assert len(layer._bound) <= SHAPES


def test_an_engine_that_cannot_bind_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Plain(ReferenceEngine):
        def bind(self, x, weight, bias, out_dtype):
            asked.append(x.shape)

    monkeypatch.setattr(bound, "ENGINES", {**ENGINES, "reference": Plain()})
    layer = layer_of()
    x = torch.randn(2, 64, dtype=BF16)
    for _ in range(5):
        assert layer(x).equal(long_way(layer, x))
    assert asked == [x.shape]
    assert list(layer._bound.values()) == [UNBOUND]


def test_reverting_leaves_no_trace(engine: Binding) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    enable_fp8_gemm(model, options=FP8GemmOptions(engine="reference"))
    x = torch.randn(2, 64)
    for _ in range(3):
        model(x)
    disable_fp8_gemm(model)
    assert type(model[0]) is nn.Linear
    assert "_bound" not in vars(model[0])


@torch.no_grad()
def test_threads_share_a_bound_call() -> None:
    """With the compiled kernels, if available: concurrent calls do not mix up their operands."""
    linear = nn.Linear(256, 128, dtype=BF16)
    layer = FP8Linear.from_linear(linear)
    xs = [torch.randn(2, 256, dtype=BF16) for _ in range(4)]
    expected = [long_way(layer, x) for x in xs]
    for _ in range(3):
        layer(xs[0])
    wrong: list[int] = []
    start = threading.Barrier(len(xs))

    def run(index: int) -> None:
        start.wait()
        for _ in range(200):
            if not layer(xs[index]).equal(expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["row", "tensor", "block"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_the_cpu_engine_binds_bit_for_bit(dtype: torch.dtype, scheme: str) -> None:
    layer = FP8Linear.from_linear(
        nn.Linear(200, 130, dtype=dtype),
        FP8GemmOptions(engine="cpu", scheme=scheme),  # type: ignore[arg-type]
    )
    compiled = "native" in ENGINES["cpu"].kernel(1, layer.form(layer.device), dtype)
    for shape in ((200,), (1, 200), (2, 17, 200), (70, 200)):
        for _ in range(3):
            x = torch.randn(shape, dtype=dtype)
            assert layer(x).equal(long_way(layer, x))
    assert any(isinstance(bound, Bound) for bound in layer._bound.values()) == compiled


class Losing(Binding):
    """As if FP8 were slower than a kept weight from five tokens on."""

    def loses(self, m: int, weight: PackedWeight, dtype: torch.dtype) -> bool:
        return m >= 5


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Engine:
    from fp8gemm.weights import linear

    engines = {**ENGINES, "reference": Losing()}
    monkeypatch.setattr(bound, "ENGINES", engines)
    monkeypatch.setattr(linear, "ENGINES", engines)
    return engines["reference"]


@pytest.mark.parametrize("storage", ["keep", "cpu_offload", "discard"])
def test_a_kept_weight_where_fp8_loses(storage: str, losing: Engine) -> None:
    """It runs in place of FP8 if it is on the input's device, bound or not, and appears in the report; else FP8
    runs."""
    linear = nn.Linear(64, 48, dtype=BF16).requires_grad_(False)
    layer = FP8Linear.from_linear(linear, FP8GemmOptions(engine="reference", fp16_weight_storage=storage))  # type: ignore[arg-type]
    for m in (4, 5):
        layer.home.activity = Activity()
        x = torch.randn(m, 64, dtype=BF16)
        # an original that was offloaded to the CPU is on the device of a CPU input
        kept = m >= 5 and storage != "discard"
        for _ in range(4):
            assert layer(x).equal(linear(x)) == kept
        assert (KEPT_KERNEL in layer.activity.kernels) == kept
        assert sum(layer.activity.kernels.values()) == 4
    x = torch.randn(6, 64, dtype=BF16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.original_weight is None or layer.original_weight.grad is None


def test_a_kept_weight_of_another_dtype_is_not_used(losing: Engine) -> None:
    layer = layer_of()
    x = torch.randn(6, 64)
    layer(x)
    assert KEPT_KERNEL not in layer.activity.kernels
