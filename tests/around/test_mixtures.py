"""transformers' own quantizers read what is saved of every mixture of experts: nothing missing, nothing left, equal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import mixtures

from fp8gemm import FP8GemmOptions, enable_fp8_gemm, save_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")
# transformers loads no quantized checkpoint of these: its conversion splits a weight, which its quantizers refuse.
REFUSED = {"nemo_speechlm": "one to many", "unlimited_ocr": "one to many"}
# While it loads compressed-tensors, transformers has a list of layers here instead of a stack.
UNSTACKED = {"llama4", "llama4_text"}
QUANTIZERS = {
    "compressed-tensors": ("row", lambda: transformers.CompressedTensorsConfig(dequantize=True)),
    "fine-grained": ("tensor", lambda: transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=None)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", list(QUANTIZERS))
@pytest.mark.parametrize("name", [name for name in mixtures.mixtures() if name not in mixtures.UNBUILT])
def test_transformers_reads_it_in_fp8(name: str, format: str, tmp_path: Path) -> None:
    scheme, config = QUANTIZERS[format]
    model = enable_fp8_gemm(mixtures.build(name), options=FP8GemmOptions(scheme=scheme, fp16_weight_storage="discard"))
    wanted = mixtures.dense(model)
    if format == "compressed-tensors" and hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path)
    else:
        save_checkpoint(model, tmp_path, format=format)
    arguments = {"dtype": torch.bfloat16, "quantization_config": config(), "output_loading_info": True}
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            type(model).from_pretrained(tmp_path, **arguments)
        return
    loaded, told = type(model).from_pretrained(tmp_path, **arguments)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    found = mixtures.dense(loaded)
    if format == "compressed-tensors" and name in UNSTACKED:
        for key in [key for key in wanted if key.endswith("experts.gate_up_proj")]:
            block = key.removesuffix("gate_up_proj")
            for index, (both, down) in enumerate(zip(wanted.pop(key), wanted.pop(f"{block}down_proj"), strict=True)):
                gate, up = both.T.chunk(2)
                wanted |= {f"{block}{index}.gate_proj.weight": gate, f"{block}{index}.up_proj.weight": up}
                wanted[f"{block}{index}.down_proj.weight"] = down.T
    assert mixtures.differing(found, wanted) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", "phimoe", "granitemoe", "qwen2_5_vl"])
def test_as_compressed_layers_too(name: str, tmp_path: Path) -> None:
    """Not dequantized while it loads: config and tensors have to agree under the names of the model."""
    model = enable_fp8_gemm(mixtures.build(name), options=FP8GemmOptions(fp16_weight_storage="discard"))
    wanted = mixtures.dense(model)
    model.save_pretrained(tmp_path)
    config = transformers.CompressedTensorsConfig(dequantize=False)  # our own config asks for dense values
    loaded, told = type(model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=config, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    state, compressed = loaded.state_dict(), 0
    for key in wanted.keys() & state.keys():
        values = state[key].float()
        if state[key].dtype == torch.float8_e4m3fn:
            values = values * state[f"{key}_scale"].float()  # which transformers rounds to the dtype of the model
            compressed += 1
        torch.testing.assert_close(values, wanted[key].float(), rtol=2**-7, atol=0)
    assert compressed > 4
