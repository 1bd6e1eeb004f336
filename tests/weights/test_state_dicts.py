"""State dicts of modules with FP8 weights: bytes and scales for models patched alike, values for all others."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from owners import KINDS, dense, forget, in_fp8
from torch import nn

from fp8gemm import UnsupportedError
from fp8gemm.weights import FP8Weight, own_weights
from fp8gemm.weights.entry import FP8Entry

CASTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def values(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The parameters' dense values."""
    return {
        name: (parameter.to(dtype or parameter.dtype).dequantize() if isinstance(parameter, FP8Weight) else parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def through_torch(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(safetensors.torch.save({key: value.clone() for key, value in state.items()}))


WAYS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "as they are": lambda state: state,
    "clones": lambda state: {key: value.clone() for key, value in state.items()},
    "deepcopy": copy.deepcopy,
    "cast": lambda state: {key: value.float() for key, value in state.items()},
    "without scales": lambda state: {key: value for key, value in state.items() if not key.endswith("_scale")},
    "torch.save": through_torch,
    "safetensors": through_safetensors,
}


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("scheme", "storage"), [("row", "keep"), ("block", "discard"), ("tensor", "discard")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_patched_alike_takes_the_bytes(kind: str, scheme: str, storage: str, way: str, assign: bool) -> None:
    module, x = in_fp8(kind, scheme, storage)
    y, state = module(x), WAYS[way](module.state_dict())
    twin = forget(in_fp8(kind, scheme, storage)[0])
    twin.load_state_dict(state, assign=assign)
    assert torch.equal(twin(x), y)
    for (name, weight), (_, loaded) in zip(module.named_parameters(), twin.named_parameters(), strict=False):
        if isinstance(weight, FP8Weight):
            assert loaded.scaled().data.view(torch.uint8).equal(weight.scaled().data.view(torch.uint8)), name
            assert loaded.dtype == weight.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_scales_stand_right_behind_their_weight(kind: str) -> None:
    module, _ = in_fp8(kind)
    plain = dict(dense(kind)[0].state_dict())
    found = list(module.state_dict())
    ours = {name for name, p in module.named_parameters(remove_duplicate=False) if isinstance(p, FP8Weight)}
    assert found == [key for name in plain for key in ([name, f"{name}_scale"] if name in ours else [name])]
    for name in ours:
        entry = module.state_dict()[name]
        assert (entry.shape, entry.dtype) == (plain[name].shape, torch.float8_e4m3fn)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_save_model_and_load_model(kind: str, tmp_path: Path) -> None:
    module, x = in_fp8(kind)
    y = module(x)
    safetensors.torch.save_model(module, str(tmp_path / "model"))
    twin = forget(in_fp8(kind)[0])
    assert safetensors.torch.load_model(twin, tmp_path / "model") == (set(), [])
    assert torch.equal(twin(x), y)


def test_what_does_not_fit_is_said_and_changes_nothing() -> None:
    module, x = in_fp8("linear")
    y, state = module(x), dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight_scale: scheme .* has"):
        in_fp8("linear", "block")[0].load_state_dict(state)
    cases = {
        "Missing key.*0.weight_scale": {**through_torch(state), "0.weight_scale": None},
        "Missing key.*0.weight_scale.*0.weight": {**state, "0.weight": None, "0.weight_scale": None},
        r"size mismatch for 0.weight: the layer has \(64, 64\)": {**state, "0.weight": torch.zeros(4, 4)},
    }
    for message, changed in cases.items():
        given = {key: value for key, value in changed.items() if value is not None}
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            module.load_state_dict({key: given[key] for key in given if key.startswith("0.")} | _rest(given))
        assert torch.equal(module(x), y)


def _rest(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("0.")}


@pytest.mark.parametrize("assign", [False, True])
def test_dense_values_are_quantized_again(assign: bool) -> None:
    module, x = in_fp8("linear")
    twin = forget(in_fp8("linear")[0])
    twin.load_state_dict(dense("linear")[0].state_dict(), assign=assign)
    assert torch.equal(twin(x), module(x))


@torch.no_grad()
def test_an_entry_is_copied_into_an_fp8_weight() -> None:
    module, x = in_fp8("linear")
    y, state = module(x), module.state_dict()
    twin = forget(in_fp8("linear")[0])
    for name, parameter in twin.named_parameters():
        parameter.copy_(state[name])
    assert torch.equal(twin(x), y)
    assert torch.equal(twin[0].weight + state["0.weight"], 2 * module[0].weight)
    twin[0].weight.copy_(state["0.weight"].bfloat16())
    expected = module[0].weight.to(torch.bfloat16).dequantize().float()
    assert (twin[0].weight - expected).norm() <= 2**-8 * expected.norm()


# --- models that know nothing of FP8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [None, *CASTS])
@pytest.mark.parametrize("kind", ["linear", "turned"])
def test_a_plain_model_gets_values_and_never_codes(kind: str, dtype: torch.dtype | None, meta: bool) -> None:
    module, x = in_fp8(kind)
    state = module.state_dict()
    state = state if dtype is None else {key: value.to(dtype) for key, value in state.items()}
    with torch.device("meta" if meta else "cpu"):
        plain = dense(kind)[0].to(dtype or torch.float32)
    plain.load_state_dict(state, strict=False, assign=meta)
    for name, expected in values(module, dtype).items():
        found = plain.get_parameter(name)
        assert type(found) is nn.Parameter
        assert found.requires_grad
        assert torch.equal(found, expected.to(found.dtype)), name
    plain(x.to(dtype or torch.float32)).sum().backward()  # an ordinary model
    assert all(parameter.grad is not None for parameter in plain.parameters())


@pytest.mark.parametrize("dtype", CASTS)
def test_a_cast_state_dict_is_a_dense_one_in_files(dtype: torch.dtype) -> None:
    module, _ = in_fp8("turned")
    expected = values(module, dtype)
    cast = {key: value.to(dtype) for key, value in module.state_dict().items() if not key.endswith("_scale")}
    for found in (through_torch(dict(cast)), safetensors.torch.load(safetensors.torch.save(cast))):
        assert found.keys() == expected.keys()
        assert all(type(value) is torch.Tensor and torch.equal(value, expected[key]) for key, value in found.items())


EQUAL_TO_DENSE: dict[str, Callable[[Any], Any]] = {
    "v * 2": lambda v: v * 2,
    "2 - v": lambda v: 2 - v,
    "v + v": lambda v: v + v,
    "v.float()": lambda v: v.float(),
    "v.half()": lambda v: v.half(),
    "v.type(bfloat16)": lambda v: v.type(torch.bfloat16),
    "v.float().clone().mul_(3)": lambda v: v.float().clone().mul_(3),
    "v.float()[0]": lambda v: v.float()[0],
    "v.T": lambda v: v.T,
    "v[3:5]": lambda v: v[3:5],
    "v.view(-1)": lambda v: v.view(-1),
    "v.reshape(-1, 2)": lambda v: v.reshape(-1, 2),
    "cat": lambda v: torch.cat([v, v]),
    "mean": lambda v: v.mean(),
    "norm": lambda v: torch.linalg.norm(v),
    "int": lambda v: (v.float() * 100).int(),
    "ema, add_": lambda v: torch.zeros_like(v, dtype=torch.float32).mul_(0.9).add_(v, alpha=0.1),
    "ema, lerp_": lambda v: torch.ones(64, 64).lerp_(v.float(), 0.5),
    "ema, foreach": lambda v: torch._foreach_add([torch.ones(64, 64)], [v])[0],
    "out=": lambda v: torch.add(v, 1, out=torch.empty(64, 64)),
    "t[:] = v": lambda v: torch.empty(64, 64).copy_(v),
    "numpy": lambda v: torch.from_numpy(v.float().numpy()),
    "tolist": lambda v: torch.tensor(v.tolist()),
    "product": lambda v: torch.ones(2, 64) @ v.float(),
}


@torch.no_grad()
@pytest.mark.parametrize("use", EQUAL_TO_DENSE)
def test_computing_with_an_entry_is_computing_with_values(use: str) -> None:
    module, _ = in_fp8("linear")
    expected = EQUAL_TO_DENSE[use](values(module)["0.weight"])
    found = EQUAL_TO_DENSE[use](module.state_dict()["0.weight"])
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_an_entry_is_compared_with_bytes_by_bytes_and_with_values_by_values() -> None:
    state = in_fp8("linear")[0].state_dict()
    entry, filed = state["0.weight"], through_safetensors(state)["0.weight"]
    assert type(filed) is torch.Tensor
    assert torch.equal(entry, filed)
    assert (filed == entry).all()
    assert torch.equal(entry, entry.clone())
    assert torch.equal(entry.float(), entry.weight.dequantize())
    assert not torch.equal(entry.float(), filed.float())
    raw = torch.zeros(64, 64, dtype=torch.float8_e4m3fn).copy_(entry)
    assert torch.equal(raw.view(torch.uint8), filed.view(torch.uint8))


def test_a_cast_entry_takes_no_memory_until_it_is_looked_at() -> None:
    module, _ = in_fp8("linear")
    entry = module.state_dict()["0.weight"].bfloat16()
    assert isinstance(entry.detach().clone(), FP8Entry)
    assert (entry.shape, entry.dtype) == ((64, 64), torch.bfloat16)
    assert module[0].weight.activity.dequantizations == 0
    assert isinstance(FP8Weight(entry, requires_grad=False), FP8Weight)  # as libraries create a parameter like another
    assert module[0].weight.activity.dequantizations == 0
    assert entry.is_contiguous()
    assert type(entry) is torch.Tensor
    assert torch.equal(entry, module[0].weight.to(torch.bfloat16).dequantize())


WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda v: v.mul_(2),
    "zero_": lambda v: v.zero_(),
    "copy_": lambda v: v.copy_(torch.zeros(64, 64)),
    "__setitem__": lambda v: v.__setitem__(0, 1),
    "iadd": lambda v: v.__iadd__(1),
    "out": lambda v: torch.add(v, 1, out=v),
    "foreach": lambda v: torch._foreach_mul_([v], 2),
    "data": lambda v: v.data.mul_(2),
    "data =": lambda v: setattr(v, "data", torch.zeros(64, 64)),
    "requires_grad =": lambda v: setattr(v, "requires_grad", True),
    "init": lambda v: nn.init.zeros_(v),
    "resize_": lambda v: v.resize_(3),
    "detach": lambda v: v.detach().add_(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_an_entry_is_refused(write: str) -> None:
    module, _ = in_fp8("linear")
    before = module[0].weight.dequantize()
    entry = module.state_dict()["0.weight"]
    with pytest.raises(UnsupportedError, match="would write to the FP8 bytes of a state dict and leave their scales"):
        WRITES[write](entry)
    assert torch.equal(entry.float(), before)
    assert torch.equal(module[0].weight.dequantize(), before)


def test_bytes_without_scales_are_no_weight() -> None:
    entry = in_fp8("linear")[0].state_dict()["0.weight"]
    with pytest.raises(UnsupportedError, match=r"read back without their scales; use accelerate\.cpu_offload"):
        entry.view(torch.int8)
    with pytest.raises(UnsupportedError, match="FP8 bytes are no weight without their scales; dequantize"):
        FP8Weight(torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
    assert entry.view(torch.uint8).dtype == torch.uint8


@torch.no_grad()
def test_an_entry_is_the_weight_as_it_was() -> None:
    module, x = in_fp8("linear")
    y, before = module(x), module[0].weight.dequantize()
    state = module.state_dict()
    module[0].weight.mul_(2)
    module(x)
    assert torch.equal(state["0.weight"].float(), before)
    module.load_state_dict(state)
    assert torch.equal(module(x), y)


@torch.no_grad()
def test_a_checkpoint_is_read_into_a_state_dict_in_place() -> None:
    """Loads in place before load_state_dict, as torch.distributed.checkpoint.load does."""
    module, x = in_fp8("turned")
    y, filed = module(x), through_torch(module.state_dict())
    twin = forget(in_fp8("turned")[0])
    held = [weight.dequantize() for _, weight in own_weights(twin)]
    state = twin.state_dict()
    for key, value in filed.items():
        state[key].copy_(value)
    assert all(torch.equal(weight.dequantize(), w) for (_, weight), w in zip(own_weights(twin), held, strict=True))
    plain = dense("turned")[0]
    plain.load_state_dict(state, strict=False)
    assert torch.equal(plain.down_proj, module.down_proj.dequantize())
    twin.load_state_dict(state)
    assert torch.equal(twin(x), y)
