# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Launching a kernel: the first time through Triton's binder, later directly through the compiled kernel."""

from __future__ import annotations

from typing import Any

import torch

from .replay import recording

# Compiled kernels by everything that Triton specializes on, except constants: see specialization().
_compiled: dict[tuple[Any, ...], Any] = {}
# Allows fused multiply-add, as Triton did by default up to 3.9, which warns that 3.10 will not.
ALWAYS = {"enable_fp_fusion": True}


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], **options: int
) -> None:
    """Runs ``kernel`` on the device of its first tensor and on that device's current stream.

    Triton's binder takes 8.7 to 12.5 us of host time per launch, the launcher of a compiled kernel 3.4 to 4.5
    (facebookexperimental/triton#1231, vllm#34838). ``constants`` must be in the order of the kernel's parameters, after
    ``args``: the compiled kernel takes them by position.
    """
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, args, constants, **options)
        return
    key = (kernel, device, *specialization(args), *constants.values(), *options.values())
    full = (*grid, 1, 1)[:3]
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[full](*args, *constants.values())
    else:
        compiled = kernel[grid](*args, **constants, **options, **ALWAYS)
        if compiled is not None:  # None in Triton's interpreter
            _compiled[key] = compiled
    tape = recording()
    if tape is not None:
        tape.note(compiled, full, (*args, *constants.values()))


def specialization(args: tuple[Any, ...]) -> list[Any]:
    """What a compiled kernel depends on in each argument: Triton's own rules, or finer distinctions.

    A tensor: its dtype, and whether its address is a multiple of 16. An integer: whether it is 1, a multiple of 16, or
    wider than 32 bits. A tensor descriptor: its dtype and block.
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


def divide_up(a: int, b: int) -> int:
    return -(-a // b)
