"""Loads a checkpoint into any model: FP8 stays FP8, everything else takes the model's dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..engines import MatmulSpec, choose, probe
from ..errors import UnsupportedError
from ..progress import byte_progress
from ..scaled import TENSOR, FP8GemmOptions, Granularity, ScaledTensor
from ..weights import Change, FP8Linear, FP8Weight, convert, leave, made, passes
from ..weights.geometry import swapped
from ..weights.packed import spec_of
from ..weights.report import KEPT, Report, report
from ..weights.sharding import held
from ..weights.shares import is_split, like
from ..weights.structure import STACK_NAMES, stacks
from .conversion import mapped
from .fill import fill, of_stack, scheme_of, take
from .origin import remember
from .plan import Transfer, holds_fp8, nbytes, plan_load, some
from .pretrained import redirect_saving
from .read import Checkpoint, open_checkpoint
from .renaming import KeyMapping
from .requantize import requantize
from .targets import Target, initialize_transient, targets, transient


@dataclass(frozen=True)
class LoadReport(Report):
    """What was loaded: a row for each linear layer, and what was left over in the file or the model.

    Attributes:
        format: the checkpoint's format.
        missing: names in the model that the checkpoint does not contain; these tensors are unchanged.
        unexpected: names in the checkpoint that have no target in the model.
        unused_keys: keys that are ignored, with the reason.
        dequantized: FP8 on disk but dense in the model: embeddings, or everything with ``dequantize=True``.
        suspicious: where the config disagrees with the tensors.
        kv_scales: names of KV cache scales; ``Checkpoint.kv_scales`` reads them.

    Example:
        >>> LoadReport((), format="comfy", missing=("head.weight",)).to_dict()["missing"]
        ('head.weight',)
    """

    format: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unused_keys: Mapping[str, str] = field(default_factory=dict)
    dequantized: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()
    kv_scales: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        facts = {key: value for key, value in asdict(self).items() if key != "rows"}
        return {**super().to_dict(), **facts}

    def __str__(self) -> str:
        notes = [f"checkpoint format {self.format}"]
        for what in ("missing", "unexpected", "dequantized", "suspicious", "kv_scales"):
            if found := getattr(self, what):
                notes.append(f"{what}: {some(found)}")
        notes += [f"unused {key}: {reason}" for key, reason in self.unused_keys.items()]
        return "\n".join([super().__str__(), *notes])


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Checkpoint,
    *,
    options: FP8GemmOptions | None = None,
    dequantize: bool = False,
    device: torch.device | str | None = None,
    key_mapping: KeyMapping | None = None,
    strict: bool = True,
) -> LoadReport:
    """Loads a checkpoint into ``model``, which may be on meta: linear layers whose weight is FP8 on disk become
    ``FP8Linear``, and FP8 stacks of experts become ``FP8Weight`` parameters.

    They hold the file's bytes and scales; everything else is copied in the model's own dtype. Weights of the model that
    are FP8 already are replaced by those that are FP8 in the file, and take the values of dense ones. Of a parameter
    that is a DTensor, each rank takes its own part. Non-persistent
    buffers on meta (rotary frequencies) are computed if the model can, as transformers models do.

    Args:
        source: what ``open_checkpoint`` accepts, or its result.
        options: for the new layers: the engine and the casts. Of the scheme, only whether activations are quantized
            at all is used; the file determines the rest. No dense weight is kept.
        dequantize: load plain layers instead, each weight computed in float32 and rounded once to the model's dtype.
        device: where to put the tensors; by default they stay where they are, and those on meta go to the CPU.
        key_mapping: regex -> replacement for the checkpoint's canonical names, if the model uses other names. Several
            names that become the same one are joined along rows, in the order of their patterns; ``Split`` divides the
            rows of one tensor among several, ``Swap`` exchanges its halves, None leaves it out. Models of transformers
            need none: their library's own conversions are applied, to FP8 weights too. Nor do those of diffusers in
            ``original_key_mapping`` for files with the names of the original implementations.
        strict: names that one side lacks, and unknown keys that look like scales, are an error.

    Raises:
        CheckpointError: the file is broken, or does not fit the model; then with all reasons at once.
        UnsupportedError: no engine, or not the one that was named, runs such a layer on the device; or a conversion of
            transformers does not only move values, and cannot be applied to FP8 weights.
        ValueError: the model has buffers on meta that cannot be computed.

    Example:
        >>> import tempfile
        >>> from fp8gemm import enable_fp8_gemm, save_checkpoint
        >>> folder = tempfile.mkdtemp() + "/fp8"
        >>> _ = save_checkpoint(enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32))), folder)
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(64, 32))
        >>> load_checkpoint(model, folder).converted[0].name, model(torch.randn(2, 64)).shape
        ('0', torch.Size([2, 32]))
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    where = None if device is None else torch.device(device)
    conversions = mapped(model)
    checkpoint, transfers, left = plan_load(model, checkpoint, key_mapping, dequantize, strict, conversions)
    chosen = options or FP8GemmOptions()
    transfers = _checked(transfers, checkpoint, chosen, where)
    uncomputed = initialize_transient(model, where or torch.device("cpu"))
    if uncomputed:
        raise ValueError(
            f"the model has buffers on meta that no checkpoint holds and that it cannot compute: {some(uncomputed)}; "
            "build it on the CPU, or put only its parameters on meta"
        )
    total = sum(nbytes(checkpoint, name) for transfer in transfers for name in transfer.sources)
    with torch.no_grad(), byte_progress(total, what="Loading") as counter:
        for transfer in transfers:
            _fill(transfer, checkpoint, chosen, where)
            counter.update(sum(nbytes(checkpoint, name) for name in transfer.sources))
        if where is not None:
            for target in (*targets(model).values(), *transient(model).values()):
                _move(target, where)
        if not dequantize:
            requantize(model, checkpoint.metadata, chosen)
    _note_kept(model, transfers, checkpoint)
    remember(model, transfers, checkpoint, conversions)
    redirect_saving(model)
    filled = {name for transfer in transfers for name in transfer.sources}
    own = {checkpoint.layout.plain.get(name) or checkpoint.spare.get(name) for name in filled}
    rows = report(model).rows
    if any(row.status == "fp8" for row in rows):
        passes.install(model)
    return LoadReport(
        rows,
        format=checkpoint.format.name,
        missing=tuple(left.missing),
        unexpected=tuple(left.unexpected),
        unused_keys={key: reason for key, reason in checkpoint.unused_keys.items() if key not in own},
        dequantized=tuple(
            transfer.targets[0].name for transfer in transfers if not transfer.fp8 and holds_fp8(checkpoint, transfer)
        ),
        suspicious=tuple(checkpoint.layout.suspicious),
        kv_scales=tuple(name for name in checkpoint.layout.kv_scales if name not in filled),
    )


def _checked(
    transfers: Sequence[Transfer], checkpoint: Checkpoint, options: FP8GemmOptions, device: torch.device | None
) -> list[Transfer]:
    """The transfers, with an engine available for each FP8 one; experts without one under ``auto`` become dense.

    Raises:
        UnsupportedError: no engine, or not the one that was named, runs an FP8 layer.
    """
    known: dict[tuple[MatmulSpec, torch.device], str] = {}
    checked = []
    for transfer in transfers:
        if transfer.fp8:
            target = transfer.targets[0]
            asked = (_spec(transfer, checkpoint, options), home_of(target, device))
            if asked not in known:
                try:
                    choose(asked[0], probe(asked[1]), options.engine)
                    known[asked] = ""
                except UnsupportedError as error:
                    known[asked] = str(error)
            if known[asked]:
                if not asked[0].experts or options.engine != "auto":
                    raise UnsupportedError(f"{target.name}: {known[asked]}")
                transfer = replace(transfer, fp8=False)
        checked.append(transfer)
    return checked


def _spec(transfer: Transfer, checkpoint: Checkpoint, options: FP8GemmOptions) -> MatmulSpec:
    """The problem that an engine has to solve for a transfer, as far as the headers tell."""
    target, source = transfer.targets[0], transfer.sources[0]
    stack = checkpoint.stacks.get(source)
    layer = checkpoint.layers[checkpoint.parts(source)[0]]
    scheme = layer.scheme
    shape = swapped(target.tensor.shape, transfer.turned)
    if stack is None and (source in checkpoint.derived or transfer.turned):
        scheme = replace(scheme, weight=_granularity(transfer, checkpoint))
    if stack is not None and scheme.weight == TENSOR:
        rows = 1 if transfer.interleaved else shape[1] // len(stack.parts[0])
        scheme = replace(scheme, weight=Granularity(rows, None))
    if len(shape) > 2:
        scheme = replace(scheme, static=False, activation=of_stack(scheme.activation))
    if options.resolved_scheme.activation is None:
        scheme = scheme.weight_only()
    return spec_of(shape, replace(options, weight_dtype=layer.dtype), scheme, target.tensor.dtype)


def _granularity(transfer: Transfer, checkpoint: Checkpoint) -> Granularity:
    """That of the weight that a transfer converts, or turns round."""
    source = transfer.sources[0]
    if source not in checkpoint.derived:
        own = checkpoint.layers[source].granularity
        return Granularity(own.cols, own.rows)
    tiles = checkpoint.derived[source].planned()
    return (tiles.flipped().coarse() if transfer.turned else tiles).granularity


def home_of(target: Target, device: torch.device | None) -> torch.device:
    """The device for a tensor: ``device`` if given, else the one it is on, or the CPU if it is on meta."""
    return device or (torch.device("cpu") if target.tensor.is_meta else target.tensor.device)


def _fill(transfer: Transfer, checkpoint: Checkpoint, options: FP8GemmOptions, device: torch.device | None) -> None:
    target = transfer.targets[0]
    home = home_of(target, device)
    if not transfer.fp8:
        weight = held(target.tensor)
        if not isinstance(weight, FP8Weight):
            fill(transfer, checkpoint, home)
            return
        if not holds_fp8(checkpoint, transfer):
            if not weight.is_meta or is_split(target.tensor):  # it takes the values
                fill(transfer, checkpoint, home)
                return
            fill(replace(transfer, targets=_emptied(transfer.targets)), checkpoint, home)
            new = made(target.module, target.attribute, weight._home.options, layout=weight._home.layout)
            Change(*((one.module, one.attribute, None) for one in transfer.targets)).put(new)
            return
        fill(replace(transfer, targets=_emptied(transfer.targets)), checkpoint, home)
        for one in transfer.targets:
            leave(one.module)
        return
    taken = take(checkpoint, transfer)
    assert isinstance(taken, ScaledTensor)
    scheme, input_scale = scheme_of(checkpoint, transfer.sources, taken)
    if options.resolved_scheme.activation is None:
        scheme, input_scale = scheme.weight_only(), None
    own = replace(options, scheme=scheme, weight_dtype=taken.data.dtype, fp16_weight_storage="discard")
    fresh = transfer.sources[0] in checkpoint.stacks  # just stacked: shares no memory with the file
    if is_split(target.tensor):
        kept = taken  # of which this rank copies its part only
    else:
        copied = (taken.data.to(home, copy=not fresh), taken.scale.to(home, copy=not fresh))
        kept = ScaledTensor(*copied, taken.granularity)
    former = target.module._parameters[target.attribute]
    if isinstance(held(former), FP8Weight):
        target.put(_emptied([target])[0].tensor)
    try:
        if taken.data.dim() > 2:
            convert(target.module, target.attribute, own, turned=transfer.turned, weight=kept)
        else:
            assert isinstance(target.module, nn.Linear)
            scale = None if input_scale is None else input_scale.to(home)
            FP8Linear.convert(target.module, own, weight=kept, input_scale=scale)
    except BaseException:
        target.module._parameters[target.attribute] = former
        raise


def _emptied(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The places of an FP8 weight with a dense parameter on meta, for what is about to replace it."""
    former = targets[0].tensor
    weight = held(former)
    values = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    parameter = like(former, values) if is_split(former) else nn.Parameter(values)
    parameter.requires_grad_(weight._home.trains)
    return tuple(replace(target, tensor=parameter) for target in targets)


def _move(target: Target, device: torch.device) -> None:
    """Moves a tensor that the checkpoint did not contain to ``device``."""
    tensor = target.tensor
    if tensor.device == device or tensor.is_meta or isinstance(tensor, FP8Weight) or is_split(tensor):
        return
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
    else:
        target.put(tensor.to(device))


def _note_kept(model: nn.Module, transfers: Sequence[Transfer], checkpoint: Checkpoint) -> None:
    """Records for the report why linear layers and stacks of experts are dense."""
    filled = {
        (id(target.module), target.attribute): "FP8 in the checkpoint, dequantized"
        if holds_fp8(checkpoint, transfer)
        else "dense in the checkpoint"
        for transfer in transfers
        for target in transfer.targets
    }
    for module in model.modules():
        weights = ["weight"] if isinstance(module, nn.Linear) else []
        for name in (*weights, *(stack for stack in stacks(module) if stack in STACK_NAMES)):
            parameter = module._parameters.get(name)
            if parameter is not None and not isinstance(held(parameter), FP8Weight):
                reasons = module.__dict__.setdefault(KEPT, {})
                reasons[name] = filled.get((id(module), name), "not in the checkpoint")
