# mypy: ignore-errors
# Triton is untyped, and not installed everywhere.
"""Device functions shared by kernels: decoding FP8 codes, and reducing a product that was split along K."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def format_of(data: torch.Tensor, *, native: bool) -> tuple[torch.Tensor, str]:
    """FP8 ``data`` as a kernel takes it, and the name of the decoding to use.

    Below compute capability 8.9 Triton refuses pointers to e4m3, so codes are passed as bytes.
    """
    if native:
        return data, "native"
    if data.dtype == torch.float8_e5m2:
        return data.view(torch.uint8), "e5m2"
    return data.view(torch.uint8), "bits" if triton.knobs.runtime.interpret else "packed"


# Four e4m3 codes to two pairs of bfloat16 in 4 instructions per code; "bits", written in Triton, takes 9 (sm_80). Each
# code goes to the upper byte of 16 bits; its magnitude, shifted right by 4, has the exponent where bfloat16 has it, too
# small by 2**120; magnitude 0x7F, NaN, carries into bit 11, and 15 times that bit fills the rest of the exponent.
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

    An e4m3 code whose exponent field is moved to bfloat16's position is a bfloat16 that is too small by 2**120,
    including subnormals. An e5m2 code is the upper byte of a float16. Conversions go through float32, because the
    hardware decodes to float16 and converts float16 to bfloat16 at a quarter of the rate (F2F).
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
    """True in the program of a tile that arrives last, after all others stored their part; resets the counter."""
    tl.debug_barrier()  # all threads' parts are stored before one thread increments the counter
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(counters + tile, 0)
    return last


@triton.jit
def sum_parts(parts, offsets, mask, size, SPLITS: tl.constexpr):
    """The sum of a tile's parts in a fixed order, whichever program arrived last: the same bits at every call.

    The loads bypass the L1 cache, which may be stale after another multiprocessor's writes.
    """
    total = tl.load(parts + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for part in range(1, SPLITS):
        start = part * tl.cast(size, tl.int64)
        total += tl.load(parts + start + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return total
