"""The DeepGEMM engine, checked against DeepGEMM's calling conventions; its kernels themselves need a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import conformance
import pytest
import torch

from fp8gemm import BLOCK_128, GROUP_128, SCHEMES, Machine, MatmulSpec, ScaledTensor, Scheme, UnsupportedError, quantize
from fp8gemm.engines import deep_gemm as module
from fp8gemm.engines.deep_gemm import DeepGemm, DeepGemmEngine
from fp8gemm.engines.reference import ReferenceEngine

CPU = torch.device("cpu")
HOPPER = Machine(device="cuda", capability=(9, 0), found={"deep_gemm": DeepGemm(present=True, nvcc=True)})
BLACKWELL = Machine(device="cuda", capability=(10, 0), found=HOPPER.found)
UE8M0 = Scheme(weight=BLOCK_128, activation=GROUP_128, scale_format="ue8m0")
ENGINE = DeepGemmEngine()
Operand = tuple[torch.Tensor, torch.Tensor]


class Fake:
    """``deep_gemm.fp8_gemm_nt`` with the checks of csrc/apis/gemm.hpp, csrc/apis/layout.hpp and csrc/utils/layout.hpp.

    It is stricter where DeepGEMM would be correct but slower: operands are contiguous, the scales of activations are
    laid out for TMA, and N and K are multiples of what DeepGEMM 1 asserted.
    """

    def __init__(self, arch: int = 9) -> None:
        self.arch, self.calls = arch, 0

    def fp8_gemm_nt(
        self, a: Operand, b: Operand, d: torch.Tensor, c: None = None, *, disable_ue8m0_cast: bool = False
    ) -> None:
        self.calls += 1
        (x, sx), (w, sw) = a, b
        (m, k), n = x.shape, w.shape[0]
        assert m > 0
        assert (n % 64, k % 128) == (0, 0), f"N, K = {n}, {k}"
        for data, rows in ((x, m), (w, n)):
            assert data.dtype == torch.float8_e4m3fn, data.dtype
            assert data.shape == (rows, k)
            assert data.stride() == (k, 1), f"operands are K-major, found {data.stride()}"
        assert d.dtype == torch.bfloat16, d.dtype
        assert d.shape == (m, n)
        assert d.stride() == (n, 1)
        groups = k // 128
        assert sx.dtype == sw.dtype == torch.float32
        assert sx.shape == (m, groups)
        assert sx.stride() == (1, -(-m // 4) * 4), f"scales of {m} tokens have strides {sx.stride()}"
        assert sw.shape == (-(-n // 128), groups)
        assert sw.stride() == (groups, 1), f"scales of the weight have strides {sw.stride()}"
        if self.arch == 10:
            assert not disable_ue8m0_cast
            sx, sw = packed(sx), packed(sw)
        wide = x.double() * sx.double().repeat_interleave(128, 1)
        dense = w.double() * sw.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
        d.copy_(wide @ dense.t())


def packed(scale: torch.Tensor) -> torch.Tensor:
    """What remains of float32 scales that are packed into UE8M0: their exponents (smxx_layout.hpp)."""
    return ((scale.contiguous().view(torch.int32) >> 23) << 23).view(torch.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(module, "load", lambda: fake)
    return fake


def test_engine_conforms(fake: Fake) -> None:
    """Block schemes in three dtypes, with every shape of the suite."""
    assert conformance.check(ENGINE, HOPPER, CPU) == 3 * len(conformance.SHAPES)
    assert fake.calls > 100


Call = Callable[[Operand, Operand, torch.Tensor], object]
BROKEN: list[tuple[str, Callable[[Operand, Operand], tuple[Operand, Operand]], str]] = [
    ("row-major scales", lambda a, b: ((a[0], a[1].contiguous()), b), "scales of 5 tokens"),
    ("scales of a packed transpose", lambda a, b: ((a[0], a[1].t().contiguous().t()), b), "scales of 5 tokens"),
    ("transposed weight scales", lambda a, b: (a, (b[0], b[1].t().contiguous().t())), "scales of the weight"),
    ("N-major weight", lambda a, b: (a, (b[0].t().contiguous().t(), b[1])), "K-major"),
    ("ragged N", lambda a, b: (a, (b[0][:200], b[1])), "N, K"),
]


@pytest.mark.parametrize(("what", "spoil", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_the_fake_bites(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, what: str, spoil: Callable[..., tuple[Operand, Operand]], message: str
) -> None:
    honest = fake.fp8_gemm_nt

    def spoilt(a: Operand, b: Operand, d: torch.Tensor, **more: bool) -> None:
        honest(*spoil(a, b), d, **more)

    monkeypatch.setattr(fake, "fp8_gemm_nt", spoilt)
    weight = ENGINE.prepare(quantize(torch.randn(256, 384), BLOCK_128), SCHEMES["block"])
    with pytest.raises(AssertionError, match=message):
        ENGINE.linear(torch.randn(5, 384), weight, None, torch.float32)


@pytest.mark.parametrize("arch", [9, 10])
def test_powers_of_two_survive_packing(fake: Fake, arch: int) -> None:
    """On compute capability 10.x scales lose their mantissas; those of a ue8m0 scheme have none."""
    fake.arch = arch
    weight = quantize(torch.randn(200, 300), BLOCK_128, scale_format="ue8m0")
    x = torch.randn(7, 300)
    y = ENGINE.linear(x, ENGINE.prepare(weight, UE8M0), None, torch.float32)
    reference = ReferenceEngine()
    expected = reference.linear(x, reference.prepare(weight, UE8M0), None, torch.float32)
    assert (y - expected).norm() <= 2e-3 * expected.norm()  # y was rounded to bfloat16: 2**-9 at most


def test_scales_that_would_lose_their_mantissas_are_refused() -> None:
    """This is how transformers computed silently wrong products (its issue 47030)."""
    weight = quantize(torch.randn(128, 128), BLOCK_128)
    with pytest.raises(UnsupportedError, match="but the weight has others: UE8M0 holds powers of two"):
        ENGINE.prepare(weight, UE8M0)


def test_aligned_weights_are_not_copied() -> None:
    weight = quantize(torch.randn(192, 256), BLOCK_128)
    layout = ENGINE.prepare(weight, SCHEMES["block"])
    assert layout.data.data_ptr() == weight.data.data_ptr()
    assert layout.extra["scale"].data_ptr() == weight.scale.data_ptr()


def test_scales_cut_out_of_others(fake: Fake) -> None:
    """A single row keeps the stride of the tensor it was taken from, and torch still calls it contiguous."""
    weight = quantize(torch.randn(128, 256), BLOCK_128)
    cut = torch.stack([weight.scale, weight.scale], dim=1)[:, 0]
    assert cut.is_contiguous()
    assert cut.stride() != (2, 1)
    layout = ENGINE.prepare(ScaledTensor(weight.data, cut, BLOCK_128), SCHEMES["block"])
    assert ENGINE.linear(torch.randn(3, 256), layout, None, torch.float32).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty_products(shape: tuple[int, int, int], fake: Fake) -> None:
    m, n, k = shape
    weight = ScaledTensor(
        torch.zeros(n, k).to(torch.float8_e4m3fn), torch.ones(BLOCK_128.scale_shape((n, k))), BLOCK_128
    )
    bias = torch.randn(n)
    y = ENGINE.linear(torch.randn(m, k), ENGINE.prepare(weight, SCHEMES["block"]), bias, torch.float32)
    assert y.equal(bias.expand(m, n))
    assert fake.calls == 0


@pytest.mark.parametrize(
    ("machine", "change", "reason"),
    [
        (Machine(device="rocm"), {}, "runs on cuda only, found rocm"),
        (Machine(device="cuda", capability=(8, 9)), {}, "needs compute capability 9.0 or 10.x, found 8.9"),
        (Machine(device="cuda", capability=(12, 0)), {}, "needs compute capability 9.0 or 10.x, found 12.0"),
        (BLACKWELL, {}, "on compute capability 10.x scales must be powers of two (ue8m0), found weight 128x128"),
        (Machine(device="cuda", capability=(9, 0)), {}, "DeepGEMM 2.2 or newer is not installed"),
        (Machine(device="cuda", capability=(9, 0)), {}, "needs a CUDA toolkit with nvcc"),
        (HOPPER, {"scheme": SCHEMES["row"]}, "scales are 128x128 with 1x128 activations; found weight row"),
        (HOPPER, {"experts": 4}, "tokens padded to 128"),
        (HOPPER, {"compute_dtype": torch.float64}, "not float64"),
        (HOPPER, {"weight_dtype": torch.float8_e5m2}, "found weights in torch.float8_e5m2"),
    ],
)
def test_reasons(machine: Machine, change: dict[str, object], reason: str) -> None:
    spec = MatmulSpec(**{"scheme": SCHEMES["block"], "n": 256, "k": 256, **change})
    assert any(reason in found for found in ENGINE.rejects(spec, machine))


def test_what_it_takes() -> None:
    assert ENGINE.rejects(MatmulSpec(scheme=SCHEMES["block"], n=33, k=7), HOPPER) == []
    for machine in (HOPPER, BLACKWELL):
        assert ENGINE.rejects(MatmulSpec(scheme=UE8M0, n=33, k=7), machine) == []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that hides all others, with a process cache that is empty."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    names = [name for name in sys.modules if name.split(".")[0] in ("vllm", "deep_gemm")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    module.find.cache_clear()
    module.load.cache_clear()
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "deep_gemm")]:
        del sys.modules[name]
    module.find.cache_clear()
    module.load.cache_clear()


def install(folder: Path, source: str, *, compiled: bool = True) -> None:
    """A package with a compiled part for this Python version; nothing here imports it."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    (folder / "part.py").write_text("def fp8_gemm_nt(): return 'the product'\n")
    (folder / (f"_C{EXTENSION_SUFFIXES[0]}" if compiled else "_C.cpython-38-other.so")).touch()


def install_vllm(site: Path, source: str) -> None:
    install(site / "vllm" / "third_party" / "deep_gemm", source)
    (site / "vllm" / "__init__.py").write_text("raise SystemExit('vllm must not be imported')")


def test_absent(site: Path) -> None:
    assert module.find() is None
    with pytest.raises(UnsupportedError, match="not installed for this Python"):
        module.load()


def test_version_1_and_other_pythons_are_not_taken(site: Path) -> None:
    install(site / "deep_gemm", "", compiled=False)
    assert module.find() is None


def test_the_copy_in_vllm_without_vllm(site: Path) -> None:
    install_vllm(site, "from .part import fp8_gemm_nt\nfrom . import part")
    assert module.find() == ("vllm.third_party.deep_gemm", site / "vllm" / "third_party" / "deep_gemm")
    assert module.load().fp8_gemm_nt() == "the product"
    assert "vllm" not in sys.modules
    assert sys.modules["vllm.third_party.deep_gemm"] is module.load()


def test_the_users_own_comes_first(site: Path) -> None:
    install_vllm(site, "")
    install(site / "deep_gemm", "from .part import fp8_gemm_nt")
    assert module.find() == ("deep_gemm", site / "deep_gemm")
    assert module.load() is sys.modules["deep_gemm"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ImportError('undefined symbol: c10')", r"ImportError\('undefined symbol: c10'\)"),
        ("assert False", r"AssertionError\(\)"),
    ],
)
def test_one_that_does_not_load(site: Path, source: str, text: str) -> None:
    install(site / "deep_gemm", source)
    with pytest.raises(UnsupportedError, match=rf"DeepGEMM in .*deep_gemm cannot be imported: {text}"):
        module.load()
    assert "deep_gemm" not in sys.modules


def test_one_that_is_imported_already(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site / "deep_gemm", "raise SystemExit('imported twice')")
    module.find()
    there = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "deep_gemm", there)
    assert module.load() is there


@pytest.mark.parametrize(
    ("made", "environment", "found"),
    [
        ("bin/nvcc", {"CUDA_HOME": "{}"}, True),
        ("bin/nvcc", {"CUDA_PATH": "{}"}, True),
        ("bin/nvcc", {"PATH": "{}/bin"}, True),
        ("other/nvcc", {"CUDA_HOME": "{}"}, False),
        ("other/nvcc", {"CUDA_HOME": "{}", "DG_JIT_NVCC_COMPILER": "{}/other/nvcc"}, True),
        ("include/cuda.h", {"CUDA_HOME": "{}"}, False),
        ("include/cuda.h", {"CUDA_HOME": "{}", "DG_JIT_USE_NVRTC": "1"}, True),
        ("include/cuda.h", {"CUDA_HOME": "{}", "DG_JIT_USE_NVRTC": "0"}, False),
        ("include/cuda.h", {"CUDA_HOME": "{}/nowhere", "DG_JIT_USE_NVRTC": "1"}, False),
    ],
)
def test_what_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, environment: dict[str, str], found: bool
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "DG_JIT_USE_NVRTC", "DG_JIT_NVCC_COMPILER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    file = tmp_path / made
    file.parent.mkdir(parents=True)
    file.touch(mode=0o755)
    assert ENGINE.probe(torch.device("cuda"), HOPPER) == DeepGemm(present=module.find() is not None, nvcc=found)
