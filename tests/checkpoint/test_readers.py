"""Converting for a program: into the format that it takes with the scales of the source, or an error that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BLOCKS, compressed, e8m0, fp8, powers, scales, write
from safetensors.torch import load_file

from fp8gemm import MX, TENSOR, Scheme, UnsupportedError, convert_checkpoint, open_checkpoint, quantize_checkpoint
from fp8gemm.checkpoint.readers import READERS
from fp8gemm.cli import main
from fp8gemm.formats import Written, writer
from fp8gemm.formats.base import natural_activation

GROUPED = {"strategy": "group", "num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "group_size": 32}
MXFP8 = compressed("group", "group", group_size=32, scale_dtype="torch.uint8")
MXFP8["config_groups"]["group_0"]["input_activations"] = GROUPED
# scheme -> the scales of a weight [n, k] under their names, and the config
SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "row": (lambda n, k: {"weight_scale": scales(n, 1)}, compressed("channel", "token")),
    "weight-only": (lambda n, k: {"weight_scale": scales(n, 1)}, compressed("channel", None)),
    "row, static": (
        lambda n, k: {"weight_scale": scales(n, 1), "input_scale": scales(1)},
        compressed("channel", "tensor"),
    ),
    "tensor": (lambda n, k: {"weight_scale": scales(1)}, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "block": (lambda n, k: {"weight_scale_inv": scales(-(-n // 128), -(-k // 128))}, BLOCKS),
    "MXFP8": (lambda n, k: {"weight_scale": e8m0(powers(n, k // 32))}, MXFP8),
}
DENSE, EXPERT = "layers.0.mlp.down_proj", "layers.0.mlp.experts.0.down_proj"
CT, FINE, COMFY = "compressed-tensors", "fine-grained", "comfy"


def checkpoint(folder: Path, scheme: str, *modules: str, shape: tuple[int, int] = (256, 128), **config: Any) -> Path:
    """FP8 weights of this scheme, and one dense weight."""
    made, described = SCHEMES[scheme]
    tensors = {"norm.weight": torch.ones(128)}
    for module in modules:
        tensors[f"{module}.weight"] = fp8(*shape)
        tensors |= {f"{module}.{name}": scale for name, scale in made(*shape).items()}
    return write(folder, tensors, described, model_config=config)


@pytest.mark.parametrize(
    ("reader", "scheme", "dense", "expert"),
    [
        ("vllm", "row", CT, CT),
        ("vllm", "weight-only", CT, None),
        ("vllm", "row, static", CT, None),
        ("vllm", "tensor", CT, CT),
        ("vllm", "block", FINE, FINE),
        ("vllm", "MXFP8", CT, CT),
        ("sglang", "row", CT, CT),
        ("sglang", "weight-only", CT, None),
        ("sglang", "block", FINE, FINE),
        ("sglang", "MXFP8", None, None),
        ("transformers", "row", CT, CT),
        ("transformers", "weight-only", CT, CT),
        ("transformers", "block", FINE, FINE),
        ("transformers", "MXFP8", FINE, FINE),
        ("comfyui", "tensor", COMFY, COMFY),
        ("comfyui", "MXFP8", COMFY, COMFY),
        ("comfyui", "row", None, None),
        ("comfyui", "block", None, None),
    ],
)
def test_the_format_that_a_program_takes(
    reader: Any, scheme: str, dense: str | None, expert: str | None, tmp_path: Path
) -> None:
    for module, format in ((DENSE, dense), (EXPERT, expert)):
        source, out = checkpoint(tmp_path / f"{module}-in", scheme, module), tmp_path / module
        if format is None:
            with pytest.raises(UnsupportedError, match=f"(?s)cannot convert for .*{module}"):
                convert_checkpoint(source, out, reader=reader)
            assert not out.exists()
            continue
        report = convert_checkpoint(source, out, reader=reader)
        assert (report.format, report.layers) == (format, (module,))
        before, after = open_checkpoint(source), open_checkpoint(out)
        name = f"{module}.weight"
        assert torch.equal(before[name].data.float(), after[name].data.float())  # type: ignore[union-attr]
        assert torch.equal(before[name].scale, after[name].scale)  # type: ignore[union-attr]
        assert before.layers[name].scheme == after.layers[name].scheme


@pytest.mark.parametrize("reader", READERS)
def test_every_row_of_the_table_can_be_written(reader: str) -> None:
    for taken in READERS[reader].takes:
        for way in {*taken.linear, *taken.experts}:
            activation = {"weight-only": None, "static": TENSOR, "dynamic": natural_activation(taken.weight)}[way]
            scale_format: Any = "ue8m0" if taken.weight == MX else "float32"
            scheme = Scheme(
                weight=taken.weight, activation=activation, static=way == "static", scale_format=scale_format
            )
            layers = {"layer": Written(scheme=scheme, shape=(256, 128))}
            assert writer(taken.format).refuses(layers) == []
            assert READERS[reader].refuses(taken.format, layers if way in taken.linear else {}) == []


def test_the_error_says_what_is_taken_and_what_works(tmp_path: Path) -> None:
    modules = [f"layers.{index}.mlp.down_proj" for index in range(9)]
    source = checkpoint(tmp_path / "in", "block", *modules)
    with pytest.raises(UnsupportedError) as raised:
        convert_checkpoint(source, tmp_path / "out", reader="comfyui")
    text = str(raised.value)
    assert "ComfyUI takes tensor or 1x32 scales in this format, found weight 128x128, activation 1x128" in text
    assert "and 6 more" in text
    assert "comfy with tensor scales (dynamic, static, weight-only" in text
    assert "fp8gemm quantize --scheme tensor" in text


def test_a_format_that_is_asked_for_is_the_one(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "block", DENSE)
    assert convert_checkpoint(source, tmp_path / "out", reader="vllm", format=CT).format == CT
    with pytest.raises(UnsupportedError, match="cannot convert for vLLM as comfy") as raised:
        convert_checkpoint(source, tmp_path / "no", reader="vllm", format="comfy")
    assert "vLLM takes:\n  fine-grained with 128x128 scales" in str(raised.value)
    with pytest.raises(ValueError, match="reader must be one of vllm, sglang, transformers, comfyui, found 'tgi'"):
        convert_checkpoint(source, tmp_path / "no", reader="tgi")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reader", "module", "shape", "format"),
    [
        ("vllm", "self_attn.q_proj", (192, 128), None),  # the scales of k_proj would begin inside a block
        ("vllm", "self_attn.v_proj", (192, 128), FINE),
        ("sglang", "self_attn.v_proj", (192, 128), None),
        ("vllm", "mlp.experts.3.up_proj", (192, 128), None),
        ("vllm", "self_attn.kv_a_proj_with_mqa", (576, 128), FINE),
        ("transformers", "self_attn.kv_a_proj_with_mqa", (576, 128), CT),  # fine-grained would be read wrong
        ("transformers", "mlp.experts.3.up_proj", (192, 128), None),
    ],
)
def test_blocks_that_a_program_would_cut(
    reader: Any, module: str, shape: tuple[int, int], format: str | None, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "in", "block", module, shape=shape)
    if format is None:
        with pytest.raises(UnsupportedError, match=rf"{module}: .* found shape \[192, 128\]"):
            convert_checkpoint(source, tmp_path / "out", reader=reader)
    else:
        assert convert_checkpoint(source, tmp_path / "out", reader=reader).format == format


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_heads_are_dense_for_programs_that_take_them_so(dtype: Any, stored: torch.dtype, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "row", DENSE, "lm_head", dtype=dtype)
    report = convert_checkpoint(source, tmp_path / "out", reader="vllm")
    assert report.layers == (DENSE,)
    assert report.kept == {"lm_head": "an output head, which vLLM takes dense"}
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, open_checkpoint(source).dequantize("lm_head.weight", stored))
    assert head.dtype == stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    report = convert_checkpoint(source, tmp_path / "other", reader="transformers")
    assert report.layers == (DENSE, "lm_head")


def test_quantizing_for_a_program(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.randn(128, 128), "lm_head.weight": torch.randn(128, 128)}
    source = write(tmp_path / "in", tensors)
    assert quantize_checkpoint(source, tmp_path / "a", scheme="block", reader="vllm").format == FINE
    assert quantize_checkpoint(source, tmp_path / "b", reader="vllm").format == CT
    with pytest.raises(UnsupportedError, match="cannot quantize for ComfyUI"):
        quantize_checkpoint(source, tmp_path / "c", reader="comfyui")
    with pytest.raises(UnsupportedError, match="lm_head: vLLM takes output heads dense"):
        quantize_checkpoint(source, tmp_path / "c", reader="vllm", fp8_heads=True)
    assert not (tmp_path / "c").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(checkpoint(tmp_path / "in", "block", DENSE))
    assert main(["convert", source, str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert "1 FP8 weights as fine-grained" in capsys.readouterr().out
    assert main(["convert", source, str(tmp_path / "no"), "--for", "comfyui"]) == 1
    assert "fp8gemm convert: cannot convert for ComfyUI" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", source, str(tmp_path / "no"), "--for", "tgi"])
