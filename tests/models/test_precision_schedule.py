"""The first and last steps of a diffusion loop at another precision: exactly, and restored however the loop ends."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8gemm import FP8GemmOptions, FP8Linear, enable_fp8_gemm, precision_schedule, report, set_precision

OPTIONS = FP8GemmOptions(engine="reference", fp16_weight_storage="keep")
STEPS = 6


class Denoiser(nn.Module):
    """Predicts noise from a latent ``[B, 32]`` and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(33, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.out = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, time: float) -> torch.Tensor:
        return self.out(self.inner(torch.cat([x, x.new_full((len(x), 1), time)], dim=1)))


def made() -> Denoiser:
    torch.manual_seed(0)
    return enable_fp8_gemm(Denoiser(), options=OPTIONS)


LATENT = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
Model = Callable[[torch.Tensor, float], torch.Tensor]


@torch.no_grad()
def denoised(model: Model, *, guidance: bool = False, before: Callable[[int], object] = lambda step: None) -> list:
    """The latent after each step; with guidance, the model is called twice a step."""
    x, found = LATENT, []
    for step in range(STEPS):
        before(step)
        noise = model(x, step / STEPS)
        if guidance:
            noise = noise + 3 * (noise - model(-x, step / STEPS))
        x = x - noise / STEPS
        found.append(x)
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return [one.equal(other) for one, other in zip(a, b, strict=True)]


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("precision", ["weight_only", "original"])
@pytest.mark.parametrize(("first", "last"), [(2, 1), (0, 2), (1, 0), (0, 0), (4, 4)])
def test_each_step_is_exact(first: int, last: int, precision: str, guidance: bool) -> None:
    model, by_hand = made(), made()
    special = [step < first or step >= STEPS - last for step in range(STEPS)]

    def before(step: int) -> None:
        set_precision(by_hand, "*", precision if special[step] else "fp8")

    expected = denoised(by_hand, guidance=guidance, before=before)
    fp8 = denoised(made(), guidance=guidance)
    with precision_schedule(
        model, STEPS, first=first, last=last, precision=precision, calls_per_step=2 if guidance else 1
    ):
        found = denoised(model, guidance=guidance)
    assert same(found, expected) == [True] * STEPS
    unlike = special.index(True) if True in special else STEPS
    assert same(found, fp8) == [step < unlike for step in range(STEPS)]
    assert {row.precision for row in report(model).rows} == {"fp8"}
    assert same(denoised(model, guidance=guidance), fp8) == [True] * STEPS


def test_other_layers_keep_what_they_were_set_to() -> None:
    model = made()
    set_precision(model, "out", "original")
    seen = []
    with precision_schedule(model, 2, last=1, pattern=["inner.*", "out"]):
        for _ in range(2):
            model(LATENT, 0.5)
            seen.append([row.precision for row in report(model).rows])
    assert seen == [["fp8", "fp8", "original"], ["weight_only"] * 3]
    assert [row.precision for row in report(model).rows] == ["fp8", "fp8", "original"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_loop_restores_the_model(error: type[BaseException]) -> None:
    model = made()
    model(LATENT, 0.0)  # which is observed by a hook
    hooks = len(model._forward_pre_hooks)

    def stopped() -> None:
        with precision_schedule(model, STEPS, first=3):
            model(LATENT, 0.0)
            assert {row.precision for row in report(model).rows} == {"weight_only"}
            raise error

    with pytest.raises(error):
        stopped()
    assert {row.precision for row in report(model).rows} == {"fp8"}
    assert len(model._forward_pre_hooks) == hooks


def test_more_calls_than_announced_are_an_error() -> None:
    model = made()
    with (
        pytest.raises(
            ValueError, match=r"told 3 steps of 1 calls, and the model is called once more.*calls_per_step=2"
        ),
        precision_schedule(model, 3, last=1),
    ):
        denoised(model)
    assert {row.precision for row in report(model).rows} == {"fp8"}


def test_fewer_steps_than_announced_warn() -> None:
    model = made()
    with (
        pytest.warns(UserWarning, match="1 of 2 steps were begun, in 1 calls of the Denoiser"),
        precision_schedule(model, 2, last=1),
    ):
        model(LATENT, 0.0)
    with (
        pytest.warns(UserWarning, match="0 of 2 steps were begun.*give the object that is called"),
        precision_schedule(model, 2),
    ):
        pass
    with precision_schedule(model, 2, calls_per_step=2):  # as Heun's method, whose last step calls once
        for _ in range(3):
            model(LATENT, 0.0)


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_compiled_models_are_counted(in_place: bool) -> None:
    torch._dynamo.reset()
    plain = enable_fp8_gemm(nn.Linear(32, 32), options=OPTIONS)
    plain(LATENT)  # the first call is observed by a hook
    model = copy.deepcopy(plain)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def looped(model: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        found = [LATENT]
        for _ in range(4):
            found.append(found[-1] - model(found[-1]))
        return found

    if in_place:
        model.compile(backend=backend)
    called = model if in_place else torch.compile(model, backend=backend)
    fp8 = looped(called)
    assert same(fp8, looped(plain)) == [True] * 5
    for _ in range(2):
        with precision_schedule(plain, 4, first=2):
            expected = looped(plain)
        with precision_schedule(called, 4, first=2):
            assert same(looped(called), expected) == [True] * 5
        assert same(expected, fp8) == [True] + [False] * 4
        assert same(looped(called), fp8) == [True] * 5
        assert len(graphs) == 2


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "precision.py"))
    lines = capsys.readouterr().out.splitlines()
    errors = [float(line.removesuffix(" %").split()[-1]) for line in lines[:5]]
    assert errors[4] == 0 < min(errors[:4])
    assert len(set(errors)) == 5
    assert "original weight x8" in lines[6]


def test_what_cannot_work_is_refused_before_the_block() -> None:
    model = made()
    for arguments, text in (
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"steps": 2, "first": -1}, "first must be at least 0, found -1"),
        ({"steps": 2, "calls_per_step": 0}, "calls_per_step must be at least 1"),
        ({"steps": 2, "precision": "fp8"}, "precision must be weight_only or original, found 'fp8'"),
        ({"steps": 2, "pattern": "nothing"}, "pattern 'nothing' matches no converted layer"),
    ):
        with pytest.raises(ValueError, match=text), precision_schedule(model, **arguments):
            raise AssertionError
    discarded = FP8Linear.from_linear(copy.deepcopy(nn.Linear(8, 8)))
    with (
        pytest.raises(ValueError, match="the originals, which are missing"),
        precision_schedule(discarded, 2, first=1, precision="original"),
    ):
        raise AssertionError
