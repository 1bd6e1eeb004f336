"""Drop-in behavior of patched models: one test per row of the table in docs/drop-in.md."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fp8gemm import FP8GemmOptions, FP8Linear, disable_fp8_gemm, enable_fp8_gemm, report
from fp8gemm.models import selection

STORAGE = ["keep", "cpu_offload", "discard"]
CPU = {"dtype": torch.float32, "device": "cpu"}  # of the tests' own tensors, whatever the defaults
by_storage = pytest.mark.parametrize("storage", STORAGE)


def options(storage: str = "keep", **others: object) -> FP8GemmOptions:
    return FP8GemmOptions(fp16_weight_storage=storage, **others)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, params=["plain", "bfloat16, with meta", "float16, set meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Global defaults that a program may have set: a patched model must not depend on any of them."""
    dtype, _, how = request.param.partition(", ")
    before = torch.get_default_dtype()
    if dtype != "plain":
        torch.set_default_dtype(getattr(torch, dtype))
    if how == "set meta":
        torch.set_default_device("meta")
    try:
        with torch.device("meta") if how == "with meta" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def randn(*shape: int, **others: object) -> torch.Tensor:
    return torch.randn(*shape, **{**CPU, **others})


class Mlp(nn.Module):
    """Two Linears; reads the second one's weight dtype, as T5 does."""

    def __init__(self, width: int = 64, hidden: int = 96, device: str = "cpu") -> None:
        super().__init__()
        self.wi = nn.Linear(width, hidden, dtype=torch.float32, device=device)
        self.wo = nn.Linear(hidden, width, bias=False, dtype=torch.float32, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(F.relu(self.wi(x)).to(self.wo.weight.dtype))


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = 0.08) -> bool:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return bool((found.double() - expected.double()).norm() <= limit * expected.double().norm())


def fp8_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    """All FP8 bytes and scales of a model."""
    return {
        name: torch.cat(
            [layer.scaled().data.view(torch.uint8).flatten(), layer.scaled().scale.view(torch.uint8).flatten()]
        )
        for name, layer in model.named_modules()
        if isinstance(layer, FP8Linear)
    }


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    left, right = fp8_bytes(a), fp8_bytes(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@by_storage
def test_01_layers_stay_linears_under_their_names(storage: str) -> None:
    model = Mlp().eval()
    model.wo.train()
    bias, before = model.wi.bias, dict(model.named_modules())
    enable_fp8_gemm(model, options=options(storage))
    assert dict(model.named_modules()) == before  # the very same objects
    for layer, size in ((model.wi, (64, 96)), (model.wo, (96, 64))):
        assert isinstance(layer, nn.Linear)
        assert isinstance(layer, FP8Linear)
        assert (layer.in_features, layer.out_features) == size
    assert model.wi.bias is bias
    assert model.wo.bias is None
    assert (model.training, model.wi.training, model.wo.training) == (False, False, True)


@by_storage
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_02_weight_answers_at_no_cost(storage: str, dtype: torch.dtype) -> None:
    model = enable_fp8_gemm(Mlp().to(dtype), options=options(storage))
    weight = model.wo.weight
    assert (weight.dtype, weight.device.type, tuple(weight.shape)) == (dtype, "cpu", (64, 96))
    assert weight.requires_grad is False
    assert model(randn(3, 64).to(dtype)).dtype == dtype
    assert report(model).rows[1].dequantizations == 0
    assert torch.equal(weight + 0, weight.dequantize())
    assert model.wo.activity.dequantizations == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_03_output_dtype(dtype: torch.dtype, context: type) -> None:
    plain = Mlp().to(dtype)
    model = enable_fp8_gemm(plain, inplace=False)
    x = randn(3, 64).to(dtype)
    with context():
        assert close(model(x), plain(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert close(model(x), plain(x))
        with torch.autocast("cpu", dtype=torch.float16):
            assert close(model(x), plain(x))


def test_03_inputs_of_another_dtype() -> None:
    model = nn.Linear(64, 32, **CPU).bfloat16()
    x = randn(3, 64)
    assert enable_fp8_gemm(model, inplace=False)(x).dtype == torch.float32
    kept = enable_fp8_gemm(model, options=FP8GemmOptions(cast_output_back=False), inplace=False)
    assert kept(x).dtype == torch.bfloat16
    strict = enable_fp8_gemm(model, options=FP8GemmOptions(cast_inputs=False), inplace=False)
    with pytest.raises(
        RuntimeError, match=r"expected input of dtype torch.bfloat16, found torch.float32; .*cast_inputs"
    ):
        strict(x)
    with pytest.raises(RuntimeError, match=r"found torch.int64$"):
        kept(torch.ones(3, 64, dtype=torch.int64, device="cpu"))


@by_storage
def test_04_dtype_and_device_moves_leave_fp8_alone(storage: str) -> None:
    model = enable_fp8_gemm(Mlp(), options=options(storage))
    x, before = randn(3, 64), fp8_bytes(model)
    expected = model(x)
    for move, dtype in (
        (lambda: model.half(), torch.float16),
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: model.float(), torch.float32),
        (lambda: model.to(torch.float64), torch.float64),
        (lambda: model.to("cpu", torch.float32), torch.float32),
        (lambda: model.to(memory_format=torch.channels_last), torch.float32),
        (lambda: model.share_memory(), torch.float32),
    ):
        move()
        assert model.wi.weight.dtype == dtype
        assert close(model(x.to(dtype)).float(), expected, 0.02)
        after = fp8_bytes(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


@by_storage
@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_05_copies_are_equal_and_share_nothing(storage: str, materialize: bool, how: str) -> None:
    model = enable_fp8_gemm(Mlp(), options=options(storage, materialize_fp8_on_wrap=materialize))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = randn(3, 64)
    assert torch.equal(model(x), twin(x))
    assert same_bytes(model, twin)
    ours = {tensor.data_ptr() for tensor in tensors_of(model)}
    assert ours
    assert not ours & {tensor.data_ptr() for tensor in tensors_of(twin)}
    assert twin.wi.activity is not model.wi.activity


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Everything with memory: buffers, parameters and kept originals."""
    layers = [layer for layer in model.modules() if isinstance(layer, FP8Linear)]
    originals = [layer.original_weight for layer in layers if layer.original_weight is not None]
    return [*model.buffers(), *model.parameters(), *originals]


@by_storage
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_06_attention_and_transformer_layers_really_run_fp8(storage: str, training: bool, grad: bool) -> None:
    x = randn(2, 5, 32)
    cases = [
        (nn.MultiheadAttention(32, 4, batch_first=True, **CPU), (x, x, x), 2),
        (nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, **CPU), (x,), 4),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, **CPU), 2), (x,), 8),
        (nn.Transformer(32, 4, 1, 1, 64, 0.0, batch_first=True, **CPU), (x, x), 10),
    ]
    for plain, inputs, layers in cases:
        plain.train(training)
        model = enable_fp8_gemm(plain, options=options(storage), inplace=False)
        with torch.set_grad_enabled(grad):
            found, expected = model(*inputs), plain(*inputs)
            if isinstance(found, tuple):
                found, expected = found[0], expected[0]
            assert close(found, expected)
            assert not torch.equal(found, expected)
        rows = report(model).converted
        assert len(rows) == layers
        for row in rows:
            # In cross attention, queries have rows of in_proj_weight of their own, and keys and values share the rest.
            calls = 2 if row.name.endswith("multihead_attn.in_proj_weight") else 1
            assert row.calls == calls, f"{type(plain).__name__}: {row.name} did not run"
            assert row.dequantizations == 0, f"{type(plain).__name__}: {row.name} was dequantized"
            assert sum(count for _, count in row.kernels) == calls


@by_storage
def test_07_tied_weights_and_shared_modules(storage: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 32, **CPU)
            self.shared = nn.Linear(32, 32, **CPU)
            self.same = nn.ModuleList([self.shared])
            self.head = nn.Linear(32, 50, bias=False, **CPU)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.same[0](self.shared(self.embed(x))))

    plain = Tied()
    model = enable_fp8_gemm(copy.deepcopy(plain), options=options(storage))
    assert model.head.weight is model.embed.weight
    assert model.same[0] is model.shared
    assert isinstance(model.shared, FP8Linear)
    assert not report(model).kept
    assert [(row.name, row.ties) for row in report(model).converted] == [("head", ("embed",)), ("shared", ())]
    x = torch.arange(7, device="cpu")
    assert close(model(x), plain(x))
    twin = enable_fp8_gemm(plain, options=options(storage), inplace=False)
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not plain.head.weight
    assert twin.same[0] is twin.shared
    assert torch.equal(twin(x), model(x))


@by_storage
def test_08_the_model_itself_is_a_linear(storage: str) -> None:
    model = nn.Linear(64, 32, **CPU)
    x = randn(3, 64)
    expected = model(x)
    assert enable_fp8_gemm(model, options=options(storage)) is model
    assert isinstance(model, FP8Linear)
    assert close(model(x), expected)
    assert report(model).rows[0].name == "(the model itself)"


@by_storage
@pytest.mark.parametrize("scheme", ["row", "tensor", "block", "weight_only"])
@pytest.mark.parametrize("size", [(1, 1), (7, 1), (100, 52), (129, 257), (16, 128)])
def test_09_any_number_of_features(storage: str, scheme: str, size: tuple[int, int]) -> None:
    plain = nn.Linear(*size, **CPU)
    model = enable_fp8_gemm(plain, options=options(storage, scheme=scheme), inplace=False)
    x = randn(5, size[0])
    dense = F.linear(x, model.weight.dequantize(), plain.bias)
    assert close(model(x), dense, 1e-5)
    assert model.state_dict()["weight"].shape == plain.weight.shape


@by_storage
def test_10_hooks_survive(storage: str) -> None:
    model, seen = Mlp(), []
    handles = [
        model.wi.register_forward_pre_hook(lambda module, args: seen.append("pre")),
        model.wi.register_forward_hook(lambda module, args, output: seen.append("forward")),
        model.wi.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward")),
        model.wi.register_forward_hook(lambda module, args, kwargs, output: seen.append("kwargs"), with_kwargs=True),
    ]
    enable_fp8_gemm(model, options=options(storage))
    model(randn(2, 64, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "kwargs", "backward"]
    for handle in handles:
        handle.remove()
    model(randn(2, 64, requires_grad=True)).sum().backward()
    assert len(seen) == 4


@by_storage
def test_11_gradients_reach_inputs_and_bias(storage: str) -> None:
    model = enable_fp8_gemm(Mlp(), options=options(storage))
    x = randn(2, 3, 64, requires_grad=True)
    y_grad = randn(2, 3, 64)
    model(x).backward(y_grad)
    dense = copy.deepcopy(model)
    disable_fp8_gemm(dense)
    with torch.no_grad():
        for name in ("wi", "wo"):
            getattr(dense, name).weight.copy_(getattr(model, name).weight.dequantize())
    again = x.detach().requires_grad_()
    dense.zero_grad()
    dense(again).backward(y_grad)
    assert x.grad is not None
    assert close(x.grad, again.grad, 1e-5)
    assert close(model.wi.bias.grad, dense.wi.bias.grad, 1e-5)
    through_weight = randn(2, 64, requires_grad=True)
    F.linear(through_weight, model.wi.weight).sum().backward()
    assert close(through_weight.grad, model.wi.weight.dequantize().sum(0).expand(2, 64), 1e-5)


@by_storage
def test_12_state_dict_round_trip(storage: str, tmp_path) -> None:
    model = enable_fp8_gemm(Mlp(), options=options(storage))
    state = model.state_dict()
    assert list(state) == ["wi.weight", "wi.weight_scale", "wi.bias", "wo.weight", "wo.weight_scale"]
    assert state["wi.weight"].dtype == torch.float8_e4m3fn
    assert state["wi.weight_scale"].shape == (96, 1)
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    x = randn(3, 64)
    for materialize in (True, False):
        for assign in (True, False):
            twin = enable_fp8_gemm(Mlp(), options=options(storage, materialize_fp8_on_wrap=materialize))
            twin.load_state_dict(loaded, strict=True, assign=assign)
            assert same_bytes(model, twin)
            assert torch.equal(twin(x), model(x))
            shares = twin.wi.state_dict()["weight"].data_ptr() == loaded["wi.weight"].data_ptr()
            assert not shares or assign


@by_storage
def test_12_dense_state_dict_is_quantized_and_wrong_ones_are_refused(storage: str) -> None:
    plain = Mlp()
    model = enable_fp8_gemm(Mlp(), options=options(storage))
    model.load_state_dict(plain.state_dict())
    x = randn(3, 64)
    assert torch.equal(model(x), enable_fp8_gemm(plain, inplace=False)(x))
    state = OrderedDict(model.state_dict())
    del state["wi.weight_scale"]
    model.load_state_dict(state)  # the model's own entry, which has its scale
    state["wi.weight"] = state["wi.weight"].as_subclass(torch.Tensor)  # as from a file
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"wi.weight_scale\""):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"wi.zero\""):
        model.load_state_dict({**model.state_dict(), "wi.zero": torch.zeros(1, **CPU)})
    with pytest.raises(RuntimeError, match=r"size mismatch for wi.weight: the layer has \(96, 64\)"):
        model.load_state_dict({**model.state_dict(), "wi.weight": torch.zeros(2, 2, **CPU)})
    block = enable_fp8_gemm(Mlp(), options=options(storage, scheme="block"))
    with pytest.raises(RuntimeError, match="patch the model with the scheme that was saved"):
        block.load_state_dict(model.state_dict())


@by_storage
def test_13_meta_models(storage: str) -> None:
    model = enable_fp8_gemm(Mlp(), options=options(storage))
    empty = Mlp(device="meta")
    enable_fp8_gemm(empty, options=options(storage))
    assert empty(torch.empty(3, 64, dtype=torch.float32, device="meta")).shape == (3, 64)
    assert empty.state_dict()["wi.weight"].is_meta
    with pytest.raises(RuntimeError, match="is on meta: call to_empty"):
        empty.wo.load_state_dict(model.wo.state_dict())
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(model.state_dict(), assign=True)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    x = randn(3, 64)
    for twin in (empty, assigned):
        assert same_bytes(model, twin)
        assert torch.equal(twin(x), model(x))


def test_14_nothing_to_convert_is_never_silent() -> None:
    cases = [
        (nn.LayerNorm(8, **CPU), None, "nothing to convert: LayerNorm has no other layer with a matrix"),
        (nn.Conv2d(1, 1, 3, **CPU), None, "Conv2d has 1 other matrices, all kept .the model itself: a 3x3 convolution"),
        (Mlp(), "attention.*", r"pattern 'attention.\*' matches no layer"),
        (Mlp(), ["wi", "wx"], "pattern 'wx' matches no layer"),
        (
            Mlp(),
            lambda name, module: False,
            "nothing to convert: Mlp has 2 other matrices, all kept .wi: module_filter",
        ),
    ]
    for model, module_filter, message in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            enable_fp8_gemm(model, module_filter=module_filter)
        assert model.state_dict().keys() == before.keys()
        with pytest.warns(UserWarning, match=message):
            enable_fp8_gemm(model, module_filter=module_filter, options=FP8GemmOptions(strict=False))
    model = enable_fp8_gemm(Mlp())
    with pytest.raises(ValueError, match="2 layers on FP8 already"):
        enable_fp8_gemm(model)


@by_storage
def test_15_any_shape_and_stride_of_input(storage: str) -> None:
    plain = nn.Linear(6, 5, **CPU)
    model = enable_fp8_gemm(plain, options=options(storage), inplace=False)
    wide = randn(2, 3, 4, 12)
    inputs = [
        randn(6),
        randn(4, 6),
        randn(2, 3, 6),
        randn(2, 3, 4, 6),
        torch.empty(0, 6, **CPU),
        torch.empty(2, 0, 6, **CPU),
        wide[..., ::2],
        wide[..., 3:9],
        randn(6, 4).t(),
        randn(1, 6).expand(4, 6),
        randn(1, 1).expand(4, 6),
        randn(2, 6, 4, 4).to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
    ]
    for x in inputs:
        found, expected = model(x), plain(x)
        assert close(found, expected, 0.1)
        assert torch.equal(found, model(x.contiguous()))
    for wrong in (randn(4, 5), randn(7), torch.tensor(1.0, **CPU)):
        with pytest.raises(RuntimeError) as expected_error:
            plain(wrong)
        with pytest.raises(RuntimeError) as found_error:
            model(wrong)
        assert str(found_error.value) == str(expected_error.value)


@by_storage
def test_16_zeros_nan_and_outliers(storage: str) -> None:
    model = enable_fp8_gemm(nn.Linear(64, 32, **CPU), options=options(storage))
    x = randn(5, 64)
    clean = model(x)
    x[0], x[1, 3], x[2, 3], x[3, 3] = 0, float("nan"), float("inf"), 6.6e4
    y = model(x)
    assert torch.equal(y[0], model.bias)
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert torch.equal(y[4], clean[4])


def test_18_compiles_without_graph_breaks_or_recompilation() -> None:
    model = enable_fp8_gemm(Mlp())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 17, 64):
        x = randn(m, 64)
        assert close(compiled(x), model(x), 1e-5)
    assert counter.frame_count == 1
    static = torch.compile(model, fullgraph=True, dynamic=False)
    x = randn(2, 64, requires_grad=True)
    static(x).sum().backward()
    expected, x.grad = x.grad, None
    model(x).sum().backward()
    assert close(x.grad, expected, 1e-5)


def test_18_exports() -> None:
    model = enable_fp8_gemm(Mlp()).eval()
    x = randn(4, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    x = randn(9, 64)
    assert close(exported.module()(x), model(x), 1e-5)


def test_18_an_unmaterialized_model_is_quantized_before_its_trace() -> None:
    model = enable_fp8_gemm(Mlp(), options=options(materialize_fp8_on_wrap=False))
    x = randn(2, 64)
    y = torch.compile(model, fullgraph=True)(x)
    assert close(y, model(x), 1e-5)
    assert model.wi.materialized


@by_storage
def test_19_threads_and_replicas(storage: str) -> None:
    for _ in range(5):
        model = enable_fp8_gemm(Mlp(256, 256), options=options(storage, materialize_fp8_on_wrap=False))
        x, results, start = randn(3, 256), [], threading.Barrier(4)

        def run(model=model, x=x, results=results, start=start) -> None:
            start.wait()
            with torch.no_grad():
                results.append(model(x))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert all(torch.equal(result, results[0]) for result in results)
    replica = model.wi._replicate_for_data_parallel()
    replica.weight, replica.bias = model.wi.weight.detach(), model.wi.bias.detach()
    assert torch.equal(replica(x), model.wi(x))
    replica.weight = model.wi.weight.dequantize()  # the result of broadcasting it to another device
    assert close(replica(x), model.wi(x), 1e-2)


@by_storage
def test_20_undo(storage: str) -> None:
    model = Mlp()
    layers, weights, state = [model.wi, model.wo], [model.wi.weight, model.wo.weight], copy.deepcopy(model.state_dict())
    x = randn(3, 64)
    expected = model(x)
    enable_fp8_gemm(model, options=options(storage))
    model(x)
    returned, rows = disable_fp8_gemm(model)
    assert returned is model
    assert [model.wi, model.wo] == layers
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear]
    assert list(model.state_dict()) == list(state)
    if storage == "discard":
        assert close(model(x), expected)
        assert all(row.reason == "dequantized weight: the original was discarded" for row in rows.rows)
    else:
        assert torch.equal(model(x), expected)
        assert [model.wi.weight, model.wo.weight][0] is weights[0]
        assert all(row.reason == "original weight" for row in rows.rows)
    assert report(model).rows == ()
    assert set(vars(model.wi)) == set(vars(nn.Linear(1, 1, **CPU)))
    enable_fp8_gemm(model, options=options(storage))  # and again


@by_storage
@pytest.mark.parametrize("inplace", [True, False])
def test_21_an_exception_in_the_middle_changes_nothing(storage: str, inplace: bool, monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8, **CPU), nn.Linear(8, 8, **CPU), nn.Linear(8, 8, **CPU))
    x, state = randn(3, 8), {name: value.clone() for name, value in model.state_dict().items()}
    real, calls = selection.made, []

    def failing(linear, *args, **kwargs):
        calls.append(linear)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(linear, *args, **kwargs)

    monkeypatch.setattr(selection, "made", failing)
    expected = model(x)
    said = pytest.warns(UserWarning, match="2 of 3 layers, whose originals had been freed, came back dequantized")
    with (
        said if storage == "discard" and inplace else contextlib.nullcontext(),
        pytest.raises(KeyboardInterrupt),
    ):
        enable_fp8_gemm(model, options=options(storage), inplace=inplace)
    assert [type(layer) for layer in model] == [nn.Linear] * 3
    assert list(model.state_dict()) == list(state)
    if storage == "discard" and inplace:  # the discarded originals cannot be restored exactly
        assert close(model(x), expected)
    else:
        assert torch.equal(model(x), expected)
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_22_linears_that_are_not_plain_are_kept_with_a_reason() -> None:
    class Special(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight * 2, self.bias)

    with torch.no_grad():
        model = nn.ModuleDict(
            {
                "special": Special(4, 4),
                "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, **CPU)),
                "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4, **CPU)),
                "empty": nn.Linear(4, 1, **CPU),
                "integer": nn.Linear(4, 4, **CPU),
                "plain": nn.Linear(4, 4, **CPU),
            }
        )
    model["empty"].weight = nn.Parameter(torch.empty(0, 4, **CPU))
    model["integer"].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8, device="cpu"), requires_grad=False)
    enable_fp8_gemm(model)
    reasons = {row.name: row.reason for row in report(model).kept}
    assert reasons == {
        "special": "Special does more than multiply by it: self.weight * 2",
        "parametrized": "its weight is not a parameter but computed, as by weight_norm or spectral_norm",
        "spectral": "its weight is not a parameter but computed, as by weight_norm or spectral_norm",
        "empty": "its weight has no elements: (0, 4)",
        "integer": "its weight is torch.int8",
    }
    assert [row.name for row in report(model).converted] == ["plain"]
