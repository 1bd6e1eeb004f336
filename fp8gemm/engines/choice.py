"""Probing the machine, choosing the engine for a problem, and packing the weight for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch

from .. import native
from ..errors import UnsupportedError
from ..scaled import ScaledTensor
from . import proof
from .base import Choice, Engine, Machine, MatmulSpec, PackedWeight, major_minor
from .table import AUTO, ENGINES


def prepare(
    weight: ScaledTensor,
    spec: MatmulSpec,
    machine: Machine,
    engine: str = "auto",
    *,
    input_scale: torch.Tensor | None = None,
) -> PackedWeight:
    """Packs a weight for the engine that is chosen for it; ``auto`` skips engines that refuse its bytes.

    Raises:
        UnsupportedError: as for ``choose``.
    """
    refused: dict[str, list[str]] = {}
    while True:
        winner = choose(spec, machine, engine, refused=refused).winner
        try:
            _prove(winner, spec, machine, weight)
            if spec.experts:
                stack = ENGINES[winner].prepare_stack(weight, spec.scheme)
                parts = tuple(replace(part, accumulate=spec.accumulate) for part in stack.parts)
                return replace(stack, accumulate=spec.accumulate, parts=parts)
            packed = ENGINES[winner].prepare(weight, spec.scheme, input_scale=input_scale)
            return replace(packed, accumulate=spec.accumulate)
        except UnsupportedError as error:
            if engine != "auto":
                raise
            refused[winner] = [str(error)]


def _prove(name: str, spec: MatmulSpec, machine: Machine, weight: ScaledTensor) -> None:
    """Raises UnsupportedError if an accelerator's engine does not compute exact products there; see ``proof``."""
    if machine.device == "cpu" or weight.device.type == "meta" or not native.plain(weight.data):
        return
    if problem := proof.problem(ENGINES[name], spec, weight.device):
        found = f"; found {name} {machine.found[name]}" if name in machine.found else ""
        raise UnsupportedError(f"engine {name!r} is not used on {machine.name or machine.device}: {problem}{found}")


def order(machine: Machine) -> tuple[str, ...]:
    """The engines that ``auto`` tries on a machine, best first."""
    if machine.device == "cpu" and "native" in machine.features:
        return AUTO["native"]
    return AUTO.get(machine.device, ())


def restore(packed: PackedWeight) -> ScaledTensor:
    """The plain weight, or stack, of a packed one, bit for bit (except as noted at ``TorchEngine.restore``)."""
    engine = ENGINES[packed.engine]
    return engine.restore_stack(packed) if packed.experts else engine.restore(packed)


def choose(
    spec: MatmulSpec, machine: Machine, engine: str = "auto", *, refused: Mapping[str, list[str]] | None = None
) -> Choice:
    """The engine for a problem on a machine, and why the others do not run it. A pure function of its arguments.

    ``refused`` are engines that are ruled out already, with their reasons.

    Raises:
        ValueError: there is no engine of that name.
        UnsupportedError: the named engine, or every engine that ``auto`` tries, rejects the problem; with all reasons.

    Example:
        >>> from fp8gemm import SCHEMES, Machine, MatmulSpec
        >>> spec = MatmulSpec(scheme=SCHEMES["row"], n=4096, k=4096)
        >>> choose(spec, Machine(device="cpu", torch_version=(2, 13)), "cpu").winner
        'cpu'
    """
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine must be auto or one of {', '.join(ENGINES)}, found {engine!r}")
    refused = refused or {}
    rejected: dict[str, list[str]] = {}
    for name in order(machine) if engine == "auto" else (engine,):
        reasons = refused.get(name) or ENGINES[name].rejects(spec, machine)
        if not reasons:
            return Choice(name, rejected)
        rejected[name] = reasons
    raise UnsupportedError(_refusal(spec, machine, engine, rejected))


def _refusal(spec: MatmulSpec, machine: Machine, engine: str, rejected: dict[str, list[str]]) -> str:
    stack = f"{spec.experts} x " if spec.experts else ""
    asked = f"{stack}[{spec.n}, {spec.k}] in {spec.compute_dtype}, {spec.scheme}"
    where = f"{machine.device} {machine.name}".strip()
    problem = f"no engine can multiply {asked} on {where}"
    lines = [problem if engine == "auto" else f"engine {engine!r} cannot multiply {asked}"]
    lines += [f"  {name}: {reason}" for name, reasons in rejected.items() for reason in reasons]
    able = [name for name, other in ENGINES.items() if name not in rejected and not other.rejects(spec, machine)]
    if able:
        lines.append(f"  can: engine={' or '.join(repr(name) for name in able)}")
    return "\n".join(lines)


def probe(device: torch.device | str) -> Machine:
    """The machine behind a device, as a value. Queries the driver and every engine once per device.

    Example:
        >>> probe("cpu").device
        'cpu'
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _probe(device, tuple(ENGINES.items()))


@cache
def _probe(device: torch.device, engines: tuple[tuple[str, Engine], ...]) -> Machine:
    """As ``probe``; the engines are a cache key, so that one registered later is probed as well."""
    machine = _device(device)
    found = {name: engine.probe(device, machine) for name, engine in engines}
    return replace(machine, found={name: facts for name, facts in found.items() if facts is not None})


def _device(device: torch.device) -> Machine:
    """The machine before its engines are probed."""
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    capability, name, features = None, "", frozenset[str]()
    if kind == "cpu":
        name, features = torch.backends.cpu.get_cpu_capability(), _cpu_features()
    elif kind in ("cuda", "rocm"):
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        capability = (properties.major, properties.minor)
        if kind == "rocm":
            features = frozenset({properties.gcnArchName.split(":")[0]})
    return Machine(
        device=kind,
        name=name,
        capability=capability,
        torch_version=major_minor(torch.__version__),
        cuda_version=None if torch.version.cuda is None else major_minor(torch.version.cuda),
        features=features,
    )


def _cpu_features() -> frozenset[str]:
    """CPU features by their Linux names. torch's query functions are private; a missing one counts as no."""
    questions = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    found = {name for name, question in questions.items() if getattr(torch.cpu, question, lambda: False)()}
    if native.loaded() is not None:
        found.add("native")
    return frozenset(found)
