"""The compiled kernels as Python methods on tensors, which check everything that the kernels rely on."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from .build import Built
from .checks import TYPES, away, describe, mistakes, quantize_mistakes
from .compiler import Unavailable

SCALE_FLOOR = 2.0**-126
NULL, INDEX = -3, -4  # status codes: a null pointer to elements; an index out of range


class _Problem(ctypes.Structure):
    """``Problem`` of problems.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "data", "scale", "bias", "out")),
        *((name, c_int64) for name in ("x_type", "bias_type", "out_type", "x_stride", "data_stride", "out_stride")),
        *((name, c_int64) for name in ("m", "n", "k", "rows", "cols", "blocks", "nans")),
    ]


class _Quantization(ctypes.Structure):
    """``Quantization`` of problems.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "data", "scale")),
        *((name, c_int64) for name in ("x_type", "x_stride", "data_stride", "n", "k", "rows", "cols", "ue8m0")),
    ]


class _Lookup(ctypes.Structure):
    """``Lookup`` of problems.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("ids", "data", "scale", "out")),
        *((name, c_int64) for name in ("out_type", "data_stride", "m", "n", "k", "rows", "cols")),
    ]


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fp8gemm_level": (c_int, ()),
    "fp8gemm_level_name": (c_char_p, (c_int,)),
    "fp8gemm_has_threads": (c_int, ()),
    "fp8gemm_kernel": (c_char_p, (c_int, POINTER(_Problem))),
    "fp8gemm_linear": (c_int, (c_int, c_int, POINTER(_Problem))),
    "fp8gemm_linear_to": (c_int, (c_int, c_int, POINTER(_Problem), c_void_p, c_void_p, c_int)),
    "fp8gemm_grouped": (c_int, (c_int, c_int, POINTER(_Problem), c_int64, c_void_p, c_int64)),
    "fp8gemm_has_nans": (c_int, (c_int, c_void_p, c_int64, c_int64, c_int64)),
    "fp8gemm_quantize": (c_int, (c_int, c_int, POINTER(_Quantization))),
    "fp8gemm_lookup": (c_int, (c_int, c_int, POINTER(_Lookup))),
}


def open_library(built: Built) -> Library | Unavailable:
    """Loads a library for this CPU's instruction set, or for a lower level given by ``FP8GEMM_ISA``."""
    try:
        functions = ctypes.CDLL(str(built.path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return Unavailable(f"{built.path} cannot be loaded: {error}")
    levels = tuple(name.decode() for name in takewhile(bool, map(functions.fp8gemm_level_name, count())))
    wanted = os.environ.get("FP8GEMM_ISA") or levels[-1]
    if wanted not in levels:
        return Unavailable(f"FP8GEMM_ISA must be one of {', '.join(levels)}, found {wanted!r}")
    level = min(functions.fp8gemm_level(), levels.index(wanted))
    return Library(built.path, built.origin, levels, levels[level], bool(functions.fp8gemm_has_threads()), functions)


@dataclass(frozen=True)
class Library:
    """The kernels for one instruction level of this processor's family, whose ``levels`` each include those before it;
    ``threads`` is False if torch's OpenMP runtime is not available."""

    path: Path
    origin: str
    levels: tuple[str, ...]
    instructions: str
    threads: bool
    functions: ctypes.CDLL

    @property
    def level(self) -> int:
        return self.levels.index(self.instructions)

    @property
    def features(self) -> frozenset[str]:
        """The available levels, and ``"threads"``."""
        return frozenset(self.levels[: self.level + 1]) | ({"threads"} if self.threads else frozenset())

    def lowered(self, instructions: str) -> Library:
        """The same kernels limited to ``instructions``, one of ``levels``, as on an older CPU."""
        return replace(self, instructions=self.levels[min(self.level, self.levels.index(instructions))])

    def path_for(self, m: int, dtype: torch.dtype, *, k: int = 4096, cols: int | None = None) -> str:
        """The name of the kernel for ``m`` tokens in ``dtype``, with scales that cover ``cols`` of a row's ``k``
        elements."""
        problem = _Problem(x_type=TYPES[dtype], m=m, k=k, cols=cols or max(k, 1))
        name: bytes = self.functions.fp8gemm_kernel(self.level, byref(problem))
        return name.decode()

    def linear(
        self,
        x: torch.Tensor,
        data: torch.Tensor,
        scale: torch.Tensor,
        rows: int,
        cols: int,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        nans: bool = True,
    ) -> None:
        """``out [M, N] = x [M, K] @ (data [N, K] * scale).T + bias [N]``, accumulated in float32 and rounded once.

        ``scale`` is float32 ``[ceil(N / rows), ceil(K / cols)]``. ``x`` is bfloat16, float16 or float32; ``bias`` and
        ``out`` have the same dtype, or float32. The last dimension of each has unit stride. ``nans`` may be False if
        ``has_nans(data)`` is: decoding is faster then.

        Raises:
            ValueError: a shape, dtype, stride or device does not match.
            MemoryError: there is not enough memory for a workspace.
        """
        self.bind(x, data, scale, rows, cols, bias, out)(x.data_ptr(), out.data_ptr(), nans)

    def bind(
        self,
        x: torch.Tensor,
        data: torch.Tensor,
        scale: torch.Tensor,
        rows: int,
        cols: int,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> Callable[[int, int, bool], None]:
        """``linear`` for operands like these, which are checked once; the result takes the addresses of ``x`` and
        ``out``, and ``nans``.

        Raises:
            ValueError: as for ``linear``. The returned function raises MemoryError if there is no memory for a
            workspace.
        """
        wrong = mistakes(x, data, scale, rows, cols, bias, out)
        if wrong:
            raise ValueError(f"native linear: {'; '.join(wrong)}")
        # Only read, so that threads may share it.
        problem = byref(_problem(x, data, scale, rows, cols, bias, out, True))
        function, level = self.functions.fp8gemm_linear_to, self.level

        def run(x_address: int, out_address: int, nans: bool) -> None:
            if status := function(level, torch.get_num_threads(), problem, x_address, out_address, nans):
                _check(status)

        return run

    def grouped(
        self,
        x: torch.Tensor,
        data: torch.Tensor,
        scale: torch.Tensor,
        rows: int,
        cols: int,
        ends: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        nans: bool = True,
    ) -> None:
        """``linear`` for each expert ``e``'s tokens, with ``data [E, N, K]``, ``scale [E, ...]`` and ``bias [E, N]``.

        Tokens are sorted by expert; those of expert ``e`` end before ``ends[e]``, int32 ``[E]`` on the CPU.

        Raises:
            ValueError: as for ``linear``, or ``ends`` does not ascend to M.
            MemoryError: there is not enough memory for a workspace.
        """
        wrong = mistakes(x, data, scale, rows, cols, bias, out)
        if ends.dtype != torch.int32 or tuple(ends.shape) != data.shape[:1] or not ends.is_contiguous() or away(ends):
            wrong.append(f"ends must be contiguous int32 {list(data.shape[:1])} on cpu, found {describe(ends)}")
        if wrong:
            raise ValueError(f"native grouped: {'; '.join(wrong)}")
        problem = _problem(x, data, scale, rows, cols, bias, out, nans)
        status = self.functions.fp8gemm_grouped(
            self.level, torch.get_num_threads(), byref(problem), data.stride(0), ends.data_ptr(), data.shape[0]
        )
        if status == -2:
            raise ValueError(f"native grouped: ends must ascend to M = {x.shape[0]}, found {ends.tolist()}")
        _check(status)

    def has_nans(self, data: torch.Tensor) -> bool:
        """Whether a code of float8_e4m3fn ``data [..., N, K]``, with unit stride along K on the CPU, is NaN."""
        n, k = data.shape[-2:]
        parts = data.unbind() if data.dim() == 3 else [data]
        threads = torch.get_num_threads()
        return any(self.functions.fp8gemm_has_nans(threads, p.data_ptr(), p.stride(0), n, k) for p in parts)

    def quantize(
        self,
        x: torch.Tensor,
        rows: int,
        cols: int,
        data_out: torch.Tensor,
        scale_out: torch.Tensor,
        *,
        ue8m0: bool = False,
    ) -> None:
        """``fp8gemm.numerics.quantize`` of ``x [N, K]`` to float8_e4m3fn, bit for bit, into the last two tensors.

        Raises:
            ValueError: a shape, dtype, stride or device does not match.
            MemoryError: there is not enough memory for a workspace.
        """
        wrong = quantize_mistakes(x, rows, cols, data_out, scale_out)
        if wrong:
            raise ValueError(f"native quantize: {'; '.join(wrong)}")
        if x.numel() == 0:
            scale_out.fill_(SCALE_FLOOR)
            return
        problem = _Quantization(
            *(x.data_ptr(), data_out.data_ptr(), scale_out.data_ptr(), TYPES[x.dtype], x.stride(0), data_out.stride(0)),
            *(*x.shape, rows, cols, ue8m0),
        )
        _check(self.functions.fp8gemm_quantize(self.level, torch.get_num_threads(), byref(problem)))

    def lookup(
        self,
        data: torch.Tensor,
        scale: torch.Tensor,
        rows: int,
        cols: int,
        ids: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Rows ``ids [M]`` (int64) of ``data [N, K] * scale``, or all rows, as ``[M, K]`` of ``dtype``, rounded once.

        ``data`` is float8_e4m3fn with unit stride along K, ``scale`` contiguous float32
        ``[ceil(N / rows), ceil(K / cols)]``, ``ids`` contiguous; the caller ensures that all are on the CPU.

        Raises:
            IndexError: an id is out of range.
        """
        n, k = data.shape
        out = torch.empty(n if ids is None else ids.numel(), k, dtype=dtype, device="cpu")
        problem = _Lookup(
            *(None if ids is None else ids.data_ptr(), data.data_ptr(), scale.data_ptr(), out.data_ptr()),
            *(TYPES[dtype], data.stride(0), out.shape[0], n, k, rows, cols),
        )
        status = self.functions.fp8gemm_lookup(self.level, torch.get_num_threads(), byref(problem))
        if status == INDEX:
            raise IndexError(f"an index is out of range for a weight with {n} rows")
        _check(status)
        return out


def _check(status: int) -> None:
    if status == NULL:
        raise ValueError("native kernels: an operand has elements but no memory, like some tensor subclasses")
    if status:
        raise MemoryError("the native kernels could not allocate their workspace")


def _problem(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    nans: bool,
) -> _Problem:
    return _Problem(
        *(x.data_ptr(), data.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()),
        *(TYPES[x.dtype], 0 if bias is None else TYPES[bias.dtype], TYPES[out.dtype]),
        *(x.stride(0), data.stride(-2), out.stride(0)),
        *(x.shape[0], data.shape[-2], x.shape[1], rows, cols, scale.shape[-1], nans),
    )
