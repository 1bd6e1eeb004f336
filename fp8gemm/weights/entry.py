"""What an FP8 weight is in a ``state_dict``: its bytes, which remember their scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..errors import UnsupportedError
from ..scaled import FP8_DTYPES
from .weight import FP8Weight

# What may be done to the bytes as they are: looked at, moved, copied whole, written to files.
_AS_BYTES = {
    torch.Tensor.detach,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.cpu,
    torch.Tensor.cuda,
    torch.Tensor.pin_memory,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_,
    torch.empty_like,
}
_LOOKED_AT = {
    name
    for name in dir(torch.Tensor)
    if name.startswith("is_") or name in ("dim", "ndim", "size", "stride", "numel", "nelement", "storage_offset")
} | {
    "__dlpack__", "__dlpack_device__", "__repr__", "__format__", "__str__", "__len__", "__deepcopy__", "__reduce_ex__",
    "__setstate__", "__hash__", "data_ptr", "element_size", "untyped_storage", "storage", "storage_type", "view",
    "shape", "dtype", "device", "layout", "nbytes", "itemsize", "requires_grad", "grad", "grad_fn", "names", "numpy",
    "tolist", "_version", "_base", "_is_view", "_typed_storage", "share_memory_", "get_device", "_backward_hooks",
    "backward_hooks", "record_stream", "__class__", "as_subclass",
}  # fmt: skip


class FP8Entry(torch.Tensor):
    """FP8 bytes of a weight in a state dict; ``weight`` is that weight, with its scales and its values.

    Files, and models patched alike, take the bytes. A cast to another floating dtype, and a copy into a dense tensor,
    gives values: a plain model that is fed with it gets weights and never codes. Any other function is given the weight
    instead; writing to the bytes is refused.
    """

    weight: FP8Weight

    @staticmethod
    def of(data: torch.Tensor, weight: FP8Weight) -> FP8Entry:
        entry = data.as_subclass(FP8Entry)
        entry.weight = weight
        return entry

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_ and not isinstance(args[0], FP8Entry):
            source = args[1] if len(args) > 1 else kwargs["src"]
            return _copied(args[0], source)
        if func in (torch.Tensor.to, torch.Tensor.type, *_CASTS) and isinstance(args[0], FP8Entry):
            return _converted(func, args[0], args[1:], kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _AS_BYTES:
                return _remembering(func(*args, **kwargs), args[0])
            if getattr(func, "__name__", "") in _LOOKED_AT or _is_getter(func):
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or "out" in kwargs or name in ("__setitem__", "__set__"):
            raise UnsupportedError(
                f"{name} would write to the FP8 bytes of a state dict and leave their scales; write to the model's "
                "weight, or to a copy in another dtype"
            )
        args, kwargs = tree_map_only(FP8Entry, lambda entry: entry.weight, (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain tensor: in a file there is its scale beside it."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> FP8Entry:
        with torch._C.DisableTorchFunctionSubclass():
            twin = FP8Entry.of(self.as_subclass(torch.Tensor).clone(), self.weight)
        memo[id(self)] = twin
        return twin


_CASTS = {
    getattr(torch.Tensor, name): dtype
    for name, dtype in (
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float", torch.float32),
        ("double", torch.float64),
    )
}


def _is_getter(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _remembering(result: Any, entry: FP8Entry) -> Any:
    return FP8Entry.of(result, entry.weight) if type(result) is torch.Tensor and result.dtype in FP8_DTYPES else result


def _copied(target: torch.Tensor, source: Any) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        plain = source.as_subclass(torch.Tensor)
        if target.dtype in FP8_DTYPES or target.dtype == torch.uint8:
            return target.copy_(plain)
    values = source.weight if isinstance(target, FP8Weight) else source.weight.dequantize()
    return target.copy_(values)


def _converted(func: Any, entry: FP8Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A cast gives values, in a dense tensor that remembers the weight; a move alone moves bytes."""
    dtype = _CASTS.get(func)
    if dtype is None:
        asked = [one for one in (*args, *kwargs.values()) if isinstance(one, (torch.dtype, torch.Tensor))]
        dtypes = [one if isinstance(one, torch.dtype) else one.dtype for one in asked]
        dtype = dtypes[0] if dtypes else None
    with torch._C.DisableTorchFunctionSubclass():
        if dtype is None or dtype in FP8_DTYPES:
            return _remembering(func(entry.as_subclass(torch.Tensor), *args, **kwargs), entry)
        values = entry.weight.dequantize()
        return func(values, *args, **kwargs) if func not in _CASTS else values.to(dtype)
