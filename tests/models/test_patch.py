"""enable, disable, plan and report, beyond the drop-in table: filters, options, storage and memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fp8gemm import (
    ENGINES,
    FP8GemmOptions,
    FP8Linear,
    FP8Weight,
    MatmulSpec,
    Scheme,
    UnsupportedError,
    disable_fp8_gemm,
    enable_fp8_gemm,
    load_checkpoint,
    plan,
    report,
    save_checkpoint,
)
from fp8gemm.scaled import MX


def stack(*names: str) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(16, 16) for name in names})


@pytest.mark.parametrize(
    ("module_filter", "expected"),
    [
        (None, {"q", "k", "head"}),
        ("q", {"q"}),
        ("[qk]", {"q", "k"}),
        (["q", "h*"], {"q", "head"}),
        ("!head", {"q", "k"}),
        (["[qkh]*", "!k"], {"q", "head"}),
        (lambda name, module: name != "q", {"k", "head"}),
        (lambda name, module: module.out_features == 16 and name == "k", {"k"}),
    ],
)
def test_module_filter(module_filter, expected: set[str]) -> None:
    model = stack("q", "k", "head")
    enable_fp8_gemm(model, module_filter=module_filter)
    assert {name for name, layer in model.items() if isinstance(layer, FP8Linear)} == expected
    assert all(row.reason.startswith("module_filter") for row in report(model).kept)


def test_plan_touches_nothing() -> None:
    model = stack("q", "head")
    steps = plan(model, module_filter="q")
    assert [(step.name, step.converts, step.reason) for step in steps] == [
        ("q", True, ""),
        ("head", False, "module_filter"),
    ]
    assert all(type(layer) is nn.Linear for layer in model.values())
    assert report(model).rows == ()


def test_more_layers_can_follow() -> None:
    model = stack("q", "head")
    enable_fp8_gemm(model, module_filter="q")
    enable_fp8_gemm(model, module_filter="head", options=FP8GemmOptions(scheme="block"))
    assert [row.scheme.split(",")[0] for row in report(model).converted] == ["weight row", "weight 128x128"]


def test_bad_options_name_the_good_ones() -> None:
    for wrong, message in (
        (
            {"fp16_weight_storage": "drop"},
            "fp16_weight_storage must be one of keep, cpu_offload, discard, found 'drop'",
        ),
        ({"scheme": "rows"}, "scheme must be a Scheme or one of row, tensor, block, weight_only, found 'rows'"),
        ({"weight_dtype": torch.int8}, "weight_dtype must be one of torch.float8_e4m3fn, torch.float8_e5m2"),
    ):
        with pytest.raises(ValueError, match=message):
            FP8GemmOptions(**wrong)
    with pytest.raises(ValueError, match="engine must be auto or one of"):
        enable_fp8_gemm(stack("q"), options=FP8GemmOptions(engine="fast"))


def test_a_named_engine_that_cannot_raises_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).double())
    with pytest.raises(UnsupportedError, match=r"1: engine 'torch' cannot multiply .*float64") as caught:
        enable_fp8_gemm(model, options=FP8GemmOptions(engine="torch", scheme="tensor"))
    assert "not float64" in str(caught.value)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("engine", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_engines_by_name(engine: str, weight_dtype: torch.dtype) -> None:
    options = FP8GemmOptions(engine=engine, weight_dtype=weight_dtype, scheme="tensor")
    model, x = nn.Linear(32, 16), torch.randn(3, 32)
    expected = model(x)
    if engine == "torch" and weight_dtype == torch.float8_e5m2:
        with pytest.raises(UnsupportedError, match="multiplies e4m3 by e4m3"):
            enable_fp8_gemm(model, options=options)
        return
    enable_fp8_gemm(model, options=options)
    assert model.engine == engine
    limit = 0.15 if weight_dtype == torch.float8_e5m2 else 0.06
    assert (model(x) - expected).norm() < limit * expected.norm()


def test_own_schemes() -> None:
    scheme = Scheme(weight=MX, activation=None, scale_format="ue8m0")
    model = enable_fp8_gemm(nn.Linear(70, 16), options=FP8GemmOptions(scheme=scheme))
    scale = model.scaled().scale
    assert tuple(scale.shape) == (16, 3)
    assert torch.equal(torch.exp2(scale.log2().round()), scale)


def test_a_kept_weight_that_changes_is_quantized_again() -> None:
    model = enable_fp8_gemm(nn.Linear(16, 16, bias=False), options=FP8GemmOptions(fp16_weight_storage="keep"))
    x = torch.randn(2, 16)
    before = model(x)
    assert model.original_weight is not None
    with torch.no_grad():
        model.original_weight.mul_(-2)
    assert torch.equal(model(x), -2 * before)
    version = model.home.version
    model(x)
    assert model.home.version == version


@pytest.mark.parametrize("storage", ["keep", "discard"])
def test_writing_to_the_lazy_weight_writes_through(storage: str) -> None:
    model = enable_fp8_gemm(nn.Linear(16, 16, bias=False), options=FP8GemmOptions(fp16_weight_storage=storage))
    x = torch.randn(2, 16)
    before = model(x)
    with torch.no_grad():
        model.weight.mul_(2)
    torch.testing.assert_close(model(x), 2 * before)
    with torch.no_grad():
        model.weight.copy_(torch.eye(16))
    torch.testing.assert_close(model(x), x)
    model.weight = nn.Parameter(torch.zeros(16, 16))
    assert torch.equal(model(x), torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"shape \(16, 16\), found \(2, 2\)"):
        model.weight = nn.Parameter(torch.zeros(2, 2))


def test_invalidate_weight_cache() -> None:
    for storage in ("keep", "discard"):
        model = enable_fp8_gemm(nn.Linear(16, 16), options=FP8GemmOptions(fp16_weight_storage=storage))
        x = torch.randn(2, 16)
        before = model(x)
        model.invalidate_weight_cache()
        assert model.materialized == (storage == "discard")
        assert torch.equal(model(x), before)


def test_lazy_layers_quantize_at_the_first_call() -> None:
    options = FP8GemmOptions(materialize_fp8_on_wrap=False, fp16_weight_storage="discard")
    model = enable_fp8_gemm(nn.Linear(16, 16), options=options)
    assert not model.materialized
    assert "not materialized" in repr(model)
    assert model.original_weight is not None
    model(torch.randn(2, 16))
    assert model.materialized
    assert model.original_weight is None
    other = enable_fp8_gemm(nn.Linear(16, 16), options=options)
    other.materialize_fp8_weight("cpu")
    assert other.materialized


def test_a_layer_without_its_original_can_be_patched_from_bytes() -> None:
    source = enable_fp8_gemm(nn.Linear(32, 16))
    target = nn.Linear(32, 16, bias=True, device="meta")
    layer = FP8Linear.convert(target, FP8GemmOptions(), weight=source.scaled())
    assert layer is target
    layer.bias = nn.Parameter(source.bias.detach().clone())
    x = torch.randn(2, 32)
    assert torch.equal(layer(x), source(x))
    with pytest.raises(ValueError, match=r"shape \(16, 32\), found \(32, 16\)"):
        FP8Linear.convert(nn.Linear(32, 16), FP8GemmOptions(), weight=enable_fp8_gemm(nn.Linear(16, 32)).scaled())


def test_from_linear_leaves_the_linear_alone() -> None:
    linear = nn.Linear(16, 16)
    layer = FP8Linear.from_linear(linear)
    assert type(linear) is nn.Linear
    assert isinstance(linear.weight, nn.Parameter)
    assert layer.bias is linear.bias


@pytest.mark.parametrize("storage", ["keep", "discard"])
def test_a_converted_copy_is_ready_before_its_first_call(storage: str) -> None:
    options = FP8GemmOptions(fp16_weight_storage=storage)  # type: ignore[arg-type]
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32)), options=options, inplace=False)
    assert all(row.engine for row in report(model).converted)


def test_optimizers_see_only_what_trains() -> None:
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["0.bias", "1.weight", "1.bias"]


def test_report_counts_bytes_calls_and_kernels() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64).bfloat16().float())
    copies = {
        s: enable_fp8_gemm(copy.deepcopy(model), options=FP8GemmOptions(fp16_weight_storage=s))
        for s in ("keep", "discard")
    }
    dense, fp8 = 2 * 64 * 32 * 4, 2 * 64 * 32 + 4 * (64 + 32)
    for storage, expected in (("keep", dense + fp8), ("discard", fp8)):
        found = report(copies[storage])
        assert (found.bytes_before, found.bytes_after) == (dense, expected)
    patched = copies["discard"]
    for m in (1, 5):
        patched(torch.randn(m, 64))
    rows = report(patched).to_dict()["rows"]
    assert [row["calls"] for row in rows] == [2, 2]
    assert [sum(row["kernels"].values()) for row in rows] == [2, 2]
    text = str(report(patched)).splitlines()
    assert text[0].split() == [
        "layer",
        "weight",
        "runs",
        "on",
        "MB",
        "before",
        "after",
        "calls",
        "kernels",
        "dequantized",
    ]
    assert text[-2].split()[:4] == ["2", "converted,", "0", "kept"]


def test_disable_reports_per_layer() -> None:
    model = stack("q", "head")
    for storage, reason in (
        ("keep", "original weight"),
        ("cpu_offload", "original weight"),
        ("discard", "dequantized weight: the original was discarded"),
    ):
        enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage=storage), module_filter="q")
        _, found = disable_fp8_gemm(model)
        assert [(row.name, row.reason) for row in found.rows] == [("q", reason)]


def test_half_the_memory_is_the_default() -> None:
    """With ``discard``, nothing of the 16-bit weight remains, neither in the report nor in the layer."""
    model = enable_fp8_gemm(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))
    assert model.original_weight is None
    assert report(model).bytes_after == 512 * 512 + 4 * 512
    assert report(model).bytes_before == 2 * 512 * 512


MEMORY_SCRIPT = """
import gc, torch
from torch import nn
from fp8gemm import FP8GemmOptions, enable_fp8_gemm

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

class Peak:
    def __init__(self): self.value = 0
    def __call__(self, *_): self.value = max(self.value, anonymous())

torch.set_num_threads(1)
enable_fp8_gemm(nn.Linear(64, 64).bfloat16())  # loads what loads once
layers, width = 12, 1536
start = anonymous()
model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
dense = anonymous() - start
from fp8gemm.weights import Home
peak, real = Peak(), Home.form
def form(self, *args):
    peak(); return real(self, *args)
Home.form = form
enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage="discard"))
gc.collect()
print(dense, peak.value - start, anonymous() - start, width * width * 2)
"""


def test_discarding_gives_memory_back_as_it_goes() -> None:
    """The peak is the model and a few temporaries; at the end at most 0.60 of the model remains. Measured on Linux."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], check=True, capture_output=True, text=True)
    dense, peak, end, layer = map(int, done.stdout.split())
    assert peak <= dense + 8 * layer, (dense, peak)
    assert end <= 0.60 * dense + 4 * layer, (dense, end)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 1), (1, -3), (2, 0.25), (0, 1)])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (5, 1)])
def test_addmm_keeps_its_factors(beta: float, alpha: float, shape: tuple[int, ...]) -> None:
    layer = enable_fp8_gemm(nn.Linear(64, 32, bias=False))
    dense, x, bias = layer.weight.dequantize(), torch.randn(5, 64), torch.randn(shape)
    found = torch.addmm(bias, x, layer.weight.t(), beta=beta, alpha=alpha)
    torch.testing.assert_close(found, torch.addmm(bias, x, dense.t(), beta=beta, alpha=alpha))
    turned = torch.addmm(bias.expand(5, 32).t(), layer.weight, x.t(), beta=beta, alpha=alpha)
    torch.testing.assert_close(turned, found.t())


@pytest.mark.parametrize("storage", ["keep", "cpu_offload", "discard"])
@pytest.mark.parametrize("trains", [True, False])
def test_undo_gives_back_whether_a_weight_trains(storage: str, trains: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(trains)
    model[1].weight.requires_grad_(not trains)
    enable_fp8_gemm(model, options=FP8GemmOptions(fp16_weight_storage=storage))  # type: ignore[arg-type]
    disable_fp8_gemm(model)
    assert [layer.weight.requires_grad for layer in model] == [trains, not trains]
    assert [layer.bias.requires_grad for layer in model] == [trains, trains]


@pytest.mark.parametrize("scheme", ["row", "tensor", "block"])
def test_scales_of_another_shape_are_refused_even_if_as_many(scheme: str) -> None:
    """The same number of scales in another shape are different scales."""
    options = FP8GemmOptions(scheme=scheme)  # type: ignore[arg-type]
    model = enable_fp8_gemm(nn.Linear(256, 384), options=options)
    state = dict(model.state_dict())
    for wrong in (state["weight_scale"].flatten(), state["weight_scale"][None], state["weight_scale"].t()):
        if wrong.shape != state["weight_scale"].shape:
            with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
                model.load_state_dict({**state, "weight_scale": wrong})


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([nn.functional.linear(x, matrix) for matrix in self.up_proj])


KEPT_WRITES = {
    "data": lambda original, earlier: original.data.mul_(-2),
    "data, taken earlier": lambda original, earlier: earlier.mul_(-2),
    "a part of data": lambda original, earlier: [half.mul_(-2) for half in original.data.chunk(2)],
    "assigned": lambda original, earlier: setattr(original, "data", original.detach() * -2),
    "detached": lambda original, earlier: original.detach().mul_(-2),
    "itself": lambda original, earlier: torch.no_grad()(original.mul_)(-2),
    "in inference mode": lambda original, earlier: torch.inference_mode()(original.mul_)(-2),
    "data in inference mode": lambda original, earlier: torch.inference_mode()(lambda: original.data.mul_(-2))(),
    "an optimizer's": lambda original, earlier: torch.nn.utils.vector_to_parameters(
        -2 * original.flatten(), [original]
    ),
}


@pytest.mark.parametrize("write", KEPT_WRITES.values(), ids=KEPT_WRITES)
@pytest.mark.parametrize("kind", [lambda: nn.Linear(16, 32, bias=False), Stack], ids=["linear", "stack"])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("born", [torch.enable_grad, torch.inference_mode])
def test_a_kept_original_tells_of_every_write(write, kind, eager: bool, born) -> None:
    """Also in copies, in pickles, and through references from before patching; undo restores that very object."""
    with born():
        model = kind()
    name = next(iter(model._parameters))
    held = model._parameters[name]
    options = FP8GemmOptions(fp16_weight_storage="keep", materialize_fp8_on_wrap=eager)
    enable_fp8_gemm(model, options=options)
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = model(x)
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            original = one._parameters[name]._home.original
            if one is model and born is torch.enable_grad:
                assert original is held
            earlier = original.data
            assert torch.equal(one(x), before)
            write(original, earlier)
            assert torch.equal(one(x), -2 * before)
            version = one._parameters[name]._home.version
            assert torch.equal(one(x), -2 * before)
            assert one._parameters[name]._home.version == version  # quantized once
            disable_fp8_gemm(one)
            assert one._parameters[name] is original
            assert type(original) is nn.Parameter
            original.mul_(-0.5)
            enable_fp8_gemm(one, options=options)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.gate_up_proj = nn.Parameter(torch.randn(2, 256, 128))
        self.mlp.experts.down_proj = nn.Parameter(torch.randn(2, 128, 128))
        self.layer = nn.Linear(128, 256)


@pytest.mark.parametrize("accumulate", ["auto", "fast", "precise"])
@pytest.mark.parametrize("scheme", ["row", "tensor", "block", "weight_only"])
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_patch_and_load_ask_engines_the_same(
    accumulate: str, scheme: str, weight_dtype: torch.dtype, dtype: torch.dtype, monkeypatch, tmp_path
) -> None:
    """All three give the same answer: each of them refuses an unsuitable engine before anything changes."""
    options = FP8GemmOptions(engine="reference", accumulate=accumulate, scheme=scheme, weight_dtype=weight_dtype)
    source = Routed().to(dtype)
    saved = weight_dtype == torch.float8_e4m3fn  # compressed-tensors has no other
    if saved:
        save_checkpoint(enable_fp8_gemm(copy.deepcopy(source), options=options), tmp_path / "fp8")
    asked: set[MatmulSpec] = set()
    refusing, kind = False, type(ENGINES["reference"])

    def rejects(engine: object, spec: MatmulSpec, machine: object) -> list[str]:
        asked.add(spec)
        return ["it sums otherwise"] if refusing and spec.accumulate == "precise" else []

    monkeypatch.setattr(kind, "rejects", rejects)
    ways = {
        "plan": lambda model: plan(model, options=options),
        "patch": lambda model: enable_fp8_gemm(model, options=options),
        "patch lazily": lambda model: enable_fp8_gemm(model, options=replace(options, materialize_fp8_on_wrap=False)),
    }
    if saved:
        ways["load"] = lambda model: load_checkpoint(model, tmp_path / "fp8", options=options)
    found = {}
    for name, way in ways.items():
        model = copy.deepcopy(source)
        way(model)
        for parameter in model.parameters():
            if isinstance(parameter, FP8Weight):
                parameter._home.form(parameter.dtype)
        found[name], asked = asked, set()
    for name, specs in found.items():
        # In files, a stack with tensor scales has a scale per expert and half, and activations are quantized per token.
        by_tensor = name == "load" and scheme == "tensor"
        assert {spec for spec in specs if not (by_tensor and spec.experts)} == {
            spec for spec in found["plan"] if not (by_tensor and spec.experts)
        }
        assert {spec.accumulate for spec in specs} == {accumulate}
    assert {(spec.weight_dtype, spec.compute_dtype) for spec in found["plan"]} == {(weight_dtype, dtype)}
    assert {(spec.experts, spec.n, spec.k) for spec in found["plan"]} == {(2, 256, 128), (2, 128, 128), (0, 256, 128)}
    refusing = True
    for name, way in ways.items():
        model = copy.deepcopy(source)
        refused = accumulate == "precise" and name != "patch lazily"  # which has to know the device of the weight
        with pytest.raises(UnsupportedError, match="it sums otherwise") if refused else contextlib.nullcontext():
            way(model)
        assert any(isinstance(parameter, FP8Weight) for parameter in model.parameters()) == (
            not refused and name != "plan"
        )


class Table(nn.Embedding):
    """An embedding class of another library."""


def test_what_came_after_patching_is_reported_and_converted_by_the_next_call() -> None:
    """Fused projections, a new head, replaced weights, more experts; no embeddings, and each tied weight once."""
    model = Routed()
    model.kept, model.table, model.replaced = nn.Linear(16, 16), nn.Embedding(32, 32), nn.Linear(32, 32)
    model.head, model.tied = nn.Linear(128, 256), nn.Linear(128, 256)
    assert report(model).rows == ()
    enable_fp8_gemm(model, module_filter="!kept")
    model.tied.weight = model.layer.weight
    model.to_qkv, model.head = nn.Linear(128, 384), nn.Linear(128, 512)
    model.own_table, model.more = Table(64, 64), Stack()
    model.mlp.experts.up_proj = nn.Parameter(torch.randn(2, 32, 16))
    del model.replaced.weight
    model.replaced.register_parameter("weight", nn.Parameter(torch.randn(32, 32)))
    fp8 = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "layer"}
    later = {"mlp.experts.up_proj", "head", "to_qkv", "more.up_proj"}
    assert sorted(row.name for row in report(model).converted) == sorted(fp8)
    assert {row.name: row.reason for row in report(model).kept} == {
        "kept": "module_filter: !kept",
        "replaced": "its weight was replaced by a dense one after patching",
        **dict.fromkeys(later, "added after patching"),
    }
    enable_fp8_gemm(model, module_filter="!kept")
    assert {row.name for row in report(model).converted} == fp8 | later | {"replaced"}
    assert {row.name: row.reason for row in report(model).kept} == {"kept": "module_filter: !kept"}
    disable_fp8_gemm(model)
    assert model.tied.weight is model.layer.weight
    assert type(model.replaced) is nn.Linear
    assert report(model).rows == ()


def test_a_loaded_model_tells_why_layers_are_dense(tmp_path) -> None:
    source, model = Routed(), Routed()
    model.other, model.absent = nn.Linear(16, 16), nn.Linear(16, 16)
    source.other = nn.Linear(16, 16)
    save_checkpoint(enable_fp8_gemm(source, module_filter="layer"), tmp_path / "fp8")
    load_checkpoint(model, tmp_path / "fp8", strict=False)
    model.later = nn.Linear(16, 16)
    assert {row.name: row.reason for row in report(model).kept} == {
        "mlp.experts.gate_up_proj": "dense in the checkpoint",
        "mlp.experts.down_proj": "dense in the checkpoint",
        "other": "dense in the checkpoint",
        "absent": "not in the checkpoint",
        "later": "added after patching",
    }


def test_the_report_lists_layers_whose_weights_were_all_replaced() -> None:
    """As accelerate does, which assigns to the dict of parameters."""
    model = enable_fp8_gemm(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    for layer in model:
        layer._parameters["weight"] = nn.Parameter(torch.ones(16, 16))
    rows = report(model).rows
    assert [(row.name, row.status) for row in rows] == [("0", "kept"), ("1", "kept")]
    assert {row.reason for row in rows} == {"its weight was replaced by a dense one after patching"}
