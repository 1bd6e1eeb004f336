"""torch.fx, torch.jit and torch.compile: layers are leaves, what cannot be is refused, calls of graphs are counted."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd import autograd_cache
from torch._inductor.utils import fresh_cache

from fp8gemm import (
    FP8GemmOptions,
    FP8Linear,
    FP8Weight,
    UnsupportedError,
    disable_fp8_gemm,
    enable_fp8_gemm,
    fuse_gated,
    fuse_siblings,
    report,
)
from fp8gemm.scaled import SchemeName
from fp8gemm.weights import tracing

WEIGHT_ONLY = FP8GemmOptions(scheme="weight_only")
OF_TRACING = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning", "ignore:`torch.jit.:FutureWarning")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Owner(nn.Module):
    """Multiplies by its own parameters: a matrix and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(32, 32) / 6)
        self.up_proj = nn.Parameter(torch.randn(4, 48, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.matmul(x, self.proj).expand(4, -1, -1), self.up_proj.transpose(1, 2))


def attention() -> nn.Module:
    """torch's own encoder layer, which is a leaf of every tracer."""
    return nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Sequential(nn.Linear(48, 8, bias=False))),
    "one layer": lambda: nn.Linear(32, 48),
    "gated": Gated,
    "owner": Owner,
    "attention": attention,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return enable_fp8_gemm(MODELS[name]().eval(), options=WEIGHT_ONLY, module_filter=lambda name, module: True)


def fp8_weights(model: nn.Module) -> list[FP8Weight]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, FP8Weight)]


X = torch.linspace(-2, 2, 6 * 32).reshape(1, 6, 32)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_layers_are_leaves_of_symbolic_traces(name: str, fused: bool) -> None:
    """As torch's own are: the graph calls them, and runs, copied too."""
    model = made(name)
    if fused:
        fuse_siblings(model)
        fuse_gated(model)
    expected = model(X)
    traced = fx.symbolic_trace(model)
    leaves = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    layers = {key for key, module in model.named_modules() if isinstance(module, FP8Linear) and key}
    assert name in ("owner", "attention") or layers <= leaves
    for graph in (traced, copy.deepcopy(traced)):
        torch.testing.assert_close(graph(X), expected, rtol=1e-5, atol=1e-5)
        assert fp8_weights(graph)


@torch.no_grad()
def test_fused_siblings_are_leaves_too() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in "qkv")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x) + self.k_proj(x) * self.v_proj(x)

    model = enable_fp8_gemm(Attention())
    assert fuse_siblings(model).groups
    expected = [model(X) for _ in range(3)][-1]
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["q_proj", "k_proj", "v_proj"]
    torch.testing.assert_close(traced(X), expected)


def test_a_symbolic_trace_with_keywords_and_shared_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.alias = self.layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.alias(input=self.layer(x))

    model = enable_fp8_gemm(Twice())
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer", "layer"]
    assert traced(X).equal(model(X))


@OF_TRACING
@pytest.mark.parametrize("name", MODELS)
def test_scripting_is_refused_until_the_model_is_dense_again(name: str) -> None:
    model = made(name)
    holder = nn.ModuleList([model])
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), holder):
        with pytest.raises(UnsupportedError, match=r"torch\.jit\.script cannot .*disable_fp8_gemm"):
            torch.jit.script(one)
    disable_fp8_gemm(model)
    assert "__prepare_scriptable__" not in {key for module in model.modules() for key in vars(module)}


@OF_TRACING
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_traced_modules_run_and_say_what_they_cannot_do(name: str, grad: bool) -> None:
    """torch checks the trace by a second one, with gradients and without."""
    model = made(name)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, X)
    assert any("without gradients, and torch.jit.save crashes" in str(one.message) for one in found)
    torch.testing.assert_close(traced(X), model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_older_export_to_onnx_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UnsupportedError, match=r"use dynamo=True, or call fp8gemm\.disable_fp8_gemm\(model\) first"):
        torch.onnx.export(made(name), (X,), str(path), dynamo=False)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.10's own
@pytest.mark.parametrize("name", MODELS)
def test_calls_of_compiled_graphs_are_counted(name: str) -> None:
    """Each once, whoever else watches, and calls without the graph as before."""
    torch._dynamo.reset()
    model = made(name)
    with torch.no_grad():
        model(X)
        before = [row.calls for row in report(model).rows]
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(5):
            compiled(X)
        assert [row.calls for row in report(model).rows] == [calls + 5 for calls in before]
        assert all(sum(weight.activity.kernels.values()) == weight.activity.calls for weight in fp8_weights(model))
        with torch.profiler.profile():
            model(X)
        assert [row.calls for row in report(model).rows] == [calls + 6 for calls in before]


@torch.no_grad()
def test_bytes_that_a_graph_has_multiplied_by_can_be_saved() -> None:
    """Calls and counters that are attached to them stay behind."""
    torch._dynamo.reset()
    layer = enable_fp8_gemm(nn.Linear(32, 48))
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(3):
        compiled(X)
    file = io.BytesIO()
    torch.save({"data": layer.scaled().data, "scale": layer.weight.scaled().scale}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["data"].view(torch.uint8).equal(layer.scaled().data.view(torch.uint8))
    assert loaded["scale"].equal(layer.scaled().scale)


def compiled_from_cache(scheme: SchemeName) -> int:
    """Compiles a model, and returns how many graphs came from torch's cache on disk."""
    torch._dynamo.reset()
    counters.clear()
    model = enable_fp8_gemm(Owner(), options=FP8GemmOptions(scheme=scheme), module_filter=lambda name, module: True)
    torch.compile(model)(X)
    return counters["aot_autograd"]["autograd_cache_hit"]


@torch.no_grad()
def test_compiled_graphs_are_cached_for_this_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of subclasses that leave it to torch what a graph depends on."""
    with fresh_cache(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*_stable_hash_for_caching.*")
        schemes: list[SchemeName] = ["row", "tensor", "row"]
        assert [compiled_from_cache(scheme) for scheme in schemes] == [0, 0, 1]
        monkeypatch.setattr(tracing, "_source", lambda: "other code")
        asks = "_stable_hash_for_caching" in Path(autograd_cache.__file__).read_text()  # torch 2.10 does not
        assert compiled_from_cache("row") == (0 if asks else 1)
