# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""What several kernels do inside: decode FP8 codes, and put the parts of a product that was split along K together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def format_of(data: torch.Tensor, *, native: bool) -> tuple[torch.Tensor, str]:
    """FP8 ``data`` as a kernel takes it, and the way to decode it.

    Below compute capability 8.9 Triton refuses pointers to e4m3, so codes travel as bytes.
    """
    if native:
        return data, "native"
    if data.dtype == torch.float8_e5m2:
        return data.view(torch.uint8), "e5m2"
    return data.view(torch.uint8), "bits" if triton.knobs.runtime.interpret else "packed"


# Four e4m3 codes to two pairs of bfloat16, 4 instructions a code where "bits", said in Triton, becomes 9 (sm_80). Each
# code goes to the upper byte of 16 bits; its magnitude, 4 bits lower, has the exponent where bfloat16 has it, too small
# by 2**120; magnitude 0x7F, NaN, carries into bit 11, and 15 times that bit fills the rest of the exponent.
_PAIR = """
    prmt.b32 code, $2, 0, {bytes};
    shr.b32 size, code, 4;
    and.b32 size, size, 0x07F007F0;
    add.u32 nan, size, 0x00100010;
    and.b32 nan, nan, 0x08000800;
    and.b32 code, code, 0x80008000;
    or.b32 code, code, size;
    mad.lo.u32 code, nan, 15, code;
    fma.rn.bf16x2 {out}, code, scale, zero;
"""
E4M3_TO_BF16 = tl.constexpr(
    "{\n    .reg .b32 code, size, nan, scale, zero;\n"
    "    mov.b32 scale, 0x7B807B80;\n    mov.b32 zero, 0x80008000;"  # 2**120 and -0 twice
    + _PAIR.format(bytes="0x1404", out="$0")
    + _PAIR.format(bytes="0x3424", out="$1")
    + "}"
)


@triton.jit
def decode(code, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """The exact values of FP8 codes in ``dtype``; NaN stays NaN.

    An e4m3 code whose exponent field is moved to where bfloat16 has it is a bfloat16 that is too small by 2**120,
    subnormals included. An e5m2 code is the upper byte of a float16. Through float32, since the conversion from
    float16, in which the hardware decodes, to bfloat16 runs at a quarter of the rate (F2F).
    """
    if FORMAT == "native":
        value = code.to(tl.float32).to(dtype)
    elif FORMAT == "packed":
        value = tl.inline_asm_elementwise(E4M3_TO_BF16, "=r,=r,r", [code], tl.bfloat16, is_pure=True, pack=4).to(dtype)
    elif FORMAT == "e5m2":
        value = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(dtype)
    else:
        wide = code.to(tl.uint16)
        magnitude = wide & 0x7F
        bits = ((wide & 0x80) << 8) | (magnitude << 4)
        bits = tl.where(magnitude == 0x7F, 0x7FC0, bits).to(tl.uint16)
        value = (bits.to(tl.bfloat16, bitcast=True) * tl.full((), 2.0**120, tl.float32).to(tl.bfloat16)).to(dtype)
    return value


@triton.jit
def is_last(counters, tile, SPLITS: tl.constexpr):
    """True in that program of a tile which arrives last, after every other has stored its part; resets the counter."""
    tl.debug_barrier()  # all threads' parts are stored before one thread says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(counters + tile, 0)
    return last


@triton.jit
def sum_parts(parts, offsets, mask, size, SPLITS: tl.constexpr):
    """The parts of a tile added up in one order, whichever program arrived last: the same bits at every call.

    Loaded past the L1 cache, which may hold what another multiprocessor has overwritten.
    """
    total = tl.load(parts + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for part in range(1, SPLITS):
        start = part * tl.cast(size, tl.int64)
        total += tl.load(parts + start + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return total
