"""Static activation scales: what calibrate finds, that nothing else changes, and that files keep it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp8gemm import (
    FP8GemmOptions,
    FP8Linear,
    UnsupportedError,
    calibrate,
    count_saturation,
    dequantize,
    disable_fp8_gemm,
    enable_fp8_gemm,
    fuse_siblings,
    load_checkpoint,
    quantize,
    report,
    save_checkpoint,
    set_precision,
)
from fp8gemm.scaled import BLOCK_128, TENSOR, Scheme

X = torch.linspace(-2, 3.5, 3 * 64).view(3, 64)  # whose largest magnitude gives a scale of 2**-7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


def patched(scheme: object = "row", engine: str = "reference") -> nn.Sequential:
    return enable_fp8_gemm(network(), options=FP8GemmOptions(scheme=scheme, engine=engine))  # type: ignore[arg-type]


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if key.endswith("input_scale")}


@pytest.mark.parametrize("scheme", ["row", "tensor"])
@torch.no_grad()
def test_the_largest_magnitude_gives_the_scale_and_products_use_it(scheme: str) -> None:
    model = patched(scheme)
    before = {key: tensor.float() for key, tensor in model.state_dict().items()}
    seen: list[torch.Tensor] = []
    handle = model[2].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    found = calibrate(model, [X[:1], X[1:]])
    handle.remove()
    assert [(layer.name, layer.tokens, layer.reason) for layer in found.layers] == [
        ("0", 3, ""),
        ("2", 3, ""),
        ("4", 3, ""),
    ]
    assert (found.layers[0].amax, found.layers[0].scale) == (3.5, 2.0**-7)
    assert found.layers[1].amax == torch.cat(seen).amax().item()
    assert found.layers[1].scale == pytest.approx(found.layers[1].amax / 448, rel=1e-7)
    assert all(layer.used and layer.engine == "reference" for layer in found.layers)
    for key, tensor in model.state_dict().items():
        assert key.endswith("input_scale") or tensor.float().equal(before[key]), key
    layer, x = model[0], torch.randn(5, 64) * 3
    assert (layer.scheme.static, layer.scheme.activation, layer.input_scale.item()) == (True, TENSOR, 2.0**-7)
    rounded = dequantize(quantize(x, TENSOR, scale=torch.tensor(2.0**-7)))
    assert rounded.abs().amax() == 3.5  # beyond it, they saturate
    assert layer(x).equal(F.linear(rounded, dequantize(layer.scaled()), layer.bias))


def test_percentile_and_margin() -> None:
    x = torch.full((1000, 64), 1.0)
    x[0, :3], x[1, 0] = 2.0, 100.0
    layer = enable_fp8_gemm(nn.Linear(64, 8))
    assert calibrate(layer, x).layers[0].amax == 100
    assert calibrate(layer, x, percentile=100).layers[0].amax == 100
    # 4 of 64000 values are above 1: 99.99375 %. The next number of 8 significant bits is added to what has to fit.
    assert calibrate(layer, x, percentile=99.99).layers[0].amax == 1 + 2**-7
    assert calibrate(layer, list(x.split(7)), percentile=99.995).layers[0].amax == 2 + 2**-6
    found = calibrate(layer, x, margin=1.5).layers[0]
    assert (found.amax, found.scale) == (100, torch.tensor(150 / 448).item())
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="margin must be positive and finite"):
            calibrate(layer, x, margin=wrong)
    for wrong in (0, 100.5, float("nan")):
        with pytest.raises(ValueError, match="percentile must be above 0 and at most 100"):
            calibrate(layer, x, percentile=wrong)
    assert layer.input_scale.item() == torch.tensor(150 / 448).item()


class Two(nn.Module):
    """Two layers of which the inputs reach one, experts, and a layer that is given zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.zeros = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(x.expand(4, -1, -1), self.experts.gate_up_proj).sum()
        return self.used(x) + self.zeros(torch.zeros_like(x)) + y


def test_what_stays_dynamic_is_named() -> None:
    model = enable_fp8_gemm(Two())
    found = calibrate(model, torch.ones(2, 32))
    assert [layer.name for layer in found.static] == ["used"]
    assert {layer.name: layer.reason for layer in found.dynamic} == {
        "unused": "no product with it was seen",
        "zeros": "it was given zeros only",
        "experts.gate_up_proj": "a stack of experts has no static scales",
    }
    assert not model.unused.scheme.static
    text = str(found)
    assert "unchanged: it was given zeros only" in text
    assert text.endswith("1 static, 3 dynamic")
    assert found.to_dict()["layers"][0]["shape"] == [32, 32]


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("weight_only", "0: its scheme is weight-only"),
        ("block", "0: its activations have a scale for each group, 1x128"),
    ],
)
def test_schemes_without_static_scales_are_refused(scheme: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"no FP8 weight can have a static activation scale \({reason}"):
        calibrate(patched(scheme), X)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="no FP8 weights to calibrate: call enable_fp8_gemm"):
        calibrate(network(), X)
    with pytest.raises(ValueError, match="calibration_inputs has no batches"):
        calibrate(patched(), [])
    block = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("q_proj", "k_proj", "v_proj")})
    fuse_siblings(enable_fp8_gemm(block))
    with pytest.raises(UnsupportedError, match="q_proj is fused with its siblings"):
        calibrate(block, X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer_and_change_nothing(value: float) -> None:
    model = patched().train()
    calibrate(model, X)
    before = scales(model)
    model[2].bias.data[3] = value
    with pytest.raises(ValueError, match=r"^4: the calibration inputs give it NaN or infinite"):
        calibrate(model, 100 * X.relu())
    assert {key: scale.item() for key, scale in scales(model).items()} == {k: s.item() for k, s in before.items()}
    assert all(module.scheme.static for module in model if isinstance(module, FP8Linear))
    assert all(module.training for module in model.modules())


def test_an_engine_that_refuses_is_told_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8gemm.engines import ENGINES

    model = patched()
    own = ENGINES["reference"].rejects
    refuse = lambda spec, machine: ["no static"] if spec.scheme.static and spec.k == 48 else own(spec, machine)  # noqa: E731
    monkeypatch.setattr(ENGINES["reference"], "rejects", refuse)
    with pytest.raises(UnsupportedError, match=r"^4: (.|\n)*no static"):
        calibrate(model, X)
    assert not scales(model)


@torch.no_grad()
def test_again_with_other_inputs() -> None:
    """The range of the first time does not hide what is beyond it."""
    model, fresh = patched(), patched()
    calibrate(model, X / 100)
    assert calibrate(model, X) == calibrate(fresh, X)
    assert model(X).equal(fresh(X))


def test_an_engine_that_keeps_activations_keeps_the_scale() -> None:
    model = enable_fp8_gemm(network(), options=FP8GemmOptions(engine="cpu"))
    expected = model(X)
    found = calibrate(model, X)
    assert {(layer.used, layer.engine) for layer in found.layers} == {(False, "cpu")}
    assert "static, not quantized here by cpu" in str(found)
    assert model(X).equal(expected)


@torch.no_grad()
def test_bound_calls_notice() -> None:
    model = patched()
    for _ in range(3):
        before = model(X)
    calibrate(model, 0.25 * X)
    for _ in range(3):
        assert not model(X).equal(before)


@pytest.mark.parametrize("scheme", ["row", "tensor"])
@torch.no_grad()
def test_files_state_dicts_copies_and_pickles_keep_it(scheme: str, tmp_path: Path) -> None:
    model = patched(scheme)
    calibrate(model, X)
    expected, options = model(2 * X), FP8GemmOptions(scheme=scheme, engine="reference")  # type: ignore[arg-type]
    save_checkpoint(model, tmp_path)
    loaded = network()
    load_checkpoint(loaded, tmp_path, options=options)
    again = patched(scheme)
    again.load_state_dict(model.state_dict())
    for other in (loaded, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {key: scale.item() for key, scale in scales(other).items()} == {
            key: scale.item() for key, scale in scales(model).items()
        }
        assert other[2].scheme == model[2].scheme
        assert other(2 * X).equal(expected)
    model.bfloat16()
    assert model[2].input_scale.dtype == torch.float32


@torch.no_grad()
def test_layers_that_run_at_another_precision_use_it_later() -> None:
    options = FP8GemmOptions(engine="reference", fp16_weight_storage="keep")
    model, expected = enable_fp8_gemm(network(), options=options), patched()
    set_precision(model, "2", "weight_only")
    set_precision(model, "4", "original")
    layers = calibrate(model, X).layers
    assert [layer.used for layer in layers] == [True, False, False]
    set_precision(model, "*", "fp8")
    calibrate(expected, X)
    assert model[0](X).equal(expected[0](X))
    for name, layer in zip(("2", "4"), layers[1:], strict=True):
        found = model.get_submodule(name)
        assert found.scheme.static
        assert found.input_scale.item() == layer.scale
        x = torch.randn(3, found.in_features)
        rounded = dequantize(quantize(x, TENSOR, scale=found.input_scale))
        assert found(x).equal(F.linear(rounded, dequantize(found.scaled()), found.bias))


def test_writes_and_undo_keep_and_drop_it() -> None:
    model = patched()
    calibrate(model, X)
    scale = model[0].input_scale.item()
    with torch.no_grad():
        model[0].weight.mul_(2)
        model(X)
        assert model[0].input_scale.item() == scale
        model[0].weight.data = torch.ones(32, 64)
        model(X)
    assert (model[0].input_scale.item(), model[0].scheme.static) == (scale, True)
    undone, _ = disable_fp8_gemm(model)
    assert not scales(undone)


@torch.no_grad()
def test_saturation_is_counted_where_it_is_asked_for() -> None:
    model = patched()
    with (
        pytest.raises(ValueError, match="no layer has a static activation scale: call calibrate"),
        count_saturation(model),
    ):
        pass
    calibrate(model, X)
    model(100 * X)
    assert "saturated" not in str(report(model))
    with count_saturation(model):
        expected = int((X.abs() > 3.5 / 2).sum())
        model(2 * X)
        model(X)
    first = report(model).rows[0]
    assert (first.saturated, first.checked) == (expected, 2 * X.numel())
    assert str(report(model)).splitlines()[0].endswith("saturated")
    assert f"{expected} of {2 * X.numel()}" in str(report(model))
    model(100 * X)
    assert report(model).rows[0].checked == 2 * X.numel()


def test_schemes_become_static_and_dynamic_again() -> None:
    for name, scheme in {
        "row": Scheme(weight=TENSOR, activation=TENSOR),
        "block": Scheme(weight=BLOCK_128, activation=None),
    }.items():
        assert scheme.calibrated().static == (name == "row")
        assert scheme.calibrated().dynamic() == scheme
