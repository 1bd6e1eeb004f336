"""Plans for Triton kernels: the properties of a GPU (``Place``), tile sizes, and the formula for unmeasured
problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# Kinds of products: FP8 activations with a scale per row, or per group of 128; or weight-only, with scales of the
# weight that are constant along K ("weight") or not ("weight_k").
Kind = Literal["row", "block", "weight", "weight_k"]
# vectors, tokens: weight-only (W8A16); rows, blocks: FP8 products; library: torch's product after a quantization
# kernel; dense: dequantize the weight to 16 bits and use torch's ordinary product.
PathName = Literal["vectors", "tokens", "rows", "blocks", "library", "dense"]

# How FP8 products add up in float32: not at all, or after every 128 products, by Triton's option for Hopper or by sums
# outside of the instruction.
Promotion = Literal["none", "instruction", "sum"]

LARGEST_M = 16384  # plans do not change beyond this
# The largest M at which activations are not quantized or, with block scales, quantized inside the product. There every
# tile along N quantizes its tokens again, which for more tokens costs more than a launch (sm_90: 20 instructions per
# weight at 32).
AS_THEY_ARE_UP_TO, INLINE_UP_TO = 64, 16


@dataclass(frozen=True, eq=False, kw_only=True)
class Place:
    """The properties of a GPU that decide a plan; one object per device, so that a lookup compares nothing.

    ``native``: multiplies and decodes e4m3. ``tma``: has tensor memory accelerators. ``shared``: bytes of shared memory
    per program. ``library``: the kinds for which torch has an FP8 product on this GPU.
    """

    arch: str
    card: str = ""
    multiprocessors: int = 132
    native: bool = True
    tma: bool = True
    shared: int = 227 * 1024
    library: frozenset[Kind] = frozenset()

    @property
    def tensor_memory(self) -> bool:
        """Whether accumulators are in tensor memory; they reach the registers all at once, and spill in 4 warps."""
        return self.arch in ("sm100", "sm103")

    @property
    def weight_first(self) -> bool:
        """Whether pipelined FP8 products of any M are ``w @ x.T``; ``multiply_rows`` says why."""
        return self.arch == "sm89"

    @property
    def promotion(self) -> Promotion:
        """What ``accumulate="precise"`` needs. Published, not measured here:

        accumulators of Hopper and Ada keep 13 bits of the mantissa (SageAttention 2, arXiv 2411.10958), those of B200
        25 (DeepGEMM#176); of RTX 50 cards only that they differ from Ada's (mmaemu 0.1.0), so they are not trusted.
        """
        if self.arch == "sm90":
            return "instruction"
        return "none" if self.tensor_memory else "sum"


# The fields of a plan that the kernel of each path takes.
TILES: Mapping[PathName, tuple[str, ...]] = {
    "vectors": ("block_n", "block_k", "splits", "warps", "stages"),
    "tokens": ("block_m", "block_n", "block_k", "splits", "warps", "stages"),
    "rows": ("block_m", "block_n", "block_k", "warps", "stages", "tma"),
    "blocks": ("block_m", "block_n", "splits", "warps", "stages"),
    "library": (),
    "dense": (),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A kernel and its tiles; ``splits`` is the number of parts along K, ``stages`` that of the software pipeline.

    ``kept_is_faster``: torch's product with a 16-bit weight is faster, if the layer has kept one.
    """

    path: PathName
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    splits: int = 1
    warps: int = 4
    stages: int = 1
    tma: bool = False
    kept_is_faster: bool = False

    @property
    def tiles(self) -> dict[str, Any]:
        """The arguments of the path's kernel."""
        return {name: getattr(self, name) for name in TILES[self.path]}


# KiB of shared memory per program, by compute capability (CUDA programming guide, technical specifications).
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


def place(
    capability: tuple[int, int], *, card: str = "", multiprocessors: int = 132, cuda: tuple[int, int] = (12, 9)
) -> Place:
    """The ``Place`` for a compute capability; torch's FP8 products as in its ScaledBlas.cpp."""
    library: set[Kind] = set()
    if capability in ((9, 0), (10, 0), (10, 3)):
        library.add("row")
    if capability == (9, 0) and cuda >= (12, 9):
        library.add("block")
    return Place(
        arch="sm{}{}".format(*capability),
        card=card,
        multiprocessors=multiprocessors,
        native=capability >= (8, 9),
        tma=capability >= (9, 0),
        shared=_SHARED_KIB.get(capability, 99) * 1024,
        library=frozenset(library),
    )


def bucket(m: int) -> int:
    """The next power of two, so that few variants of a kernel serve every M."""
    return min(1 << (m - 1).bit_length(), LARGEST_M)


def formula(where: Place, kind: Kind, n: int, k: int, m: int, *, wide: bool = False, scale_cols: int = 0) -> Plan:
    """The plan where nothing was measured: from lower bounds for memory and arithmetic of an H200 (itself not timed).

    Up to M of about 90 the time is that of reading w in 8 bits, and W8A16 needs no quantization launch; beyond that,
    FP8 products are faster. On GPUs without FP8 products, 16-bit ones are faster beyond 96 tokens.
    """
    chosen = _formula(where, kind, n, k, m, wide=wide, scale_cols=scale_cols)
    return replace(chosen, kept_is_faster=not wide and _kept_is_faster(chosen, n, k, m))


# Reported of an H200 with torch 2.11, not measured by this project: bytes copied and bfloat16 operations a second, and
# the least time of a launch in a CUDA graph. That FP8 has twice as many operations is derived.
BYTES_PER_SECOND, BF16_FLOPS, LAUNCH_SECONDS = 4.3e12, 790e12, 2e-6


def _kept_is_faster(chosen: Plan, n: int, k: int, m: int) -> bool:
    """Compares the lower bounds of both products: FP8 can be slower only with a quantization launch and a small N."""
    if chosen.path == "dense":
        return True  # the same product after another pass over the weight
    if chosen.path in ("vectors", "tokens") or (chosen.path == "blocks" and m <= INLINE_UP_TO):
        return False
    products = 2 * m * n * k
    bf16 = max(products / BF16_FLOPS, 2 * (m * k + n * k + m * n) / BYTES_PER_SECOND)
    fp8 = max(products / BF16_FLOPS / 2, (m * k + n * k + 2 * m * n) / BYTES_PER_SECOND)
    return bf16 < fp8 + LAUNCH_SECONDS + 3 * m * k / BYTES_PER_SECOND


def _formula(where: Place, kind: Kind, n: int, k: int, m: int, *, wide: bool, scale_cols: int) -> Plan:
    if kind == "block":
        if m >= 512 and in_library(where, kind, n, k) and not wide:
            return Plan(path="library")
        return _blocks(where, n, k, m)
    # Without tensor cores, 4 tokens take 8.6 instructions per weight, and one takes 3.7. With them, up to 16 take 3.3,
    # or 5.4 where there is no instruction for decoding (compiled with Triton 3.6).
    if kind != "weight_k" and (m <= 4 if wide else m == 1 and where.native):
        return _vectors(where, n, k, m)
    if kind == "row" and (m > AS_THEY_ARE_UP_TO or wide):
        if m >= 128 and in_library(where, kind, n, k) and not wide:
            return Plan(path="library")
        return _rows(where, n, k, m)
    if m > (64 if wide or not where.native else 256):
        return Plan(path="dense")
    return _tokens(where, n, k, m, wide=wide, scale_cols=scale_cols)


def quantized_plan(where: Place, kind: Kind, chosen: Plan, n: int, k: int, m: int) -> Plan:
    """``chosen`` if it takes activations that are quantized already, else the formula's plan that does."""
    if chosen.path in ("rows", "blocks", "library"):
        return chosen
    return _blocks(where, n, k, bucket(m)) if kind == "block" else _rows(where, n, k, bucket(m))


def in_library(where: Place, kind: Kind, n: int, k: int) -> bool:
    """Whether torch's FP8 products support this problem: N and K are multiples of 16, or of 128 with block scales.

    Row scales need that on every GPU (torch's ScaledBlas.cpp). torch 2.13's shape check needs whole blocks of N.
    """
    multiple = 128 if kind == "block" else 16
    return kind in where.library and n % multiple == 0 and k % multiple == 0


# The partial sums of a split product, written and read once each, take at most this part of the bytes of the weight.
WORKSPACE = 0.15


def _splits(where: Place, tiles: int, k: int, m: int, step: int, *, at_least: int, programs: int = 2) -> int:
    """The number of parts along K for about ``programs`` per multiprocessor, with ``at_least`` steps each: 1 to 8."""
    splits, steps, most = 1, -(-k // step), min(8, WORKSPACE * k / (8 * m))
    while 2 * splits <= most and 3 * tiles * splits < 2 * programs * where.multiprocessors:
        if steps < 2 * splits * at_least:
            break
        splits *= 2
    return splits


def _vectors(where: Place, n: int, k: int, m: int) -> Plan:
    """For one token, 32 weights a thread and step, loaded at once by four instructions, and at most 64 registers.

    So 1056 programs run on an H100 at a time, and N = 4096 is a single wave of 1024. More stages would pass operands
    through shared memory: 5.8 instructions per weight and 2 barriers a step instead of 3.7 and none (compiled for
    sm_90 with Triton 3.6); tuning tries them.
    """
    block_n = 4 if m == 1 else 2
    block_k = min(1024, max(128, 1 << (k - 1).bit_length()))
    splits = _splits(where, -(-n // block_n), k, m, block_k, at_least=1)
    return Plan(path="vectors", block_n=block_n, block_k=block_k, splits=splits)


def _tokens(where: Place, n: int, k: int, m: int, *, wide: bool, scale_cols: int) -> Plan:
    largest = 64 if where.arch == "sm90" else 32  # 64 spill without Hopper's instruction for them
    block_m, block_n, block_k = min(max(m, 16), largest), 64, 32 if wide or k % 16 else 128
    while scale_cols and scale_cols % block_k:
        block_k //= 2
    # Two warps leave a multiprocessor idle where four do not, and the partial sums of 16 tokens are small.
    tiles, programs = -(-m // block_m) * -(-n // block_n), 4 if block_m == 16 else 2
    splits = _splits(where, tiles, k, m, block_k, at_least=4, programs=programs)
    # Beside memory, decoding dominates. Instructions per weight, compiled with Triton 3.6 for sm_90: two warps along N
    # decode each weight once, 8 bytes at a time (3.4 and 4.2 for 16 and 32 tokens); four at 64 tokens share Hopper's
    # larger instruction (4.8); eight would decode everything twice (8.9). More warps where registers are too few.
    tight = wide or (block_m > 16 and n % 16)
    full = k % 16 or (wide and scale_cols and block_m > 16 and not where.native)  # the latter for Triton 3.9
    warps, stages = 8 if full else (4 if block_m == 64 else 2) * (2 if tight else 1), 2 if wide else 4
    if tiles * splits < where.multiprocessors and not wide and k % 16 == 0:
        # One program each: more bytes in flight, and fewer instructions a warp: 244 a step of 32 outputs instead of 437
        # at 16 tokens, 298 in 4 warps instead of 544 in 2 at 32. At 64, half a tile takes more a warp than a whole one.
        stages = 6
        block_n, warps = (32, warps) if block_m == 16 else (block_n, 4)
    tile: dict[str, Any] = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
    return Plan(path="tokens", **tile, splits=splits, warps=warps, stages=stages)


def _rows(where: Place, n: int, k: int, m: int) -> Plan:
    """128 x 256 tiles fill an H100's registers; in 4 stages instead of 3, Triton 3.9 spills some at their end.

    They need aligned rows of y, and TMA for addresses. Without either, or with accumulators in tensor memory, 128 x 128
    is the largest tile that does not spill. Rows of x and w that are not aligned to 16 bytes are loaded byte by byte,
    in small tiles (all compiled with Triton 3.6). On sm_120, TMA saves nothing: a step of 128 x 128 takes 208
    instructions with it and 127 without, for 64 products (135 and 126 with Triton 3.9).
    """
    if k % 16:
        return Plan(path="rows", block_m=64, block_n=64, block_k=64, warps=8, stages=1)
    aligned = n % 16 == 0
    block_m, block_n = (64 if m <= 64 else 128), 128
    if where.arch == "sm90" and m > 64 and aligned and -(-m // 128) * -(-n // 256) >= where.multiprocessors:
        block_n = 256
    elif -(-m // block_m) * -(-n // 128) < where.multiprocessors or (where.tensor_memory and not aligned):
        block_n = 64
    stages = min(3 if block_n == 256 else 4, where.shared // ((block_m + block_n) * 128 + 1024))
    warps = 8 if block_m * block_n > 64 * 128 or where.tensor_memory else 4
    tma = where.tma and not where.arch.startswith("sm12")
    return Plan(path="rows", block_m=block_m, block_n=block_n, block_k=128, warps=warps, stages=stages, tma=tma)


def _blocks(where: Place, n: int, k: int, m: int) -> Plan:
    """Tiles from vLLM's tuned tables for an H200, 64 x 128, beyond 64 tokens; the largest take 8 warps.

    Below, tiles with few instructions per weight, compiled for sm_90: 16 x 128 where tokens are quantized inside the
    product, so that few tiles repeat that (3.3), 32 x 128 (1.3) and 64 x 64 (1.9). Half as wide, the first two take 95
    and 79 % of a program's instructions, which is less time where half of the multiprocessors would be idle.
    """
    if k % 16:
        return Plan(path="blocks", block_m=16, block_n=32, block_k=128, warps=8, stages=1)
    if m > 64:
        large = m >= 1024 and where.shared >= 163 * 1024
        block_m, warps = (128, 8) if large else (64, 4 if n % 16 == 0 else 8)
        return Plan(path="blocks", block_m=block_m, block_n=128, block_k=128, warps=warps, stages=3)
    block_m, block_n = (16 if m <= INLINE_UP_TO else 32, 128) if m <= 32 else (64, 64)
    splits = _splits(where, -(-n // block_n), k, m, 128, at_least=4)
    programs = -(-n // block_n) * splits
    if block_n == 128 and 2 * programs <= where.multiprocessors:
        block_n = 64
    few = block_m == 16 or (n % 16 == 0 and (block_m == 32 or where.arch == "sm90"))
    stages = 3 if programs > where.multiprocessors else 4
    tile: dict[str, Any] = {"block_m": block_m, "block_n": block_n, "block_k": 128}
    return Plan(path="blocks", **tile, splits=splits, warps=4 if few else 8, stages=stages)


@dataclass(frozen=True, kw_only=True)
class GroupedPlan:
    """The plan of a grouped product: its mode, whether a separate launch quantizes activations, and its tiles."""

    mode: Literal["weight", "row", "block", "library"]
    quantize_first: bool
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1


def grouped_plan(
    where: Place, kind: Kind, n: int, k: int, tokens: int, experts: int, *, wide: bool = False, scale_cols: int = 0
) -> GroupedPlan:
    """Chosen by the mean number of tokens per expert; up to 16, activations are not quantized, as in ``formula``.

    Beyond 64, torch's CUTLASS kernels run row scales on Hopper, the only architecture that they are for: published,
    Triton's are slower from about there on (vllm#13932).
    """
    mean = bucket(max(1, tokens // max(experts, 1)))
    hopper = where.arch == "sm90"
    if hopper and kind == "row" and mean > 64 and not wide and in_library(where, kind, n, k):
        return GroupedPlan(mode="library", quantize_first=True)
    unaligned = k % 16 != 0  # loaded byte by byte, in small tiles
    # The tiles are those of ``_blocks`` and ``_tokens``.
    block_m, warps = (16, 8) if unaligned else (16, 4) if mean <= INLINE_UP_TO else (64, 4)
    if kind == "block":
        block_n = 32 if unaligned else 128 if block_m == 16 else 64
        return GroupedPlan(
            mode="block",
            quantize_first=mean > INLINE_UP_TO,
            block_m=block_m,
            block_n=block_n,
            block_k=128,
            warps=warps,
            stages=1 if unaligned else 3,
        )
    rounds = kind == "row" and (mean > 16 or wide)
    block_k = 64 if unaligned else 128 if rounds else 32 if wide else 64
    while scale_cols and scale_cols % block_k:
        block_k //= 2
    return GroupedPlan(
        mode="row" if rounds else "weight",
        quantize_first=rounds,
        block_m=block_m,
        block_n=128 if rounds and not unaligned else 64,
        block_k=32 if unaligned and not rounds else block_k,
        warps=2 if block_m == 16 and not (unaligned or rounds or wide or scale_cols) else warps,
        stages=1 if unaligned else 3,
    )


def precise(where: Place, chosen: Plan) -> Plan:
    """The same plan with partial sums moved to float32 after every 128 products, where accumulators are short.

    That needs two accumulators at a time: on sm_90, 128 x 256 spills, 256 x 128 in 3 stages takes 255 registers; the
    tiles of sm_89 and sm_120 take up to 255 (compiled with Triton 3.6 and 3.9).
    """
    if chosen.path != "rows" or where.promotion == "none":
        return chosen
    if where.promotion == "sum":
        return replace(chosen, block_k=min(chosen.block_k, 128))
    return replace(chosen, block_m=256, block_n=128, stages=3) if chosen.block_n == 256 else chosen
