"""torch's own tracers, compilers and transforms, and what its utilities do to parameters."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compatibility import Trial
from tiny import DISCARD, IDS, dequantized, error, llama, mixture, patched
from torch import fx, nn
from torch.func import functional_call, functionalize, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fp8gemm import FP8GemmOptions, FP8Weight, report

X = torch.linspace(-2, 2, 6 * 64).reshape(6, 64)
WEIGHT_ONLY = FP8GemmOptions(scheme="weight_only")
Run = Callable[[nn.Module], Any]


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return patched(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).eval(), WEIGHT_ONLY)


TRANSFORMS: dict[str, Run] = {
    "vmap": lambda m: vmap(m)(X),
    "jvp": lambda m: jvp(m, (X,), (X.cos(),))[1],
    "jacrev": lambda m: jacrev(m)(X[0]),
    "hessian": lambda m: hessian(lambda x: m(x).square().sum())(X[0]),
    "functional_call": lambda m: functional_call(m, dict(m.named_parameters()), (X,)),
    "functionalize": lambda m: functionalize(m)(X),
    "make_fx, symbolic": lambda m: make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(X)(X[:4]),
}


def transformed(run: Run) -> None:
    model = _mlp()
    assert error(run(model), run(dequantized(model))) < 1e-4


def traced() -> None:
    model = _mlp()
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert graph(X).equal(model(X))


def scripted() -> None:
    torch.jit.script(_mlp())


def jit_traced() -> None:
    model = _mlp()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert error(torch.jit.trace(model, X)(X), model(X)) < 1e-6
    assert any("torch.jit.save crashes" in str(one.message) for one in found)


def exported() -> None:
    torch.manual_seed(0)
    model = patched(nn.Sequential(nn.Linear(512, 512, bias=False)), DISCARD)
    x = torch.randn(3, 512)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt2")
        torch.export.save(torch.export.export(model, (x,)), path)
        assert path.stat().st_size < 1.1 * 512 * 512
        assert torch.export.load(path).module()(x).equal(model(x))


def packaged() -> None:
    model = _mlp()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(model, (X,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        assert error(torch._inductor.aoti_load_package(path)(X), model(X)) < 1e-6


@torch.no_grad()
def compiled(implementation: str) -> None:
    torch._dynamo.reset()
    model = patched(mixture(), DISCARD)
    model.set_experts_implementation(implementation)
    expected, before = model(IDS, use_cache=False).logits, [row.calls for row in report(model).converted]
    found = torch.compile(model, backend="aot_eager")(IDS, use_cache=False).logits
    assert error(found, expected) < 1e-5
    assert all(row.calls > calls for row, calls in zip(report(model).converted, before, strict=True))


@torch.no_grad()
def generated() -> None:
    """As ``generate`` does it by itself on a GPU."""
    torch._dynamo.reset()
    model = patched(llama(), DISCARD)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert model.generate(IDS, cache_implementation="static", **options).equal(expected)


@torch.no_grad()
def averaged() -> None:
    model = _mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    before, weight = model[0].weight.dequantize(), model[0].weight
    weight.mul_(3)
    average.update_parameters(model)
    mean = 0.75 * before + 0.25 * weight.dequantize()
    assert isinstance(average.module[0].weight, FP8Weight)
    assert error(average.module[0].weight.dequantize(), mean) < 0.04


@torch.no_grad()
def swapped() -> None:
    model, other = _mlp(), copy.deepcopy(_mlp())
    other[0].weight.mul_(2)
    expected = other(X)
    torch.utils.swap_tensors(model[0].weight, other[0].weight)
    assert model(X).equal(expected)


@torch.no_grad()
def pruned() -> None:
    model = _mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    expected = model(X)
    prune.remove(model[0], "weight")
    assert isinstance(model[0].weight, FP8Weight)
    assert (model[0].weight == 0).float().mean() == 0.5
    assert error(model(X), expected) < 1e-6


@torch.no_grad()
def parametrized() -> None:
    model = _mlp()
    expected = model(X)
    parametrizations.weight_norm(model[0])
    assert error(model(X), expected) < 1e-6


def normed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(_mlp()[0])


def _torch(what: str, run: Callable[[], None], **more: str) -> Trial:
    return Trial(library="torch", what=what, run=run, **more)


TRIALS = [
    *(_torch(f"`{name}`", partial(transformed, run)) for name, run in TRANSFORMS.items()),
    _torch("`fx.symbolic_trace`", traced, note="FP8 layers are leaves"),
    _torch("`jit.script`", scripted, refused="torch.jit.script cannot compile FP8 weights: use torch.compile"),
    _torch("`jit.trace`", jit_traced, note="without gradients; it warns that `jit.save` crashes on what it makes"),
    _torch("`export`, saved and loaded", exported, note="the file holds the FP8 bytes once"),
    _torch("AOTInductor: compiled, packaged, loaded", packaged),
    *(
        _torch(f"`compile` of a mixture of experts, `{name}`", partial(compiled, name), note="experts stay on FP8")
        for name in ("eager", "batched_mm", "grouped_mm")
    ),
    _torch("`compile` of `generate` with a static cache", generated),
    _torch(
        "`AveragedModel`, an exponential moving average", averaged, note="the average is FP8, rounded at every step"
    ),
    _torch("`swap_tensors`", swapped),
    _torch("`prune.l1_unstructured` and `prune.remove`", pruned, note="FP8 again once it is removed"),
    _torch("`parametrizations.weight_norm` of a patched layer", parametrized, note="its products are dense"),
    _torch("the older `weight_norm` of a patched layer", normed, refused="takes no gradient: train adapters beside it"),
]
