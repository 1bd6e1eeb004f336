"""``FP8Entry``: an FP8 weight in a ``state_dict``, as FP8 bytes together with their scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import UnsupportedError
from ..scaled import FP8_DTYPES, ScaledTensor
from .stored import Stored
from .weight import FP8Weight

_CASTS = {
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
}
_MOVES = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.cpu, torch.Tensor.cuda, *_CASTS)
# These return FP8 entries again.
_COPIES = {
    torch.Tensor.detach,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.pin_memory,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.detach,
    torch.clone,
}
# These depend on shape, dtype or device only, not on values. By name.
_FACTS = {
    "dim", "ndim", "size", "shape", "numel", "nelement", "dtype", "device", "layout", "get_device", "element_size",
    "itemsize", "nbytes", "requires_grad", "is_leaf", "grad", "grad_fn", "names", "is_floating_point", "is_complex",
    "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_inference", "is_mkldnn", "is_xpu",
    "is_mps", "is_hpu", "is_ipu", "is_vulkan", "is_maia", "is_xla", "is_mtia", "__hash__", "__len__", "_version",
    "_backward_hooks", "_is_view", "_base",
}  # fmt: skip
# These may see the bytes, as serialization needs them. By name.
_OF_BYTES = {
    "__repr__", "__str__", "__format__", "__dlpack__", "__dlpack_device__", "__reduce_ex__", "__setstate__",
    "data_ptr", "untyped_storage", "storage", "storage_type", "_typed_storage", "stride", "storage_offset",
    "is_contiguous", "is_pinned", "is_shared", "is_conj", "is_neg", "is_coalesced", "is_signed", "is_distributed",
    "share_memory_", "record_stream", "as_subclass",
}  # fmt: skip
_OUT_OF_TORCH = {"numpy", "__array__", "tolist", "item"}
_COMPARED = {torch.equal, torch.Tensor.equal, torch.eq, torch.Tensor.eq, torch.Tensor.__eq__}


class FP8Entry(torch.Tensor):
    """The FP8 bytes of a weight in a state dict; ``weight`` is a copy of that weight, with scales and values.

    Serialization and patched models use the bytes. All other uses get the weight: copying an entry into a dense tensor,
    making a dense parameter of it or computing with it gives its values, never its codes. Writing to it raises.

    An entry that is cast to another floating dtype takes no memory until its values are read, which makes it an
    ordinary dense tensor. If it is loaded into an FP8 layer before that, the layer takes the bytes.
    """

    scale: torch.Tensor  # a copy of the scales in the state dict
    _weight: FP8Weight | None  # None in a dense tensor that is becoming an nn.Parameter
    _handed: bool

    @staticmethod
    def of(weight: FP8Weight) -> FP8Entry:
        """The weight as it is now; later writes to it do not change the entry."""
        home = weight._home
        home.owned = True
        stored = home.settle()
        assert stored is not None
        twin = home.copy(stored)
        twin.activity = home.activity
        twin.precision = "fp8" if twin.precision == "original" else twin.precision  # it is the bytes
        scaled = stored.scaled()
        data = home.layout.shaped(scaled.data)
        entry = _entry(data.detach(), weight.like(home=twin))
        entry.scale = scaled.scale.detach().clone()
        return entry

    @staticmethod
    def cast(weight: FP8Weight) -> FP8Entry:
        """The values of ``weight`` in its dtype, computed when they are read; until then its one element is a NaN."""
        nan = torch.full((1,) * weight.dim(), math.nan, dtype=weight.dtype, device=weight.device)
        return _entry(nan.expand(weight.shape), weight.like())

    @property
    def weight(self) -> FP8Weight:
        """The weight that these bytes represent, or that was cast."""
        assert self._weight is not None
        return self._weight

    def handed_over(self) -> FP8Weight:
        """The weight, for an FP8 layer that loads the entry."""
        self._handed = True
        return self.weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        entry = args[0] if args and isinstance(args[0], FP8Entry) else None
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and entry is None:
                return _copied(args[0], *args[1:], **kwargs)
            if entry is not None:
                result = _about(entry, func, args[1:], kwargs)
                if result is not NotImplemented:
                    return result
            if func in _COMPARED and (pair := _bytes_of(args)) is not None:
                return func(*pair, **kwargs)
        _refuse_writing(func, args, kwargs)
        dense = _name(func) in _OUT_OF_TORCH
        args, kwargs = tree_map_only(FP8Entry, lambda one: _seen(one, dense), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """nn.Parameter marks tensors of other classes by this attribute; a dense entry becomes a real Parameter
        instead."""
        self.__dict__.clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __create_chunk_list__(self) -> list[Any]:
        """What torch.distributed.checkpoint has to load: all bytes, into memory that is not the model's."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        with torch._C.DisableTorchFunctionSubclass():
            if _is_codes(self):
                _take_bytes(self, self.as_subclass(torch.Tensor))
            return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.size())]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor) if _is_codes(self) else _become_dense(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as a plain tensor: a file has the scales beside it."""
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(torch.Tensor) if _is_codes(self) else _become_dense(self)
            return plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __copy__(self) -> FP8Entry:
        return self.detach()  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = twin = self.clone()
        return twin


def _entry(data: torch.Tensor, weight: FP8Weight | None) -> FP8Entry:
    entry = data.as_subclass(FP8Entry)
    entry._weight, entry._handed = weight, False
    return entry


def _is_codes(value: Any) -> bool:
    return isinstance(value, FP8Entry) and torch.Tensor.dtype.__get__(value) in FP8_DTYPES  # type: ignore[attr-defined]


def _name(func: Any) -> str:
    """The name of a function, or of the attribute whose getter it is."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        owner = func.__self__
        name = getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", "")
    return str(name)


def _about(entry: FP8Entry, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result, where it needs no values or only the bytes; NotImplemented where it needs values."""
    name = _name(func)
    if entry._weight is None:
        return func(_become_dense(entry), *args, **kwargs)
    if name in _FACTS:
        return func(entry, *args, **kwargs)
    if func in _MOVES:
        return _moved(func, entry, args, kwargs)
    if func is torch.Tensor.requires_grad_:  # the last step of nn.Parameter
        values = _entry(entry.weight.dequantize(), None)
        return values.requires_grad_(*args, **kwargs)
    if _is_codes(entry):
        if name == "detach":
            return entry  # torch.distributed.checkpoint loads into the result
        plain = entry.as_subclass(torch.Tensor)
        if func in _COPIES or func is torch.empty_like:
            result = func(plain, *args, **kwargs)
            if func is torch.empty_like:
                return result
            copied = _entry(result, entry.weight)
            copied.scale = entry.scale
            return copied
        if name == "view" and args and isinstance(args[0], torch.dtype) and args[0].itemsize == 1:
            return _as_integers(plain, args[0])
        if func is torch.Tensor.copy_ and args and args[0].dtype == entry.dtype:
            return _take_bytes(entry, args[0])
        return func(entry, *args, **kwargs) if name in _OF_BYTES else NotImplemented
    if func in (torch.Tensor.detach, torch.Tensor.clone, torch.detach, torch.clone):
        return FP8Entry.cast(entry.weight)
    if name == "data_ptr" and entry._handed:
        return 0  # its values were not read
    return NotImplemented


def _as_integers(plain: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        raise UnsupportedError(
            "a file of FP8 bytes alone, as accelerate.disk_offload writes, is read back without their scales; use "
            "accelerate.cpu_offload, offload the dense model, or view(torch.uint8) for the bytes"
        )
    return plain.view(dtype)


def _take_bytes(entry: FP8Entry, source: torch.Tensor) -> FP8Entry:
    """Loads bytes of a checkpoint into the entry: into memory of its own, not the model's."""
    codes = source.as_subclass(torch.Tensor).to(entry.device, copy=True)
    if codes.shape != entry.shape:
        codes = codes.expand(entry.shape).contiguous()
    torch.Tensor.data.__set__(entry, codes)  # type: ignore[attr-defined]
    home = entry.weight._home
    data = home.layout.plain(codes).contiguous()
    entry._weight = entry.weight.like(home=home.copy(Stored(ScaledTensor(data, entry.scale, home.scheme.weight))))
    return entry


def _moved(func: Any, entry: FP8Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A cast gives values, computed when they are read; a move without a cast moves bytes and scales."""
    weight, device, copies = entry.weight, None, False
    dtype = _CASTS.get(func)
    if func is torch.Tensor.to:
        copies = kwargs.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    elif func is torch.Tensor.type:
        if not args and not kwargs:
            return func(entry)
        asked = args[0] if args else kwargs["dtype"]
        if not isinstance(asked, torch.dtype):
            return func(weight.dequantize(), asked)
        dtype = asked
    elif func is torch.Tensor.cpu:
        device = torch.device("cpu")
    elif func is torch.Tensor.cuda:
        device = args[0] if args else kwargs.get("device")
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    if dtype is None or dtype == entry.dtype:
        new: Any = weight if device is None else weight.to(device)
        if new.device == entry.device:
            return entry.clone() if copies else entry
        entry._handed = True
        return FP8Entry.of(new) if _is_codes(entry) else FP8Entry.cast(new)
    if not dtype.is_floating_point or dtype in FP8_DTYPES:
        return weight.dequantize().to(device=device, dtype=dtype)
    cast: Any = weight.to(device=device, dtype=dtype)
    return FP8Entry.cast(cast)


def _copied(target: torch.Tensor, src: FP8Entry, non_blocking: bool = False) -> torch.Tensor:
    """Copies an entry: bytes into FP8 weights and tensors of the same dtype, values into others."""
    source: torch.Tensor
    if isinstance(target, FP8Weight):
        source = src.handed_over()
    elif not _is_codes(src):
        source = _become_dense(src)
    else:
        source = src.as_subclass(torch.Tensor) if target.dtype == src.dtype else src.weight.dequantize()
    return target.copy_(source, non_blocking)


def _bytes_of(args: tuple[Any, ...]) -> list[torch.Tensor] | None:
    """The bytes of an entry and of a plain FP8 tensor, to be compared; None for other pairs."""
    pair = [one for one in args if isinstance(one, torch.Tensor)]
    plain = [one for one in pair if not isinstance(one, FP8Entry) and one.dtype in FP8_DTYPES]
    if len(pair) != 2 or len(plain) != 1 or not any(_is_codes(one) for one in pair):
        return None
    return [one.as_subclass(torch.Tensor).view(torch.uint8) for one in pair]


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
    in_place = in_place or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    written = (args[:1] if in_place else (), kwargs.get("out"))
    if any(_is_codes(one) for one in tree_flatten(written)[0]):
        raise UnsupportedError(
            f"{name} would write to the FP8 bytes of a state dict and leave their scales; write to the model's "
            "weight, or to a copy in another dtype"
        )


def _seen(entry: FP8Entry, dense: bool) -> torch.Tensor:
    """What a function gets in place of an entry."""
    with torch._C.DisableTorchFunctionSubclass():
        if not _is_codes(entry):
            return _become_dense(entry)
        return entry.weight.dequantize() if dense else entry.weight


def _become_dense(entry: FP8Entry) -> torch.Tensor:
    """Turns a cast entry, this very object, into the plain dense tensor that it looked like."""
    with torch.no_grad():
        if entry._weight is not None:
            torch.Tensor.data.__set__(entry, entry._weight.dequantize())  # type: ignore[attr-defined]
    entry.__dict__.clear()
    entry.__class__ = torch.Tensor  # type: ignore[assignment]
    return entry
