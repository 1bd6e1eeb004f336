"""The machine instructions that decode e4m3 where the card has none of its own, carried out one by one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from fp8gemm.engines.triton.kernels.parts import E4M3_TO_BF16

WORD = 0xFFFFFFFF


def _prmt(a: int, b: int, selector: int) -> int:
    """Byte ``i`` of the result is byte ``selector[i]`` of the eight of b and a."""
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    picked = [source[(selector >> 4 * place) & 7] for place in range(4)]
    assert all((selector >> 4 * place) & 15 < 8 for place in range(4)), "sign replication is another instruction"
    return int.from_bytes(bytes(picked), "little")


def _fma_pairs(a: int, b: int, c: int) -> int:
    """``a * b + c`` of two bfloat16 each, rounded once."""
    x, y, z = (
        torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
        for word in (a, b, c)
    )
    low, high = (x * y + z).to(torch.bfloat16).view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "prmt.b32": _prmt,
    "shr.b32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: (a + b) & WORD,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & WORD,
    "mov.b32": lambda a: a,
    "fma.rn.bf16x2": _fma_pairs,
}


def run(code: int) -> tuple[int, int]:
    """The two words that the instructions make of four codes."""
    registers = {"$2": code}
    for line in re.findall(r"^\s*(\w[\w.]*) ([^;]+);", E4M3_TO_BF16.value, re.MULTILINE):
        name, (target, *operands) = line[0], [part.strip() for part in line[1].split(",")]
        values = [registers[operand] if operand in registers else int(operand, 0) for operand in operands]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers["$0"], registers["$1"]


def test_every_code_in_every_place() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
    for shift in range(4):
        for code in codes.tolist():
            four = [(code + 67 * (place - shift)) % 256 for place in range(4)]
            assert four[shift] == code
            words = run(int.from_bytes(bytes(four), "little"))
            found = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)], dtype=torch.int32)
            decoded, wanted = found.to(torch.int16).view(torch.bfloat16), expected[torch.tensor(four)]
            torch.testing.assert_close(decoded, wanted, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(decoded.signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])
