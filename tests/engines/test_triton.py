"""The Triton engine without a GPU: what it supports, which kernels it would launch, and its kernels interpreted."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp8gemm import GROUP_128, MX, ROW, SCHEMES, Granularity, Machine, MatmulSpec, ScaledTensor, Scheme
from fp8gemm.engines.triton import table as tables
from fp8gemm.engines.triton.engine import Triton, TritonEngine, installed
from fp8gemm.engines.triton.plan import INLINE_UP_TO, Place, Plan, formula, place
from fp8gemm.engines.triton.table import MOST_SPLIT_TILES, plan

H100 = Machine(device="cuda", name="H100", capability=(9, 0), found={"triton": Triton((3, 6))})
SPEC = MatmulSpec(scheme=SCHEMES["row"], n=4096, k=4096)
MX_SCHEME = Scheme(weight=MX, activation=None, scale_format="ue8m0")
TOKENS = [2**power for power in range(15)]
# The order of the paths: as M grows, a problem moves only to the right.
ORDER = ["vectors", "tokens", "rows", "blocks", "library", "dense"]


@pytest.mark.parametrize(
    ("spec", "machine", "reason"),
    [
        (SPEC, replace(H100, device="cpu", capability=None), "runs on cuda only, found cpu"),
        (SPEC, replace(H100, capability=(7, 5)), "needs compute capability 8.0 or newer, found 7.5"),
        (SPEC, replace(H100, capability=None), "needs compute capability 8.0 or newer, found unknown"),
        (SPEC, replace(H100, found={}), "Triton is not installed"),
        (SPEC, replace(H100, found={"triton": Triton((3, 5))}), "needs Triton 3.6 or newer, found 3.5"),
        (replace(SPEC, compute_dtype=torch.float64), H100, "returns bfloat16, float16 or float32, not float64"),
        (
            replace(SPEC, scheme=Scheme(weight=Granularity(1, 24), activation=None)),
            H100,
            "supports scales along K in multiples of 16, found 1x24",
        ),
    ],
)
def test_rejects_with_the_reason(spec: MatmulSpec, machine: Machine, reason: str) -> None:
    assert TritonEngine().rejects(spec, machine) == [reason]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_accepts_what_others_reject(capability: tuple[int, int]) -> None:
    machine = replace(H100, capability=capability)
    for scheme in (*SCHEMES.values(), MX_SCHEME, Scheme(weight=GROUP_128, activation=ROW)):
        for experts, n, k in itertools.product((0, 8), (1, 4097), (1, 4095)):
            spec = MatmulSpec(scheme=scheme, n=n, k=k, experts=experts)
            assert TritonEngine().rejects(spec, machine) == []


PLACES = {
    f"sm{major}{minor}": place((major, minor)) for major, minor in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
}


@pytest.mark.parametrize("where", list(PLACES.values()), ids=list(PLACES))
@pytest.mark.parametrize("kind", ["row", "block", "weight", "weight_k"])
def test_formula_is_complete_and_monotone(where: Place, kind: str) -> None:
    """Every problem has a plan that can run, and more tokens never lead back to a kernel for fewer tokens."""
    for n, k, wide in itertools.product((1, 17, 4096, 128256), (1, 60, 4096, 28672), (False, True)):
        cols = 128 if kind == "weight_k" else 0
        plans = [formula(where, kind, n, k, m, wide=wide, scale_cols=cols) for m in TOKENS]  # type: ignore[arg-type]
        ranks = [ORDER.index(one.path) for one in plans]
        assert ranks == sorted(ranks), (n, k, [one.path for one in plans])
        for m, one in zip(TOKENS, plans, strict=True):
            _runs(where, kind, one, n, k, m, cols)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), MX_SCHEME], ids=str)
def test_every_kind_of_plan_is_proven(capability: tuple[int, int], scheme: Scheme) -> None:
    """Before ``auto`` trusts a GPU: each path that any M may take, with and without TMA, splits and quantization."""

    class OnCard(TritonEngine):
        def place(self, device: torch.device) -> Place:
            return place(capability)

    engine = OnCard()
    for n, k in ((4096, 14336), (32001, 4096), (1024, 1000), (36, 60)):
        small = engine.prepare(_weight(scheme, 256 + n % 128, 1024 + k % 128), scheme)
        proven = {_kind(trial.run.args[0], trial.m) for trial in engine.trials(small, torch.bfloat16)}  # type: ignore[attr-defined]
        large = engine.prepare(_weight(scheme, n, k), scheme)
        met = {_kind(engine.plan(m, large, torch.bfloat16), m) for m in TOKENS}
        if n > 1000:
            assert met <= proven, (n, k)
        assert {kind[0] for kind in met} <= {kind[0] for kind in proven}, (n, k)


def _kind(chosen: Plan, m: int) -> tuple[str, bool, bool, bool]:
    return chosen.path, chosen.splits > 1, chosen.tma, chosen.path == "blocks" and m > INLINE_UP_TO


def _runs(where: Place, kind: str, one: Plan, n: int, k: int, m: int, cols: int) -> None:
    assert one.path != "vectors" or (m <= 4 and kind != "weight_k")
    multiple = 128 if kind == "block" else 16
    assert one.path != "library" or (kind in where.library and n % multiple == 0 and k % multiple == 0)
    assert one.path not in ("rows", "blocks") or kind in ("row", "block")
    assert not one.tma or (where.tma and k % 16 == 0)
    if one.path == "tokens":
        assert cols % one.block_k == 0
    tiles = -(-n // max(one.block_n, 1)) * -(-m // max(one.block_m, 1))
    assert one.splits == 1 or tiles <= MOST_SPLIT_TILES, "more tiles than counters"
    for side in (one.block_m, one.block_n, one.block_k, one.warps):
        assert side & (side - 1) == 0


def test_few_variants_serve_every_m() -> None:
    """At most a dozen kernels per layer, whatever the numbers of tokens."""
    for kind in ("row", "block", "weight"):
        plans = {plan(PLACES["sm90"], kind, 4096, 4096, m) for m in range(1, 20000, 7)}  # type: ignore[arg-type]
        assert len(plans) <= 12


def test_cards_without_fp8_products_keep_activations() -> None:
    engine = _on(PLACES["sm80"])
    weight = engine.prepare(_weight(SCHEMES["block"], 256, 256), SCHEMES["block"])
    assert {engine.rounds(m, weight).activation for m in TOKENS} == {None}
    weight = engine.prepare(_weight(SCHEMES["row"], 256, 256), SCHEMES["row"])
    assert {engine.rounds(m, weight).activation for m in TOKENS} == {None}


def test_activations_are_rounded_from_65_tokens_on() -> None:
    engine = _on(PLACES["sm90"])
    for name, few in (("row", None), ("tensor", None), ("block", GROUP_128)):
        weight = engine.prepare(_weight(SCHEMES[name], 256, 256), SCHEMES[name])
        assert [engine.rounds(m, weight).activation for m in (1, 64)] == [few, few]
        assert engine.rounds(65, weight).activation == (GROUP_128 if name == "block" else ROW)


def test_finer_activations_than_a_kernel_has_are_kept() -> None:
    """A scheme that allows only groups of 128 never gets a scale per token."""
    scheme = Scheme(weight=ROW, activation=GROUP_128)
    engine = _on(PLACES["sm90"])
    weight = engine.prepare(_weight(scheme, 256, 256), scheme)
    assert {engine.rounds(m, weight).activation for m in TOKENS} == {None}


def test_long_sums_are_precise_unless_asked_otherwise() -> None:
    engine = _on(replace(PLACES["sm90"], library=frozenset()))
    for k, accumulate, fast in ((4096, "auto", True), (16384, "auto", False), (16384, "fast", True)):
        weight = engine.prepare(_weight(SCHEMES["row"], 32768, k), SCHEMES["row"])
        weight = replace(weight, accumulate=accumulate)
        chosen = engine.plan(8192, weight, torch.bfloat16)
        assert weight.fast == fast
        assert chosen.path == "rows"
        assert (chosen.block_n == 256) == fast  # two accumulators leave no registers for the largest tile


def test_a_kept_weight_is_taken_where_quantization_costs_more_than_it_gains() -> None:
    """Narrow layers with many tokens, by the lower bounds; never for weight-only products."""
    engine = _on(PLACES["sm90"])
    for n, m, loses in (
        (256, 4096, True),
        (1024, 128, True),
        (4096, 4096, False),
        (256, 64, False),
        (28672, 256, False),
    ):
        weight = engine.prepare(_weight(SCHEMES["row"], n, 4096), SCHEMES["row"])
        assert engine.loses(m, weight, torch.bfloat16) == loses, (n, m)
    weight = engine.prepare(_weight(SCHEMES["weight_only"], 4096, 4096), SCHEMES["weight_only"])
    assert [engine.loses(m, weight, torch.bfloat16) for m in (16, 16384)] == [False, True]


def _on(where: Place) -> TritonEngine:
    class There(TritonEngine):
        def place(self, device: torch.device) -> Place:
            return where

    return There()


def _weight(scheme: Scheme, n: int, k: int) -> ScaledTensor:
    data = torch.empty(n, k, dtype=torch.float8_e4m3fn, device="meta")
    return ScaledTensor(data, torch.empty(scheme.weight.scale_shape((n, k)), device="meta"), scheme.weight)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8GEMM_CACHE", str(tmp_path))
    tables.forget()
    yield tmp_path
    tables.forget()


def test_shipped_table_claims_no_measurement() -> None:
    """Until a GPU has been measured, the table has no card, versions, date or rows beyond the formula."""
    header, rows = tables.read_table(tables.SHIPPED)
    assert (header["source"] == "formula") == (header["card"] is None)
    if header["source"] == "formula":
        assert header == {"source": "formula", "card": None, "versions": None, "date": None}
        assert rows == {}
    else:
        assert header["versions"]
        assert header["date"]


def test_user_table_comes_first(cache: Path) -> None:
    where = place((9, 0), card="NVIDIA H200")
    own = Plan(path="tokens", block_m=32, block_n=128, block_k=64, warps=8, stages=3)
    header = {"source": "tuned", "card": "NVIDIA H200", "versions": {"triton": "3.6"}, "date": "2026-11-21"}
    tables.write_table(cache / tables.USER_FILE, header, {("sm90", "row", 4096, 4096, 32): own})
    assert plan(where, "row", 4096, 4096, 20) == own
    assert plan(where, "row", 4090, 4000, 32) == own, "sizes of one bucket share a plan"
    assert plan(where, "row", 4096, 4096, 33) == formula(where, "row", 4096, 4096, 64)
    other = place((9, 0), card="NVIDIA H100 PCIe")
    assert plan(other, "row", 4096, 4096, 20) == formula(other, "row", 4096, 4096, 32), "a table of another card"
    assert plan(where, "row", 4096, 4096, 20, wide=True).path == "rows"


def test_a_table_cannot_ask_for_what_cannot_run(cache: Path) -> None:
    """Of two N in the same bucket, one may be a multiple of 16 and the other not."""
    where = place((9, 0), card="X")
    header = {"source": "tuned", "card": "X", "versions": {}, "date": "2026-11-21"}
    table = {("sm90", "row", 4096, 4096, 128): Plan(path="library")}
    tables.write_table(cache / tables.USER_FILE, header, table)
    assert plan(where, "row", 4096, 4096, 128).path == "library"
    assert plan(where, "row", 4095, 4096, 128).path == "rows"


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "{}",
        json.dumps({"source": "", "card": "", "versions": "", "date": "", "rows": [{"arch": "sm90"}]}),
        json.dumps(
            {
                "source": "",
                "card": "",
                "versions": "",
                "date": "",
                "rows": [{"arch": "sm90", "kind": "row", "n": 1, "k": 1, "m": 1, "plan": {"path": "magic"}}],
            }
        ),
    ],
)
def test_a_broken_table_is_named(cache: Path, text: str) -> None:
    path = cache / tables.USER_FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path.name} is not a table of plans.*delete it, or tune again"):
        plan(place((9, 0)), "row", 4096, 4096, 1)


def test_plans_are_written_as_they_are_read(tmp_path: Path) -> None:
    rows = {("sm90", "block", 1, 2, 4): Plan(path="blocks", **dict.fromkeys(_numbers(), 2), tma=True)}
    header = {"source": "s", "card": "c", "versions": {"torch": "2"}, "date": "d"}
    tables.write_table(tmp_path / "deep" / "table.json", header, rows)
    assert tables.read_table(tmp_path / "deep" / "table.json") == (header, rows)


def _numbers() -> list[str]:
    return [field.name for field in fields(Plan) if field.name not in ("path", "tma")]


def _triton_or_skip() -> None:
    reasons = TritonEngine().rejects(SPEC, replace(H100, found={"triton": installed()}))
    if reasons:
        pytest.skip("; ".join(reasons))


class FakeKernel:
    """A kernel that counts how often Triton's binder would have run."""

    def __init__(self) -> None:
        self.bound, self.launched = 0, []

    def __getitem__(self, grid):
        def bind(*args, **constants):
            self.bound += 1
            number = self.bound
            launcher = SimpleNamespace(run=lambda *all: self.launched.append((number, grid, all)))
            return _Compiled(launcher)

        return bind


class _Compiled:
    def __init__(self, launcher) -> None:
        self.launcher = launcher

    def __getitem__(self, grid):
        assert len(grid) == 3
        return self.launcher.run


def test_a_compiled_kernel_serves_only_what_it_was_compiled_for() -> None:
    """A launch skips the binder exactly if nothing that Triton specializes on has changed."""
    _triton_or_skip()
    from fp8gemm.engines.triton.launch import launch

    kernel = FakeKernel()
    x = torch.zeros(64)
    same = lambda: launch(kernel, (3,), (x, 32), {"BLOCK": 16}, num_warps=4)  # noqa: E731
    same()
    same()
    launch(kernel, (5, 2), (torch.ones(8), 48), {"BLOCK": 16}, num_warps=4)
    assert kernel.bound == 1
    assert next(args for _, _, args in kernel.launched) == (x, 32, 16)
    different = [
        ((x[1:], 32), {"BLOCK": 16}, 4),  # not aligned
        ((x.to(torch.bfloat16), 32), {"BLOCK": 16}, 4),
        ((x, 33), {"BLOCK": 16}, 4),
        ((x, 1), {"BLOCK": 16}, 4),
        ((x, 2**31), {"BLOCK": 16}, 4),
        ((x, 32), {"BLOCK": 32}, 4),
        ((x, 32), {"BLOCK": 16}, 8),
    ]
    for number, (args, constants, warps) in enumerate(different, start=2):
        launch(kernel, (3,), args, constants, num_warps=warps)
        assert kernel.bound == number, (args, constants, warps)


def test_kernels_in_the_interpreter() -> None:
    """Runs tests/interpreted in a separate process, in which the interpreter replaces every kernel."""
    _triton_or_skip()
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parents[1] / "interpreted")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
