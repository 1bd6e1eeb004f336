"""Every kernel that the engine would launch compiles for its cards: nothing spills, all fits, matrix units multiply.

Needs Triton (``pip install --no-deps triton``) and no card. What is launched is decided by the engine itself.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from fp8gemm import BLOCK_128, GROUP_128, MX, ROW, SCHEMES, Machine, MatmulSpec, Scheme
from fp8gemm.engines.triton.engine import TritonEngine, installed
from fp8gemm.engines.triton.plan import place

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
_HERE = Machine(device="cuda", capability=(9, 0), found={"triton": installed()})
_REASONS = TritonEngine().rejects(MatmulSpec(scheme=SCHEMES["row"], n=128, k=128), _HERE)
if _REASONS:
    pytest.skip("; ".join(_REASONS), allow_module_level=True)

from compilation import Launch, compile_for, recorded  # noqa: E402
from elsewhere import engine_on, grouped, linear, weight_of  # noqa: E402

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
QUANTIZING = CAPABILITIES[2:]  # cards with FP8 products
TOKENS = [1, 2, 4, 16, 64, 128, 256, 1024, 4096]
# Aligned; N not a multiple of 16; N small; neither; one output; K small.
SHAPES = [(4096, 4096), (4097, 4096), (2112, 7168), (1024, 4096), (36, 60), (1, 4096), (32768, 512)]
MERGED = Scheme(weight=replace(ROW, rows=64), activation=ROW)  # a scale for each of several concatenated projections
PROBLEMS = {
    "row": SCHEMES["row"],
    "block": SCHEMES["block"],
    "weight-only": SCHEMES["weight_only"],
    "merged": MERGED,
    "block weight-only": Scheme(weight=BLOCK_128, activation=None),
    "groups": Scheme(weight=GROUP_128, activation=None),
    "mx": Scheme(weight=MX, activation=None, scale_format="ue8m0"),
}
# The compiler treats sm_86 and sm_103 as sm_80 and sm_100: there, the schemes with FP8 activations. Finer scales once
# a generation.
SIBLINGS, GENERATIONS = ((8, 6), (10, 3)), ((8, 0), (9, 0), (12, 0))
WHERE = {
    **dict.fromkeys(PROBLEMS, GENERATIONS),
    **dict.fromkeys(("row", "block"), CAPABILITIES),
    "weight-only": [one for one in CAPABILITIES if one not in SIBLINGS],
}
# Kernels that multiply matrices; the others stream.
MATRIX_KERNELS = ("token_kernel", "row_kernel", "block_kernel", "grouped_kernel")


def _engine(capability: tuple[int, int], *, library: bool) -> TritonEngine:
    """An engine on a card with or without torch's FP8 products."""
    where = place(capability)
    return engine_on(where if library else replace(where, library=frozenset()))


def _check(launches: list[Launch], capability: tuple[int, int], seen: set[object]) -> None:
    from fp8gemm.engines.triton.launch import specialization

    limit = place(capability).shared
    for launch in launches:
        key = (launch.name, tuple(specialization(launch.args)))
        if key in seen:
            continue
        seen.add(key)
        compiled = compile_for(launch, capability)
        floating = {arg.dtype for arg in launch.args if isinstance(arg, torch.Tensor)}
        assert compiled.spills == 0, f"{capability} {launch.name}: {compiled}"
        assert compiled.shared <= limit, f"{capability} {launch.name}: {compiled}"
        assert "FORMAT" not in launch.constants or compiled.slow == 0, f"{capability} {launch.name}: {compiled}"
        product = any(name in launch.kernel.__name__ for name in MATRIX_KERNELS) and "ROWS" not in launch.constants
        if product and launch.args[0] is not None and torch.float32 not in {_dtype(launch.args[0])}:
            assert compiled.matrix, f"{capability} {launch.name}: no matrix instruction, {floating}"


def _dtype(arg: object) -> torch.dtype:
    tensor = arg if isinstance(arg, torch.Tensor) else arg.base  # type: ignore[attr-defined]
    return tensor.dtype


def _each(problems: list[str]) -> pytest.MarkDecorator:
    """Every capability and problem that are compiled together."""
    pairs = [(capability, problem) for problem in problems for capability in WHERE[problem]]
    return pytest.mark.parametrize(("capability", "problem"), pairs, ids=_name)


def _name(value: object) -> str:
    return "sm{}{}".format(*value) if isinstance(value, tuple) else str(value)


@_each(list(PROBLEMS))
def test_linear_compiles(capability: tuple[int, int], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[object] = set()
    scheme = PROBLEMS[problem]
    for library in (True, False):
        engine = _engine(capability, library=library)
        for (n, k), m in itertools.product(SHAPES, TOKENS):
            call = partial(linear, engine, scheme, n, k, m, torch.bfloat16, bias=True)
            _check(recorded(call, monkeypatch), capability, seen)
    assert seen


@pytest.mark.parametrize("capability", WHERE["weight-only"], ids=_name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_compile(capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[object] = set()
    engine = _engine(capability, library=False)
    for problem, m in itertools.product(("row", "block", "mx"), (1, 16, 64, 1024)):
        calls = lambda m=m, p=problem: linear(engine, PROBLEMS[p], 4096, 4096, m, dtype, bias=False)  # noqa: E731
        _check(recorded(calls, monkeypatch), capability, seen)
    assert seen


@pytest.mark.parametrize("stack", [False, True], ids=["linear", "grouped"])
@pytest.mark.parametrize("capability", QUANTIZING, ids=_name)
def test_precise_accumulation_adds_in_float32(
    capability: tuple[int, int], stack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One addition per sum and step beside the matrix instructions, where their accumulators are short."""
    engine, row = _engine(capability, library=False), SCHEMES["row"]
    for n, tokens in itertools.product((4096, 4097), (128, 4096)):
        adds = {}
        for accumulate in ("fast", "precise"):
            if stack:
                call = partial(grouped, engine, row, 8, n, 4096, 8 * tokens, accumulate=accumulate)
            else:
                call = partial(linear, engine, row, n, 4096, tokens, torch.bfloat16, bias=True, accumulate=accumulate)
            launches = recorded(call, monkeypatch)
            _check(launches, capability, set())
            adds[accumulate] = compile_for(launches[-1], capability).adds
        constants, options = launches[-1].constants, launches[-1].options
        sums = constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * options["num_warps"])
        promoted = capability in ((8, 9), (9, 0), (12, 0))
        assert adds["precise"] - adds["fast"] == (sums if promoted else 0), (n, tokens, adds)


@pytest.mark.parametrize(
    ("capability", "multiprocessors"), [((8, 9), 128), ((9, 0), 132), ((10, 0), 148), ((12, 0), 170)]
)
def test_one_token_is_one_wave(
    capability: tuple[int, int], multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 x 4096: all programs run at the same time, and no step waits at a barrier for shared memory."""
    engine = _engine(capability, library=False)
    call = partial(linear, engine, SCHEMES["row"], 4096, 4096, 1, torch.bfloat16, bias=True)
    (launch,) = recorded(call, monkeypatch)
    compiled = compile_for(launch, capability)
    threads = 32 * launch.options["num_warps"]
    programs = 4096 // launch.constants["BLOCK_N"] * launch.constants["SPLITS"]
    registers = -(-compiled.registers // 8) * 8 * threads  # allocated in eights a thread, of 65536 a multiprocessor
    assert programs <= multiprocessors * (65536 // registers), compiled
    assert compiled.shared <= 4 * launch.options["num_warps"] * launch.constants["BLOCK_N"], "more than partial sums"


@pytest.mark.parametrize("capability", QUANTIZING, ids=_name)
def test_blocks_are_multiplied_in_fp8(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However few the tokens."""
    engine = _engine(capability, library=False)
    calls = [
        partial(linear, engine, SCHEMES["block"], 4096, 4096, m, torch.bfloat16, bias=True) for m in (1, 16, 32, 64)
    ]
    calls.append(partial(grouped, engine, SCHEMES["block"], 8, 4096, 2048, 8))
    for call in calls:
        launch = recorded(call, monkeypatch)[-1]
        assert compile_for(launch, capability).fp8, launch.name


@_each(["row", "block", "weight-only", "mx"])
def test_grouped_compiles(capability: tuple[int, int], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[object] = set()
    scheme = PROBLEMS[problem]
    engine = _engine(capability, library=False)
    for (experts, n, k), mean in itertools.product([(8, 4096, 2048), (256, 512, 7168), (3, 36, 60)], (1, 16, 64, 512)):
        for accumulate in ("fast", "precise"):
            call = partial(grouped, engine, scheme, experts, n, k, experts * mean, accumulate=accumulate)
            _check(recorded(call, monkeypatch), capability, seen)
    assert seen


@pytest.mark.parametrize("k", [8, 60, 4096, 16384, 32768, 40000])
@pytest.mark.parametrize("capability", QUANTIZING, ids=_name)
def test_quantization_compiles(capability: tuple[int, int], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of up to 32768 elements stay in registers."""
    from fp8gemm.engines.triton.kernels import quantize

    seen: set[object] = set()
    for gated, ue8m0 in itertools.product((False, True), repeat=2):
        rounding = quantize.Rounding(ue8m0=ue8m0)
        x = torch.empty(2048, k, dtype=torch.bfloat16, device="meta")
        up = torch.empty_like(x) if gated else None
        for call in (quantize.quantize_rows, quantize.quantize_groups):
            launches = recorded(lambda call=call, x=x, up=up, rounding=rounding: call(x, rounding, up=up), monkeypatch)
            _check(launches, capability, seen)
    assert seen


def test_a_spill_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: 128 x 256 sums in 4 warps do not fit into registers."""
    from fp8gemm.engines.triton.kernels import row

    engine = _engine((9, 0), library=True)
    weight = engine.prepare(weight_of(SCHEMES["row"], 4096, 4096), SCHEMES["row"])
    xq = torch.empty(4096, 4096, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(4096, 1, device="meta")
    launches = recorded(
        lambda: row.multiply_rows(
            xq,
            scale,
            weight,
            None,
            torch.bfloat16,
            promotion="instruction",
            tma=True,
            programs=132,
            block_m=128,
            block_n=256,
            block_k=128,
            warps=4,
            stages=3,
        ),
        monkeypatch,
    )
    with pytest.raises(AssertionError, match="spills"):
        _check(launches, (9, 0), set())
