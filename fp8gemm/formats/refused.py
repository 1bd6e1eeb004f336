"""Layouts that are refused as a whole: what each is recognized by, why it is not read, and what would work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .base import Contents


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One layout; it is recognized by any of the regex of ``files``, ``methods``, the regex of ``keys`` and ``sign``.

    ``mixed``: whether FP8 weights with plain scales may stand in the same file, which is then read but for the rest;
    ``alone``: whether a single file of it can be read, although a folder cannot.
    """

    name: str
    why: str
    instead: str
    files: str = ""
    methods: tuple[str, ...] = ()
    keys: str = ""
    sign: Callable[[Contents], str] | None = None
    mixed: bool = True
    alone: bool = False

    def evidence(self, contents: Contents) -> str:
        """What in the checkpoint says that it has this layout; empty if nothing does."""
        if self.mixed and contents.holds_fp8:
            return ""
        if contents.method in self.methods:
            return f"quant_method {contents.method}"
        files = () if self.alone else contents.files
        named = _first(self.files, files) or _first(self.keys, contents.tensors)
        return named or (self.sign(contents) if self.sign is not None else "")


def _first(pattern: str, names: Iterable[str]) -> str:
    return next((name for name in names if re.search(pattern, name)), "") if pattern else ""


def _tensorrt(contents: Contents) -> str:
    """TensorRT-LLM's config.json has a section of its own, and says how the model is distributed."""
    config = contents.model_config or {}
    section = config.get("quantization")
    section = section if isinstance(section, Mapping) else {}
    whole = "quant_algo" in section and ("mapping" in config or "builder_config" in config)
    return "config.json with quantization.quant_algo and mapping" if whole or "pretrained_config" in config else ""


def _mlx(contents: Contents) -> str:
    for key, info in contents.tensors.items():
        module = key.removesuffix(".weight")
        if info.dtype == torch.uint32 and module != key and f"{module}.scales" in contents.tensors:
            return f"{key} is uint32 beside {module}.scales"
    return ""


def _marlin(contents: Contents) -> str:
    return "format marlin-24" if contents.config.get("format") == "marlin-24" else ""


_DENSE = "quantize the dense model, or dequantize it with the library that made it"

REFUSED = (
    Refusal(
        name="vLLM sharded_state",
        why="weights are stored as vLLM's kernels take them: fused, transposed or repacked, one file a rank",
        instead="open the checkpoint that vLLM was started with",
        files=r"^model-(rank-\d+|pp-\d+-tp-\d+)-part-\d+\.safetensors$",
        mixed=False,
    ),
    Refusal(
        name="TensorRT-LLM",
        why="weights are fused, renamed and split by rank",
        instead="open the Hugging Face checkpoint that it was converted from (ModelOpt's export_hf_checkpoint)",
        files=r"^rank\d+\.safetensors$",
        sign=_tensorrt,
        mixed=False,
        alone=True,
    ),
    Refusal(
        name="2:4 sparse",
        why="weights are stored without their zeros, beside a bitmask or packed for Marlin",
        instead="save the model with save_compressed=False, or decompress it with compressed-tensors",
        keys=r"\.(bitmask|compressed)$",
        sign=_marlin,
        mixed=False,
    ),
    Refusal(
        name="MLX",
        why="weights are packed into uint32 in groups",
        instead="open the checkpoint that mlx_lm converted, or write one with mlx_lm.convert --dequantize",
        sign=_mlx,
        mixed=False,
    ),
    Refusal(
        name="bitsandbytes",
        why="weights are INT8 or 4-bit codes",
        instead=_DENSE,
        methods=("bitsandbytes",),
        keys=r"\.(SCB|weight\.absmax|weight\.quant_state\.\w+)$",
    ),
    Refusal(
        name="GPTQ and AWQ",
        why="weights are packed integers with zero points",
        instead=_DENSE,
        methods=("gptq", "gptqmodel", "awq", "auto-round", "auto_round", "intel/auto-round", "auto-round-gptq"),
        keys=r"\.qzeros$",
    ),
    Refusal(
        name="MXFP4",
        why="two FP4 values a byte, with a power of two for 32 of them",
        instead="load the model with transformers' Mxfp4Config(dequantize=True), save and quantize it",
        methods=("mxfp4",),
        keys=r"_proj_blocks$",
    ),
    Refusal(
        name="HQQ",
        why="weights are packed integers with zero points",
        instead=_DENSE,
        methods=("hqq",),
        keys=r"\.W_q$",
    ),
    Refusal(
        name="ExLlama",
        why="weights are packed integers or trellis codes",
        instead=_DENSE,
        methods=("exl2", "exl3"),
        keys=r"\.(q_weight|trellis)$",
    ),
    Refusal(
        name="Nunchaku",
        why="weights are 4-bit values with a low-rank part",
        instead=_DENSE,
        methods=("svdquant", "nunchaku"),
        keys=r"\.(wscales|wtscale)$",
    ),
    Refusal(
        name="vector codes and other integers",
        why="weights are codes, not FP8",
        instead=_DENSE,
        methods=(
            "aqlm",
            "vptq",
            "spqr",
            "higgs",
            "quip",
            "quip#",
            "bitnet",
            "eetq",
            "fp_quant",
            "sinq",
            "autobitlinear",
        ),
    ),
)

# Files that are no safetensors, by the end of their names.
FILES = {
    ".gguf": "GGUF files (llama.cpp), with formats of their own; open the checkpoint that they were converted from",
    ".onnx": "ONNX graphs; open the checkpoint that they were exported from",
    ".engine": "TensorRT engines; open the checkpoint that they were built from",
    ".distcp": "a distributed checkpoint; gather it with torch.distributed.checkpoint.format_utils and save the state "
    "dict as safetensors",
    ".npz": "NumPy archives; save their arrays as safetensors",
    ".nemo": "NeMo archives; export the model to Hugging Face's format",
    ".msgpack": "Flax weights; load the model with from_flax=True and save it as safetensors",
    ".h5": "Keras weights; load the model with from_tf=True and save it as safetensors",
}

# What is read, and pickles, of which the reader itself tells why they are not.
_READ_OR_NAMED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Types that safetensors knows and torch's FP8 kernels do not take.
DTYPES = {
    "F8_E4M3FNUZ": "the FNUZ type of AMD's MI300, whose values are half of E4M3's and reach 240",
    "F8_E5M2FNUZ": "the FNUZ type of AMD's MI300, whose values are half of E5M2's",
    "F4": "FP4, two values a byte",
    "F6_E2M3": "FP6",
    "F6_E3M2": "FP6",
}


def refuse(contents: Contents) -> None:
    """Raises CheckpointError if the checkpoint has one of the layouts that are ``REFUSED``."""
    for row in REFUSED:
        if found := row.evidence(contents):
            raise CheckpointError(_sentence(row, found))


def refuse_files(names: Sequence[str], *, alone: bool = False) -> None:
    """Raises CheckpointError if the names of files are those of a layout that is ``REFUSED``, or of no safetensors.

    ``alone`` if it is a file that was named, not the files of a folder.
    """
    for row in REFUSED:
        if not (alone and row.alone) and (found := _first(row.files, names)):
            raise CheckpointError(_sentence(row, found))
    if not any(name.endswith(_READ_OR_NAMED) for name in names):
        for end, what in FILES.items():
            if found := next((name for name in names if name.endswith(end)), ""):
                raise CheckpointError(f"{found}: only safetensors files are read, and these are {what}")


def _sentence(row: Refusal, found: str) -> str:
    return f"this is {row.name} ({found}), which cannot be read: {row.why}; {row.instead}"
