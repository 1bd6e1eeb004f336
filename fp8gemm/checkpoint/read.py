"""An open checkpoint: maps canonical names to tensors and scaled tensors, which are read on demand."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..formats import Contents, Format, Layer, Layout, Stack, detect, join_rows, scan, stacks
from ..formats.beside import is_aside
from ..numerics import dequantize
from ..scaled import FP8_DTYPES, TENSOR, Granularity, ScaledTensor
from .files import Tensors
from .hub import Hub
from .locate import Source, locate, stamp

if TYPE_CHECKING:
    from .conversion import Derived
    from .renaming import Rows

# Bytes that are searched for NaN at once: torch's grain size, as in fill.py, which stays in a core's cache.
_PART = 1 << 15
# What values of the wrong kind, size or depth lead to.
_MISUNDERSTOOD = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
# How often a folder is opened again because a save into it took a step meanwhile.
_ATTEMPTS = 20


class Checkpoint(Mapping[str, "torch.Tensor | ScaledTensor"]):
    """Canonical name -> ``torch.Tensor``, or ``ScaledTensor`` if the file holds FP8 with a scale.

    Names are those of module parameters (``model.layers.0.mlp.up_proj.weight``). Per-expert weights also appear
    stacked, as ``...experts.gate_up_proj [E, 2I, H]`` and ``...experts.down_proj [E, H, I]``. Tensors are read on
    demand and are views of the memory-mapped files: do not write to them.

    Attributes:
        source: the files.
        format: the format that recognized it; ``recognised_by`` says how.
        config: the quantization config, empty if there is none; ``model_config`` is the whole config.json.
        metadata: from the files' headers.

    Example:
        >>> import tempfile
        >>> from fp8gemm import enable_fp8_gemm, save_checkpoint
        >>> folder = tempfile.mkdtemp() + "/fp8"
        >>> _ = save_checkpoint(enable_fp8_gemm(torch.nn.Sequential(torch.nn.Linear(64, 32))), folder)
        >>> checkpoint = open_checkpoint(folder)
        >>> sorted(checkpoint), checkpoint["0.weight"].scale.shape
        (['0.bias', '0.weight'], torch.Size([32, 1]))
    """

    derived: Mapping[str, Derived | Rows] = {}  # further names, of what is made from the tensors in the files

    def __init__(self, tensors: Tensors, *, raw: bool = False) -> None:
        contents = tensors.contents(raw=raw)
        self._tensors = tensors
        self._contents = contents
        self.source: Source = tensors.source
        found, self.recognised_by = detect(contents)
        self.format: Format = found
        self.layout: Layout = scan(contents, found)

    @property
    def contents(self) -> Contents:
        return self._contents

    @property
    def config(self) -> Mapping[str, Any]:
        return self._contents.config

    @property
    def model_config(self) -> Mapping[str, Any] | None:
        return self._contents.model_config

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._contents.metadata

    @property
    def unused_keys(self) -> Mapping[str, str]:
        """Keys in the files that nothing reads, including stray scales, each with its reason."""
        unknown = dict.fromkeys(self.layout.unknown, "looks like a scale, but belongs to no weight")
        return {**self.layout.unused, **unknown}

    @cached_property
    def spare(self) -> Mapping[str, str]:
        """Name -> key of what was taken for scales that no layer uses, which a model may have as its own parameters."""
        unused = {self.format.canonical(key): key for key in self.layout.unused}
        return {**unused, **self.layout.kv_scales}

    @property
    def layers(self) -> Mapping[str, Layer]:
        """How each FP8 weight is stored, by canonical name; stacked names are not included."""
        return self.layout.layers

    @cached_property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacked names that per-expert weights form, unless the files use those names themselves."""
        names = [*self.layout.layers, *self.layout.plain, *self.layout.unsupported]
        taken = {**self.layout.layers, **self.layout.unsupported}
        return {name: stack for name, stack in stacks(names).items() if name not in taken}

    def parts(self, name: str) -> list[str]:
        """The names that ``name`` is made of: itself, unless it is a stack or converted."""
        if name in self.derived:
            return self.derived[name].parts
        if name in self.stacks:
            return [part for parts in self.stacks[name].parts for part in parts]
        return [name]

    def with_names(self, stacks: Mapping[str, Stack], derived: Mapping[str, Derived | Rows]) -> Checkpoint:
        """The same checkpoint with further names of tensors that are made from several of its own."""
        other = copy.copy(self)
        other.__dict__.update(stacks={**self.stacks, **stacks}, derived={**self.derived, **derived})
        return other

    @cached_property
    def kv_scales(self) -> Mapping[str, torch.Tensor]:
        """KV cache scales in float32, by canonical name: kept as metadata; no layer uses them."""
        return {name: self.read(key).to(torch.float32) for name, key in self.layout.kv_scales.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return self._tensors.nbytes

    def file_of(self, key: str) -> str:
        """The name of the file that holds ``key``."""
        return self._tensors.file_of[key]

    def __getitem__(self, name: str) -> torch.Tensor | ScaledTensor:
        """One tensor, as it is on disk.

        Raises:
            KeyError: there is no such name.
            CheckpointError: NaN in an FP8 weight, a non-finite scale, or a quantization other than FP8.
        """
        if name in self.derived:
            return self.derived[name].value()
        if (layer := self.layout.layers.get(name)) is not None:
            value = layer.read(self.read)
            self.doubt(name, value.scale)
            return value
        if (key := self.layout.plain.get(name)) is not None:
            return self.read(key)
        if (stack := self.stacks.get(name)) is not None:
            return self._stacked(stack)
        if (reason := self.layout.unsupported.get(name)) is not None:
            raise CheckpointError(f"{name} cannot be read: {reason}")
        if (key := self.spare.get(name)) is not None:
            return self.read(key)
        raise KeyError(name)

    def doubt(self, name: str, scale: torch.Tensor) -> None:
        """Notes scales that no quantization makes: zero, but for a weight of zeros, or negative."""
        for what, wrong in (("zero", scale == 0), ("negative", scale < 0)):
            text = f"{name} has {int(wrong.sum())} of {scale.numel()} scales {what}"
            if bool(wrong.any()) and text not in self.layout.suspicious:
                self.layout.suspicious.append(text)

    def __iter__(self) -> Iterator[str]:
        yield from self.layout.layers
        yield from self.layout.plain
        yield from self.layout.unsupported
        yield from self.stacks

    def __len__(self) -> int:
        layout = self.layout
        return len(layout.layers) + len(layout.plain) + len(layout.unsupported) + len(self.stacks)

    def __contains__(self, name: object) -> bool:
        layout = self.layout
        return any(name in part for part in (layout.layers, layout.plain, layout.unsupported, self.stacks))

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.source.path)!r}, format={self.format.name}, {len(self.layers)} FP8 weights)"

    def is_foreign(self, name: str) -> bool:
        """Whether ``name`` is no model's, or lacks the prefix of the model being read and so belongs to another."""
        key = self.layout.plain.get(name) or (self.layers[name].weight if name in self.layers else name)
        if key in self._contents.tensors and is_aside(key, self._contents.tensors[key]):
            return True
        return self._has_prefix and self.format.canonical(key) == key

    @cached_property
    def _has_prefix(self) -> bool:
        keys = [layer.weight for layer in self.layers.values()]
        return self.format.strips and any(self.format.canonical(key) != key for key in keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of ``name``, from the headers.

        Raises:
            KeyError: there is no such name.
            CheckpointError: it has a quantization other than FP8.
        """
        if name in self.derived:
            return self.derived[name].shape
        if (layer := self.layout.layers.get(name)) is not None:
            return layer.shape
        if (key := self.layout.plain.get(name) or self.spare.get(name)) is not None:
            return self._contents.tensors[key].shape
        if (reason := self.layout.unsupported.get(name)) is not None:
            raise CheckpointError(f"{name} cannot be read: {reason}")
        stack = self.stacks[name]
        first = [self.shape(part) for part in stack.parts[0]]
        return (len(stack.parts), sum(shape[0] for shape in first), *first[0][1:])

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of ``name``, computed in float32 and rounded once to ``dtype``."""
        value = self[name]
        return dequantize(value, dtype) if isinstance(value, ScaledTensor) else value.to(dtype)

    def input_scale(self, name: str) -> torch.Tensor | None:
        """The static activation scale of the weight ``name``, float32; None if activations are dynamic."""
        layer = self.layout.layers.get(name)
        return None if layer is None else layer.read_input_scale(self.read)

    def read(self, key: str) -> torch.Tensor:
        """The tensor stored as ``key``, a view of the file.

        Raises:
            CheckpointError: it is FP8 and holds NaN.
        """
        tensor = self._tensors.read(key)
        if tensor.dtype in FP8_DTYPES and not self.format.is_marker(key) and (count := count_nan(tensor)):
            raise CheckpointError(f"{key} holds {count} NaN bytes ({self.file_of(key)}); the file is corrupted")
        return tensor

    def _stacked(self, stack: Stack) -> torch.Tensor | ScaledTensor:
        """All experts in one tensor, read one at a time."""
        first = self._expert(stack, 0)
        kind = _kind(first)
        count = len(stack.parts)
        data = torch.empty(count, *first.shape, dtype=kind[0], device="cpu")
        scale = None
        if isinstance(first, ScaledTensor):
            scale = torch.empty(count, *first.scale.shape, dtype=torch.float32, device="cpu")
        for index in range(count):
            expert = self._expert(stack, index)
            if _kind(expert) != kind:
                found = f"expert 0 is {_told(kind)}, expert {index} is {_told(_kind(expert))}"
                raise CheckpointError(f"{stack.name} cannot be stacked: {found}")
            if isinstance(expert, ScaledTensor) and scale is not None:
                data.view(torch.uint8)[index] = expert.data.view(torch.uint8)
                scale[index] = expert.scale
            elif isinstance(expert, torch.Tensor):
                data[index] = expert
        return data if scale is None or not isinstance(first, ScaledTensor) else ScaledTensor(data, scale, kind[2])

    def _expert(self, stack: Stack, index: int) -> torch.Tensor | ScaledTensor:
        names = stack.parts[index]
        parts = [self[name] for name in names]
        scaled = [part for part in parts if isinstance(part, ScaledTensor)]
        if len(scaled) == len(parts):
            return join_rows(scaled)
        if scaled:
            raise CheckpointError(f"{stack.name} cannot be stacked: only some of {', '.join(names)} are FP8")
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)], dim=0)


def _kind(expert: torch.Tensor | ScaledTensor) -> tuple[torch.dtype, tuple[int, ...], Granularity]:
    """What all experts of one stack must share; the granularity of dense ones is a placeholder."""
    if isinstance(expert, ScaledTensor):
        return expert.data.dtype, tuple(expert.shape), expert.granularity
    return expert.dtype, tuple(expert.shape), TENSOR


def _told(kind: tuple[torch.dtype, tuple[int, ...], Granularity]) -> str:
    dtype, shape, granularity = kind
    return f"{dtype} {list(shape)}" + (f", scales {granularity}" if dtype in FP8_DTYPES else "")


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    raw: bool = False,
) -> Checkpoint:
    """Opens a folder, a ``.safetensors`` file, a shard index, or a repository on the Hub; reads only headers.

    Args:
        revision: a branch, tag or commit of a repository.
        token: for private and gated repositories; True uses the one stored on this machine.
        cache_dir: where downloads are stored.
        offline: use only files that were downloaded before.
        raw: FP8 tensors without a scale hold the values themselves, as in a model that was cast to FP8. Without this,
            they are read so only where nothing else is possible, as in most single files without any scale.

    Raises:
        CheckpointError: nothing is there, or a file is broken, ambiguous or inconsistent.

    Example:
        >>> import tempfile
        >>> from fp8gemm import enable_fp8_gemm, save_checkpoint
        >>> folder = tempfile.mkdtemp() + "/fp8"
        >>> _ = save_checkpoint(enable_fp8_gemm(torch.nn.Sequential(torch.nn.Linear(64, 32))), folder)
        >>> open_checkpoint(folder).format.name
        'compressed-tensors'
    """
    hub = Hub(revision=revision, token=token, cache_dir=cache_dir, offline=offline)
    for _ in range(_ATTEMPTS):
        before = stamp(source)
        try:
            with _understood(source):
                checkpoint = Checkpoint(Tensors(locate(source, hub)), raw=raw)
        except CheckpointError:
            if stamp(source) == before:
                raise
        else:
            if stamp(source) == before:
                return checkpoint
    raise CheckpointError(f"{source} keeps changing while it is being opened; wait for the saves into it to end")


@contextmanager
def _understood(source: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file whose config or metadata has values of a kind that its format does not."""
    try:
        yield
    except _MISUNDERSTOOD as error:
        raise CheckpointError(
            f"{source} has a config or metadata that is not what its format has: {type(error).__name__}: {error}"
        ) from error


def count_nan(data: torch.Tensor) -> int:
    """How many elements of FP8 ``data`` are NaN."""
    flat = data.contiguous().view(torch.uint8).flatten()
    # float8_e4m3fn has one NaN of either sign, 0x7F; float8_e5m2 has infinity at 0x7C and NaN above.
    limit = 0x7E if data.dtype == torch.float8_e4m3fn else 0x7C
    count = 0
    for start in range(0, flat.numel(), _PART):
        masked = flat[start : start + _PART] & 0x7F
        if int(masked.max()) > limit:
            count += int((masked > limit).sum())
    return count
