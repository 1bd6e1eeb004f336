"""Loading: FP8 bytes arrive as they are, the rest in the model's dtype, and nothing is silently left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, Net, compressed, e8m0, fp8, net_tensors, powers, scales, write
from safetensors.torch import load_file, save_file
from torch import nn

from fp8gemm import ROW, CheckpointError, FP8GemmOptions, FP8Linear, Scheme, UnsupportedError
from fp8gemm.checkpoint import load_checkpoint, open_checkpoint, quantize_checkpoint

CHANNEL = compressed("channel", "token")


def rows_net(folder: Path) -> Path:
    return write(
        folder, {**net_tensors(), "up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)}, CHANNEL
    )


def static_net(folder: Path) -> Path:
    inputs = {"up.input_scale": torch.tensor([0.5]), "down.input_scale": torch.tensor([0.25])}
    one = {"up.weight_scale": scales(1), "down.weight_scale": scales(1, seed=9)}
    return write(folder, {**net_tensors(), **one, **inputs}, compressed("tensor", "tensor"))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("meta", [False, True])
def test_layers_hold_exactly_the_bytes_of_the_file(meta: bool, tmp_path: Path) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Net()
    up = model.up
    report = load_checkpoint(model, rows_net(tmp_path))
    assert model.up is up
    assert isinstance(model.up, FP8Linear)
    assert isinstance(model.down, FP8Linear)
    tensors = net_tensors()
    for name, layer, seed in (("up", model.up, 1), ("down", model.down, 1)):
        assert same_bytes(layer.scaled().data, tensors[f"{name}.weight"])
        assert torch.equal(layer.scaled().scale, scales(layer.out_features, 1, seed=seed))
        assert layer.compute_dtype == torch.bfloat16
        assert layer.original_weight is None
    assert torch.equal(model.up.bias, tensors["up.bias"])
    assert torch.equal(model.norm.weight, tensors["norm.weight"])
    assert [row.name for row in report.converted] == ["up", "down"]
    assert (report.format, report.missing, report.unexpected, report.dequantized) == ("compressed-tensors", (), (), ())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_loaded_model_computes_what_the_dequantized_one_does(tmp_path: Path) -> None:
    folder = rows_net(tmp_path)
    model, dense = Net(torch.float32), Net(torch.float32)
    load_checkpoint(model, folder, options=FP8GemmOptions(scheme="weight_only", engine="reference"))
    load_checkpoint(dense, folder, dequantize=True)
    assert type(dense.up) is nn.Linear
    assert isinstance(model.up, FP8Linear)
    assert model.up.scheme.activation is None
    checkpoint = open_checkpoint(folder)
    assert torch.equal(dense.up.weight, checkpoint.dequantize("up.weight"))
    x = torch.randn(5, 160)
    # Float32 sums of 160 products in another order: 160 * 2**-24, and the same again behind the norm.
    torch.testing.assert_close(model(x), dense(x), rtol=2 * 160 * 2**-24, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantizing_rounds_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Net(dtype)
    report = load_checkpoint(model, rows_net(tmp_path), dequantize=True)
    assert torch.equal(model.up.weight, open_checkpoint(tmp_path).dequantize("up.weight").to(dtype))
    assert model.norm.weight.dtype == dtype
    assert set(report.dequantized) == {"up.weight", "down.weight"}
    assert [row.reason for row in report.kept] == ["FP8 in the checkpoint, dequantized"] * 2


def test_static_scales_arrive(tmp_path: Path) -> None:
    model = Net()
    load_checkpoint(model, static_net(tmp_path))
    assert isinstance(model.up, FP8Linear)
    assert model.up.scheme.static
    assert float(model.up.input_scale) == 0.5


def test_powers_of_two_stay_declared_only_where_they_are(tmp_path: Path) -> None:
    config = {**BLOCKS, "scale_fmt": "ue8m0"}
    tensors = {**net_tensors(), "up.weight_scale_inv": e8m0(powers(1, 2)), "down.weight_scale_inv": scales(2, 1)}
    model = Net()
    load_checkpoint(model, write(tmp_path, tensors, config))
    assert isinstance(model.up, FP8Linear)
    assert isinstance(model.down, FP8Linear)
    assert (model.up.scheme.scale_format, model.down.scheme.scale_format) == ("ue8m0", "float32")


# ---- names


def test_missing_and_unexpected_names_are_one_error(tmp_path: Path) -> None:
    tensors = {**net_tensors(), "up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)}
    del tensors["norm.bias"]
    folder = write(tmp_path, {**tensors, "head.weight": torch.ones(2), "gone.weight_scale": torch.ones(1)}, CHANNEL)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(Net(), folder)
    text = str(error.value)
    assert "not in the checkpoint: norm.bias" in text
    assert "not in the model: head.weight" in text
    assert "scales that belong to no known weight: gone.weight_scale" in text
    assert "key_mapping" in text
    model = Net()
    with torch.no_grad():
        model.norm.bias.fill_(7)
    report = load_checkpoint(model, folder, strict=False)
    assert (report.missing, report.unexpected) == (("norm.bias",), ("gone.weight_scale", "head.weight"))
    assert bool((model.norm.bias == 7).all())
    assert "gone.weight_scale" in str(report)
    assert report.to_dict()["missing"] == ("norm.bias",)


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = write(tmp_path, {**net_tensors(), "up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1),
                              "norm.weight": torch.ones(5)}, CHANNEL)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"norm\.weight: \[5\] in the file, \[96\] in the model"):
        load_checkpoint(model, folder)
    with pytest.raises(UnsupportedError, match=r"^(up|down)\.weight: "):
        load_checkpoint(model, rows_net(tmp_path / "b"), options=FP8GemmOptions(engine="vllm"), device="meta")
    assert type(model.up) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_key_mapping_renames(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"inner": Net()})
    load_checkpoint(outer, rows_net(tmp_path), key_mapping={r"^": "inner."})
    assert isinstance(outer["inner"].up, FP8Linear)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(160, 192 + 64 + 64, bias=False)


MAPPING = {r"^q\.": "qkv.", r"^k\.": "qkv.", r"^v\.": "qkv."}
PARTS = {"q": 192, "k": 64, "v": 64}


@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
def test_several_names_become_one_fused_weight(kind: str, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for seed, (name, n) in enumerate(PARTS.items()):
        tensors[f"{name}.weight"] = fp8(n, 160, seed=seed)
        grid = {"tensor": (1,), "row": (n, 1), "block": (-(-n // 128), 2)}[kind]
        tensors[f"{name}.weight_scale"] = scales(*grid, seed=seed)
        if kind == "tensor":
            tensors[f"{name}.input_scale"] = torch.tensor([0.5 * (seed + 1)])
    config = {
        "tensor": compressed("tensor", "tensor"),
        "row": CHANNEL,
        "block": compressed("block", "token", block_structure=[128, 128]),
    }[kind]
    folder = write(tmp_path, tensors, config)
    model, dense = Fused(), Fused()
    load_checkpoint(model, folder, key_mapping=MAPPING)
    load_checkpoint(dense, folder, key_mapping=MAPPING, dequantize=True)
    checkpoint = open_checkpoint(folder)
    answer = torch.cat([checkpoint.dequantize(f"{name}.weight") for name in PARTS])
    assert torch.equal(dense.qkv.weight, answer)
    assert isinstance(model.qkv, FP8Linear)
    assert torch.equal(model.qkv.weight.dequantize(), answer)
    if kind == "tensor":
        assert float(model.qkv.input_scale) == 1.5, "the largest: no activation saturates that did not before"


def test_fused_names_without_an_order_are_refused(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, n in PARTS.items():
        tensors |= {f"{name}.weight": fp8(n, 160), f"{name}.weight_scale": scales(n, 1)}
    with pytest.raises(
        CheckpointError, match=r"all become qkv\.weight, in no defined order; give key_mapping one pattern"
    ):
        load_checkpoint(Fused(), write(tmp_path, tensors, CHANNEL), key_mapping={r"^[qkv]\.": "qkv."})


# ---- shared tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_stay_one(meta: bool, tmp_path: Path) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Tied()
    w = torch.randn(64, 32)
    load_checkpoint(model, write(tmp_path, {"embed.weight": w}))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, w)


def test_a_quantized_head_leaves_the_embedding_it_shared(tmp_path: Path) -> None:
    w = torch.randn(64, 32)
    model = Tied()
    load_checkpoint(
        model,
        write(tmp_path, {"embed.weight": w, "head.weight": fp8(64, 32), "head.weight_scale": scales(64, 1)}, CHANNEL),
    )
    assert isinstance(model.head, FP8Linear)
    assert torch.equal(model.embed.weight, w)


def test_only_the_head_on_disk_fills_both(tmp_path: Path) -> None:
    model = Tied()
    folder = write(tmp_path, {"head.weight": fp8(64, 32), "head.weight_scale": scales(64, 1)}, CHANNEL)
    report = load_checkpoint(model, folder)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, open_checkpoint(folder).dequantize("head.weight"))
    assert report.dequantized == ("embed.weight",)


def test_different_values_for_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"embed.weight": torch.zeros(64, 32), "head.weight": torch.ones(64, 32)})
    with pytest.raises(CheckpointError, match=r"one tensor in the model but differ in the checkpoint"):
        load_checkpoint(Tied(), folder)


def test_a_module_used_twice_is_filled_once(tmp_path: Path) -> None:
    shared = nn.Linear(160, 96, bias=False)
    model = nn.ModuleDict({"a": shared, "b": shared})
    load_checkpoint(model, write(tmp_path, {"a.weight": fp8(96, 160), "a.weight_scale": scales(96, 1)}, CHANNEL))
    assert isinstance(model["a"], FP8Linear)
    assert model["a"] is model["b"]


# ---- experts


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(128, 3, bias=False)
        self.mlp.experts = nn.Module()
        self.mlp.experts.gate_up_proj = nn.Parameter(torch.empty(3, 384, 128, dtype=torch.bfloat16))
        self.mlp.experts.down_proj = nn.Parameter(torch.empty(3, 128, 192, dtype=torch.bfloat16))


def moe(names: tuple[str, str, str], block: str) -> dict[str, torch.Tensor]:
    tensors = {f"{block}.gate.weight": torch.randn(3, 128)}
    for e in range(3):
        for index, (name, n, k) in enumerate(zip(names, (192, 192, 128), (128, 128, 192), strict=True)):
            tensors[f"{block}.experts.{e}.{name}.weight"] = fp8(n, k, seed=10 * e + index)
            tensors[f"{block}.experts.{e}.{name}.weight_scale"] = scales(n, 1, seed=10 * e + index)
    return tensors


@pytest.mark.parametrize(
    ("names", "block"),
    [
        (("gate_proj", "up_proj", "down_proj"), "mlp"),
        (("w1", "w3", "w2"), "block_sparse_moe"),
        (("gate_proj", "up_proj", "down_proj"), "block_sparse_moe"),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_per_expert_names_fill_stacked_parameters(
    names: tuple[str, str, str], block: str, dense: bool, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": Experts()})
    tensors = {f"layer.{key}": tensor for key, tensor in moe(names, block).items()}
    report = load_checkpoint(model, write(tmp_path, tensors, CHANNEL), dequantize=dense)
    stacked = model["layer"].mlp.experts
    checkpoint = open_checkpoint(tmp_path)
    for e in range(3):
        gate, up, down = (
            checkpoint.dequantize(f"layer.{block}.experts.{e}.{name}.weight", torch.bfloat16) for name in names
        )
        assert torch.equal(stacked.gate_up_proj[e] + 0, torch.cat([gate, up]))
        assert torch.equal(stacked.down_proj[e] + 0, down)
        if not dense:
            held = stacked.down_proj.scaled()
            source = tensors[f"layer.{block}.experts.{e}.{names[2]}.weight"]
            assert torch.equal(held.data[e].view(torch.uint8), source.view(torch.uint8))
    assert torch.equal(model["layer"].mlp.gate.weight, tensors[f"layer.{block}.gate.weight"])
    stacks = ["layer.mlp.experts.down_proj", "layer.mlp.experts.gate_up_proj"]
    assert sorted(report.dequantized) == (stacks if dense else [])
    assert sorted(row.name for row in report.converted) == ([] if dense else stacks)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    tensors = moe(("gate_proj", "up_proj", "down_proj"), "mlp")
    for part in ("weight", "weight_scale"):
        del tensors[f"mlp.experts.1.up_proj.{part}"]
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: mlp\.experts\.gate_up_proj"):
        load_checkpoint(Experts(), write(tmp_path, tensors, CHANNEL))


# ---- buffers


class Rotary(nn.Module):
    def __init__(self, *, computes: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        if computes:
            self._init_weights = self._compute

    def _compute(self, module: nn.Module) -> None:
        if module is self:
            self.frequencies.copy_(torch.arange(4.0))


def test_transient_buffers_on_meta_are_computed_or_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"linear.weight": torch.ones(4, 4)})
    with torch.device("meta"):
        able, unable = Rotary(computes=True), Rotary(computes=False)
    load_checkpoint(able, folder)
    assert torch.equal(able.frequencies, torch.arange(4.0))
    with pytest.raises(ValueError, match="buffers on meta that no checkpoint holds and that it cannot compute: freq"):
        load_checkpoint(unable, folder)
    assert unable.linear.weight.is_meta


@pytest.mark.parametrize("dequantized", [False, True])
def test_a_model_with_fp8_layers_takes_another_checkpoint(dequantized: bool, tmp_path: Path) -> None:
    first, second = rows_net(tmp_path / "first"), static_net(tmp_path / "second")
    model, fresh = Net(), Net()
    load_checkpoint(model, first)
    x = torch.randn(3, 160, dtype=torch.bfloat16)
    for _ in range(3):
        before = model(x)
    for net in (model, fresh):
        load_checkpoint(net, second, dequantize=dequantized)
    assert {type(layer) for layer in (model.up, model.down)} == {nn.Linear if dequantized else FP8Linear}
    assert torch.equal(model(x), fresh(x))
    assert not torch.equal(model(x), before)


def test_dense_values_are_quantized_into_fp8_layers(tmp_path: Path) -> None:
    """They take the place of the weight's values; the layer stays FP8."""
    model, dense = Net(), Net()
    load_checkpoint(model, rows_net(tmp_path / "fp8"))
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    load_checkpoint(model, tmp_path / "dense.safetensors")
    assert isinstance(model.up, FP8Linear)
    error = (model.up.weight.dequantize() - dense.up.weight).norm() / dense.up.weight.norm()
    assert error < 0.05


def test_a_file_that_does_not_fit_leaves_fp8_layers_alone(tmp_path: Path) -> None:
    model = Net()
    load_checkpoint(model, rows_net(tmp_path / "fp8"))
    x = torch.randn(3, 160, dtype=torch.bfloat16)
    expected = model(x)
    save_file({"up.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError):
        load_checkpoint(model, tmp_path / "other.safetensors")
    assert torch.equal(model(x), expected)


def test_raw_casts_load_with_their_fp8_biases(tmp_path: Path) -> None:
    tensors = {
        f"model.diffusion_model.{key}": tensor.to(torch.float8_e5m2) for key, tensor in net_tensors().items()
    } | {"vae.weight": torch.ones(3, 3)}
    model = Net()
    report = load_checkpoint(model, write(tmp_path, tensors) / "model.safetensors")
    assert isinstance(model.up, FP8Linear)
    assert model.up.scaled().data.dtype == torch.float8_e5m2
    assert torch.equal(model.up.bias, net_tensors()["up.bias"].to(torch.float8_e5m2).bfloat16())
    assert report.unexpected == (), "what lies outside of the prefix belongs to another model"


# ---- memory

MEASURE = """
import sys, threading, torch
from safetensors.torch import load_file
from torch import nn
from fp8gemm import FP8GemmOptions
from fp8gemm.checkpoint import load_checkpoint

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
warm = nn.Linear(256, 256)
peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(16)))
base = anonymous()
peak = base
thread = threading.Thread(target=watch, daemon=True); thread.start()
options = FP8GemmOptions(engine="reference", scheme="weight_only")
load_checkpoint(model, sys.argv[1], options=options, dequantize=sys.argv[2] == "dense")
done.set(); thread.join()
print(max(peak, anonymous()) - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("kind", ["fp8", "dense"])
def test_peak_memory_is_the_model_and_one_tensor(kind: str, tmp_path: Path) -> None:
    """16 matrices of 2048 x 2048: FP8 they are 64 MiB, in bfloat16 128 MiB. The files' pages are not anonymous."""
    source = {f"{i}.weight": torch.randn(2048, 2048).bfloat16() for i in range(16)}
    quantize_checkpoint(write(tmp_path / "bf16", source), tmp_path / "fp8")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "fp8"), kind],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    largest = 2048 * 2048 * (2 if kind == "dense" else 1)
    size = 16 * largest
    # 12 MiB for what is widened at once (1 MiB in float32, a few times), and for what modules that are imported and
    # threads that are started on the way take.
    assert size <= int(ran.stdout) <= size + largest + 12 * 2**20


EXPERTS = """
    def layer():
        owner = nn.Module()
        owner.experts = nn.Module()
        owner.experts.gate_up_proj = nn.Parameter(torch.empty(16, 512, 512, dtype=torch.bfloat16))
        owner.experts.down_proj = nn.Parameter(torch.empty(16, 512, 256, dtype=torch.bfloat16))
        return owner
    model = nn.ModuleList(layer() for _ in range(16))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_experts_never_take_more_than_three_fifths_of_their_dense_bytes(tmp_path: Path) -> None:
    """Per-expert files into stacks, on the engine that auto takes: nothing is widened, only one expert lies beside."""
    sizes = {"gate_proj": (256, 512), "up_proj": (256, 512), "down_proj": (512, 256)}
    source = {
        f"{i}.experts.{e}.{part}.weight": torch.randn(size).bfloat16()
        for i in range(16)
        for e in range(16)
        for part, size in sizes.items()
    }
    dense = sum(tensor.nbytes for tensor in source.values())
    quantize_checkpoint(write(tmp_path / "bf16", source), tmp_path / "fp8")
    linears = next(line for line in MEASURE.splitlines() if "nn.Sequential" in line)
    script = MEASURE.replace(linears + "\n", EXPERTS.lstrip("\n")).replace('engine="reference", ', "")
    assert script != MEASURE
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "fp8"), "fp8"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert dense / 2 <= int(ran.stdout) <= 0.60 * dense


def test_options_choose_the_engine(tmp_path: Path) -> None:
    model = Net()
    load_checkpoint(model, rows_net(tmp_path), options=FP8GemmOptions(engine="reference"))
    assert isinstance(model.up, FP8Linear)
    assert model.up.engine == "reference"
    assert model.up.scheme == Scheme(weight=model.up.scheme.weight, activation=model.up.scheme.weight)


def test_transformers_names_that_models_ignore(tmp_path: Path) -> None:
    class Ignoring(Net):
        _keys_to_ignore_on_load_unexpected = (r"^mtp\.",)
        _keys_to_ignore_on_load_missing = (r"norm\.bias",)

    tensors: dict[str, Any] = {**net_tensors(), "up.weight_scale": scales(96, 1), "down.weight_scale": scales(160, 1)}
    del tensors["norm.bias"]
    report = load_checkpoint(Ignoring(), write(tmp_path, {**tensors, "mtp.weight": torch.ones(2)}, CHANNEL))
    assert report.missing == report.unexpected == ()


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_static_scales_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    folder = static_net(tmp_path)
    tensors = {**open_tensors(folder), "up.input_scale": torch.tensor([value])}
    write(folder, tensors, compressed("tensor", "tensor"))
    with pytest.raises(CheckpointError, match=r"up.input_scale must be finite and positive, found \["):
        load_checkpoint(Net(), folder)


def open_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_static_experts_are_scaled_by_token(tmp_path: Path) -> None:
    """Grouped products take no activation scale of each expert; a scale a token is finer than what the file asks."""
    tensors = moe(("gate_proj", "up_proj", "down_proj"), "mlp")
    for name in [key for key in tensors if key.endswith("_scale")]:
        tensors[name] = scales(1)
        tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([0.5])
    model = Experts()
    load_checkpoint(model, write(tmp_path, tensors, compressed("tensor", "tensor")))
    for stack in ("gate_up_proj", "down_proj"):
        scheme = getattr(model.mlp.experts, stack).scheme
        assert (scheme.activation, scheme.static) == (ROW, False)
