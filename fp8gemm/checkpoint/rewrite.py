"""Rewrites checkpoints without a model, one layer at a time: into another format, or from bfloat16 to FP8."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..formats import Format, Layer, TensorInfo, Written
from ..formats.base import UE8M0_DTYPES
from ..formats.config import OWN_FILES
from ..formats.naming import file_name
from ..scaled import FP8_DTYPES, FP8GemmOptions, ScaledTensor, Scheme, SchemeName
from ..weights.quantization import quantize_weight
from .fill import powers_of_two
from .guards import refuse_partly_read
from .matrices import Matrix, model_type, module_of, select
from .read import Checkpoint, count_nan, open_checkpoint
from .readers import ReaderName, format_for, preferred
from .save import merged_config, refuse
from .single import single_file, write_single_file
from .switch import copy_into
from .write import Piece, write_checkpoint
from .write_report import WriteReport

# Files next to the weights that are copied with them, except configs that describe the old format.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".py")
_REPLACED = ("config.json", "params.json", *OWN_FILES)


def convert_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    directory: str | os.PathLike[str],
    *,
    format: str | None = None,
    reader: ReaderName | None = None,
    max_shard_size: int | str = "5GB",
) -> WriteReport:
    """Writes a checkpoint in another format, under canonical names, with the same bytes and scales.

    Streams: there is never more than one layer in memory. Other files in the folder (tokenizer, generation config)
    are copied.

    Args:
        directory: where to write; for ``"comfy"``, which is one file without a config, a path that ends with
            ``.safetensors``, or a folder for ``model.safetensors``.
        format: what ``save_checkpoint`` accepts; by default ``"compressed-tensors"``, or what ``reader`` takes.
        reader: the program that is to run the checkpoint: ``"vllm"``, ``"sglang"``, ``"transformers"`` or
            ``"comfyui"``. It takes the format that is chosen with the scales of the source; an output head that it
            does not take in FP8 is written dense.

    Raises:
        UnsupportedError: the format cannot express a layer, or the reader does not take it; all reasons, before a byte
            is written.
        CheckpointError: the source is broken or holds no FP8, or writing failed.
        ValueError: source and directory are the same.

    Example:
        >>> import tempfile
        >>> from fp8gemm import FP8GemmOptions, enable_fp8_gemm, save_checkpoint
        >>> folder, options = Path(tempfile.mkdtemp()), FP8GemmOptions(scheme="block")
        >>> model = enable_fp8_gemm(torch.nn.Sequential(torch.nn.Linear(256, 128)), options=options)
        >>> _ = save_checkpoint(model, folder / "ours")
        >>> _ = convert_checkpoint(folder / "ours", folder / "theirs", format="fine-grained")
        >>> open_checkpoint(folder / "theirs").format.name
        'fine-grained'
    """
    target = preferred(reader, format)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    refuse_same(checkpoint, directory, target)
    refuse_partly_read(checkpoint)
    # Bare matrices are parameters of modules other than linear layers, which no reader of the format takes in FP8.
    bare = [name for name, layer in checkpoint.layers.items() if _is_bare(name) and len(layer.shape) == 2]
    layers = {name: layer for name, layer in checkpoint.layers.items() if name not in bare}
    if not checkpoint.layers:
        raise CheckpointError(f"{checkpoint.source.path} holds no FP8 weights; quantize_checkpoint creates them")
    written = {module_of(name): _as_written(checkpoint, layer) for name, layer in layers.items()}
    target, heads = format_for(reader, format, written)
    written = {module: layer for module, layer in written.items() if module not in heads}
    refuse(target, written, "convert")
    dense = dict.fromkeys(bare, torch.float32)
    dense |= {name: _model_dtype(checkpoint) for name in layers if module_of(name) in heads}
    fp8 = [name for name in layers if name not in dense]
    pieces = [_layer_piece(target, checkpoint, name, written[module_of(name)]) for name in fp8]
    pieces += [_dense_piece(checkpoint, name, dtype) for name, dtype in dense.items()]
    pieces += [plain_piece(checkpoint, name, key) for name, key in checkpoint.layout.plain.items()]
    pieces += [plain_piece(checkpoint, _kv_name(name), key) for name, key in checkpoint.layout.kv_scales.items()]
    kept = dict.fromkeys(bare, f"no weight of a linear layer, which {target.name} stores dense, in float32")
    kept |= heads
    size = max_shard_size
    return finish(checkpoint, directory, target, pieces, written, kept=kept, max_shard_size=size, what="Converting")


def finish(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    target: Format,
    pieces: Sequence[Piece],
    written: Mapping[str, Written],
    *,
    kept: Mapping[str, str] | None = None,
    max_shard_size: int | str,
    what: str,
) -> WriteReport:
    """Writes the pieces and the config with the names of dense matrices, and copies the source's other files."""
    dense = sorted(
        module_of(name)
        for piece in pieces
        for name, info in piece.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and module_of(name) not in written
    )
    if target.single_file:
        files = [write_single_file(single_file(directory), pieces, what=what)]
        return _report(checkpoint, target, files, pieces, written, kept)
    config = merged_config(checkpoint.model_config, target, written, dense)
    if config is not None and checkpoint.layout.kv_scales and "config_groups" in config["quantization_config"]:
        config["quantization_config"]["kv_cache_scheme"] = _KV_SCHEME
    files = write_checkpoint(directory, pieces, config=config, max_shard_size=max_shard_size, what=what)
    _copy_companions(checkpoint, Path(directory))
    return _report(checkpoint, target, files, pieces, written, kept)


def _report(
    checkpoint: Checkpoint,
    target: Format,
    files: Sequence[Path],
    pieces: Sequence[Piece],
    written: Mapping[str, Written],
    kept: Mapping[str, str] | None,
) -> WriteReport:
    return WriteReport(
        files=tuple(files),
        format=target.name,
        bytes_before=checkpoint.nbytes,
        bytes_after=sum(piece.nbytes for piece in pieces),
        layers=tuple(written),
        kept=kept or {},
    )


def refuse_same(checkpoint: Checkpoint, directory: str | os.PathLike[str], target: Format) -> None:
    """Raises ValueError if the source would be overwritten."""
    sources, place = [checkpoint.source.files[0].parent], Path(directory)
    if target.single_file:
        sources, place = list(checkpoint.source.files), single_file(directory)
    if place.resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"{directory} holds the source; choose another directory")


def plain_piece(checkpoint: Checkpoint, name: str, key: str) -> Piece:
    """A tensor unchanged; FP8 without a scale (only in raw casts) becomes bfloat16, which represents it exactly."""
    info = checkpoint.contents.tensors[key]
    dtype = torch.bfloat16 if info.dtype in FP8_DTYPES else info.dtype
    stored = {name: TensorInfo(dtype=dtype, shape=info.shape)}
    return Piece(tensors=stored, make=lambda: {name: checkpoint.read(key).to(dtype)})


def _is_bare(name: str) -> bool:
    return name.rpartition(".")[2] != "weight"


def _dense_piece(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Piece:
    """An FP8 weight dequantized."""
    stored = {name: TensorInfo(dtype=dtype, shape=checkpoint.shape(name))}
    return Piece(tensors=stored, make=lambda: {name: checkpoint.dequantize(name, dtype)})


def _model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The 16-bit dtype that the config gives the model, else float32."""
    config = checkpoint.model_config or {}
    given = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(given, torch.float32)


_KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def _kv_name(name: str) -> str:
    """``self_attn.k_proj.k_scale`` and ``self_attn.k_proj.output_scale`` as ``self_attn.k_scale``."""
    return re.sub(r"\.(?P<which>[kv])_proj\.((?P=which)_scale|output_scale)$", r".\g<which>_scale", name)


def _as_written(checkpoint: Checkpoint, layer: Layer) -> Written:
    scheme = layer.scheme
    # A config may declare float32 scales to be powers of two when they are not.
    if scheme.scale_format == "ue8m0" and layer.scale_dtype not in UE8M0_DTYPES:
        exact = powers_of_two(layer.read_scale(checkpoint.read))
        scheme = scheme if exact else type(scheme)(**{**scheme.__dict__, "scale_format": "float32"})
    inputs = checkpoint.contents.tensors.get(layer.input_scale or "")
    same = not scheme.static or inputs is None or inputs.dtype == layer.scale_dtype
    scale_dtype = layer.scale_dtype if same else torch.float32
    return Written(scheme=scheme, shape=layer.shape, dtype=layer.dtype, scale_dtype=scale_dtype)


def _layer_piece(target: Format, checkpoint: Checkpoint, name: str, written: Written) -> Piece:
    return Piece(
        tensors=target.stored(module_of(name), written),
        make=partial(_read_layer, target, checkpoint, name, written),
    )


def _read_layer(target: Format, checkpoint: Checkpoint, name: str, written: Written) -> Mapping[str, torch.Tensor]:
    weight = checkpoint[name]
    assert isinstance(weight, ScaledTensor)
    return target.write(module_of(name), written, weight, checkpoint.input_scale(name))


def _copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    folder = checkpoint.source.folder
    if folder is None:
        return
    copy_into(
        (
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and path.suffix in _COMPANIONS and path.name not in _REPLACED
            if not path.name.endswith(".index.json") and not path.name.startswith(".")
        ),
        directory,
    )


def quantize_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    directory: str | os.PathLike[str],
    *,
    scheme: SchemeName | Scheme = "row",
    ignore: Sequence[str] = (),
    format: str | None = None,
    reader: ReaderName | None = None,
    max_shard_size: int | str = "5GB",
    device: torch.device | str | None = None,
    fp8_heads: bool = False,
) -> WriteReport:
    """Makes an FP8 checkpoint from a bfloat16, float16 or float32 one; streams, and needs no model.

    Every matrix named ``X.weight`` and every expert of a stack is quantized, unless it is ignored. Embeddings and
    routers (``IGNORE``) always are, output heads (``HEADS``) unless ``fp8_heads``.

    Args:
        scheme: for weights and activations.
        format, reader: as for ``convert_checkpoint``.
        ignore: more modules to leave dense: names, optionally with ``*`` and ``?``, or regexes prefixed with ``re:``.
        device: where to compute; by default the CPU.
        fp8_heads: quantize output heads too, unless the config ties them to the embeddings.

    Raises:
        UnsupportedError: the format cannot express the scheme, or the reader does not take it.
        CheckpointError: the source is already FP8 or is broken, a matrix has non-finite values, or writing failed.
        ValueError: a static scheme, a pattern that matches nothing, or source and directory are the same.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"0.weight": torch.randn(64, 64).bfloat16()}, folder / "model.safetensors")
        >>> _ = quantize_checkpoint(folder, folder / "fp8")
        >>> open_checkpoint(folder / "fp8")["0.weight"].data.dtype
        torch.float8_e4m3fn
    """
    resolved = FP8GemmOptions(scheme=scheme).resolved_scheme
    if resolved.static:
        raise ValueError("static activation scales require calibration; choose a dynamic scheme")
    target = preferred(reader, format)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    refuse_same(checkpoint, directory, target)
    selection = select(checkpoint, ignore, fp8_heads=fp8_heads)
    chosen, kept = selection.chosen, selection.kept
    written = {module_of(name): Written(scheme=resolved, shape=matrix.shape) for name, matrix in chosen.items()}
    target, _ = format_for(reader, format, written, what="quantize")
    refuse(target, written, "quantize")
    kind = model_type(checkpoint)
    pieces = [
        Piece(
            tensors=target.stored(module_of(name), written[module_of(name)]),
            make=partial(_quantized, target, name, written[module_of(name)], matrix.read, device),
        )
        for name, matrix in chosen.items()
    ]
    for name, key in checkpoint.layout.plain.items():
        if name not in selection.stacks and name not in chosen:
            pieces.append(plain_piece(checkpoint, file_name(name, kind), key))
    pieces += [
        _matrix_piece(name, matrix)  # an expert of a stack whose others are quantized
        for name, matrix in selection.matrices.items()
        if name not in chosen and name not in checkpoint.layout.plain
    ]
    return finish(
        checkpoint, directory, target, pieces, written, kept=kept, max_shard_size=max_shard_size, what="Quantizing"
    )


def _matrix_piece(name: str, matrix: Matrix) -> Piece:
    """A matrix unchanged."""
    stored = {name: TensorInfo(dtype=matrix.dtype, shape=matrix.shape)}
    return Piece(tensors=stored, make=lambda: {name: matrix.read().contiguous()})


def _quantized(
    target: Format, name: str, written: Written, make: Callable[[], torch.Tensor], device: torch.device | str | None
) -> Mapping[str, torch.Tensor]:
    weight = quantize_weight(
        make(), written.scheme.weight, scale_format=written.scheme.scale_format, device=torch.device(device or "cpu")
    )
    if count := count_nan(weight.data):
        raise CheckpointError(f"{name} holds {count} non-finite values; nothing was written")
    return target.write(module_of(name), written, weight, None)
