# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""How a kernel is launched: once through Triton's binder, then straight through the kernel that it compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton

# What Triton specializes a kernel on, next to its constants: see specialization().
_compiled: dict[tuple[Any, ...], Any] = {}
# Counters of split products by (device, stream): zero between launches, as the last program of a tile resets its own.
_counters: dict[tuple[int | None, int], torch.Tensor] = {}
# Contracts multiply and add, as Triton did by default up to 3.9, which warns that 3.10 will not.
ALWAYS = {"enable_fp_fusion": True}
COUNTERS = 4096  # tiles of a split product; one that has more needs no split


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], **options: int
) -> None:
    """Runs ``kernel`` on the device of its first tensor and on that device's current stream.

    Triton's binder takes 8.7 to 12.5 us of host time a launch, the launcher of a compiled kernel 3.4 to 4.5
    (facebookexperimental/triton#1231, vllm#34838). ``constants`` stand in the order of the kernel's parameters, after
    ``args``: the compiled kernel takes them by position.
    """
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, args, constants, **options)
        return
    key = (kernel, device, *specialization(args), *constants.values(), *options.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*args, *constants.values())
        return
    compiled = kernel[grid](*args, **constants, **options, **ALWAYS)
    if compiled is not None:  # the interpreter gives None
        _compiled[key] = compiled


def specialization(args: tuple[Any, ...]) -> list[Any]:
    """What of each argument a compiled kernel depends on: Triton's own rules, and never fewer distinctions.

    A tensor by dtype and by whether its address is a multiple of 16; an integer by being 1, a multiple of 16, or more
    than 32 bits; a tensor descriptor by dtype and block.
    """
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, int):
            found.append((arg == 1, arg % 16 == 0, arg >= 2**31))
        elif isinstance(arg, float):
            found.append(float)
        else:
            found.append((arg.base.dtype, *arg.block_shape))
    return found


def counters(device: torch.device) -> torch.Tensor:
    """``COUNTERS`` int32 zeros that only the current stream uses.

    A CUDA graph gets its own, zeroed by a node of the graph: it may be replayed on any stream, beside any other.
    """
    if device.type != "cuda":
        return torch.zeros(COUNTERS, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


def descriptor(tensor: torch.Tensor, block: list[int]) -> Any:
    """What a TMA load takes: a tensor ``[rows, K]`` and the tile ``block`` that is fetched at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, block)


def divide_up(a: int, b: int) -> int:
    return triton.cdiv(a, b)
