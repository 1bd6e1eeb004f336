"""Static activation scales for a patched model, found by running it, and counting what is beyond them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..engines import ENGINES, choose, probe
from ..errors import UnsupportedError
from ..numerics import SCALE_FLOOR
from ..scaled import Scheme
from ..text import columns
from ..weights import FP8Weight
from ..weights.home import Home
from ..weights.packed import spec_of
from ..weights.sharding import held
from ..weights.static import set_activation
from ..weights.structure import ITSELF, layer_name
from .batches import batches
from .inputs import Given, Inputs, run, uncompiled
from .siblings import SiblingLinear

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # of the codes of activations
_BINS = 2**15  # of magnitudes, by the upper half of a float32: eight of them for each factor of 2 ** (1 / 16)


@dataclass(frozen=True, kw_only=True)
class CalibratedLayer:
    """One FP8 weight: ``scale`` is its static activation scale, or None where ``reason`` says why it stays dynamic.

    ``amax`` is the largest magnitude, or the percentile of magnitudes, of the ``tokens`` that it was given, before the
    margin. ``used`` is False where activations are not quantized at present, by the engine on this machine or because
    ``set_precision`` says so: the scale is then only saved, and used elsewhere or later.

    Example:
        >>> layer = CalibratedLayer(name="up", shape=(64, 32), reason="no product with it was seen")
        >>> layer.scale is None, layer.reason
        (True, 'no product with it was seen')
    """

    name: str
    shape: tuple[int, ...]
    tokens: int = 0
    amax: float | None = None
    scale: float | None = None
    engine: str = ""
    used: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found, one row for each FP8 weight; ``str(calibration)`` is a table.

    Example:
        >>> print(Calibration((CalibratedLayer(name="up", shape=(64, 32), tokens=8, amax=3.5, scale=0.0078125),)))
        layer  weight  tokens  amax  scale      activations
        up     64x32   8       3.5   0.0078125  static
        1 static, 0 dynamic
    """

    layers: tuple[CalibratedLayer, ...]

    @property
    def static(self) -> tuple[CalibratedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.scale is not None)

    @property
    def dynamic(self) -> tuple[CalibratedLayer, ...]:
        """The weights whose activations keep the scales that they had."""
        return tuple(layer for layer in self.layers if layer.scale is None)

    def to_dict(self) -> dict[str, Any]:
        """The whole result in plain Python types."""
        return {"layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]}

    def __str__(self) -> str:
        lines = [("layer", "weight", "tokens", "amax", "scale", "activations"), *map(_cells, self.layers)]
        return "\n".join([*columns(lines), f"{len(self.static)} static, {len(self.dynamic)} dynamic"])


def _cells(layer: CalibratedLayer) -> tuple[str, ...]:
    numbers = ("" if value is None else f"{value:.9g}" for value in (layer.amax, layer.scale))
    idle = f"static, not quantized here by {layer.engine}" if layer.engine and not layer.used else "static"
    said = idle if layer.scale is not None else f"unchanged: {layer.reason}"
    return (layer.name, "x".join(map(str, layer.shape)), str(layer.tokens), *numbers, said)


def calibrate(
    model: nn.Module, calibration_inputs: object, *, percentile: float | None = None, margin: float = 1.0
) -> Calibration:
    """Gives each FP8 weight of a patched model a static activation scale, found by running it on example inputs.

    ``scale = amax * margin / 448``, where ``amax`` is the largest magnitude that the products with the weight are
    given. Activations are then quantized with it instead of a scale of their own, and larger ones saturate. The bytes
    and scales of weights do not change. ``save_checkpoint`` and ``state_dict`` save the scales as ``input_scale``.

    Weights without a scale keep their dynamic activations, and the result names them: those that the inputs did not
    reach, or reached with zeros only, stacks of experts, weight-only schemes, and block scales, whose activations have
    a scale for each group. A model may be calibrated again: it then runs with dynamic activations first.

    Args:
        calibration_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or an iterable of
            those, on which the model runs in evaluation mode without gradients.
        percentile: the percentage of magnitudes that has to be in range, such as 99.99, instead of all; rounded up to
            the next number of 8 significant bits.
        margin: a factor for ``amax``: above 1 leaves room for larger activations than were seen.

    Raises:
        ValueError: the model has no FP8 weights, or none that can have a static scale; an activation is NaN or
            infinite; ``percentile`` or ``margin`` is out of range.
        UnsupportedError: a layer is fused or split among ranks, or no engine can run it with a static scale. The model
            is then unchanged.

    Example:
        >>> from fp8gemm import enable_fp8_gemm
        >>> model = enable_fp8_gemm(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)))
        >>> found = calibrate(model, [torch.ones(4, 64), 3.5 * torch.ones(1, 64)])
        >>> found.layers[0].amax, found.layers[0].scale, model[0].scheme.static
        (3.5, 0.0078125, True)
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be positive and finite, found {margin}")
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, found {percentile}")
    weights = _weights(model)
    inputs = batches(calibration_inputs)
    ranges = {name: _Range(name, bins=percentile is not None) for name, weight in weights.items() if _takes(weight)}
    with _dynamic(weights):
        _run(model, inputs, {name: weights[name] for name in ranges}, ranges)
    layers = [_layer(name, weight, ranges.get(name), percentile, margin) for name, weight in weights.items()]
    if all(layer.scale is None for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers[:5])
        raise ValueError(f"no FP8 weight can have a static activation scale ({reasons})")
    for layer, weight in zip(layers, weights.values(), strict=True):
        if layer.scale is not None:
            scale = torch.tensor(layer.scale, dtype=torch.float32, device=weight.device)
            set_activation(weight._home, weight._home.scheme.calibrated(), scale)
    return Calibration(tuple(layers))


@dataclass
class _Range:
    """The magnitudes that a weight was given."""

    name: str
    bins: bool
    amax: float = 0.0
    tokens: int = 0
    counts: torch.Tensor | None = None

    def add(self, given: Given) -> None:
        if not given.x.numel():
            return
        magnitude = given.x.detach().to(torch.float32).abs()
        largest = float(magnitude.amax())  # NaN if there is one
        if not math.isfinite(largest):
            raise ValueError(f"{self.name}: the calibration inputs give it NaN or infinite activations")
        self.amax, self.tokens = max(self.amax, largest), self.tokens + given.x.shape[0]
        if self.bins:
            places = magnitude.view(torch.int32).flatten() >> 16
            counts = torch.bincount(places, minlength=_BINS)
            self.counts = counts if self.counts is None else self.counts + counts

    def reaches(self, percentile: float | None) -> float:
        """The magnitude that this percentage of all does not exceed."""
        if percentile is None or self.counts is None:
            return self.amax
        counts = self.counts.cumsum(0)
        needed = math.ceil(percentile / 100 * int(counts[-1]))
        place = int(torch.searchsorted(counts, needed))
        edge = torch.tensor((place + 1) << 16, dtype=torch.int32, device="cpu").view(torch.float32)
        return min(self.amax, float(edge))


def _run(model: nn.Module, inputs: Any, weights: Mapping[str, FP8Weight], ranges: Mapping[str, _Range]) -> None:
    places = {name: (weight, weight._home.layout) for name, weight in weights.items()}
    run(model, inputs, places, lambda name, given: ranges[name].add(given))


def _weights(model: nn.Module) -> dict[str, FP8Weight]:
    """The FP8 weights of a model, by the names of their layers; tied ones once."""
    found: dict[int, tuple[str, FP8Weight]] = {}  # by home
    for path, module in model.named_modules():
        for parameter, weight in module._parameters.items():
            if not isinstance(held(weight), FP8Weight):
                continue
            name = layer_name(path, parameter)
            if not isinstance(weight, FP8Weight):
                raise UnsupportedError(f"{name} is split among processes: calibrate the model before it is split")
            if isinstance(module, SiblingLinear):
                raise UnsupportedError(
                    f"{name} is fused with its siblings, but a static scale is one layer's own: calibrate the model "
                    "before fuse_siblings, which then leaves these layers as they are"
                )
            if id(weight._home) not in found or isinstance(module, nn.Linear):  # as the report names tied ones
                found[id(weight._home)] = (name or ITSELF, weight)
    if not found:
        raise ValueError("the model has no FP8 weights to calibrate: call enable_fp8_gemm(model) first")
    return dict(found.values())


def _takes(weight: FP8Weight) -> bool:
    return not _reason(weight)


def _reason(weight: FP8Weight) -> str:
    """Why a weight cannot have a static activation scale; empty if it can."""
    home = weight._home
    if len(home.layout.shape) == 3:
        return "a stack of experts has no static scales"
    if home.scheme.activation is None:
        return "its scheme is weight-only"
    if home.scheme.activation.cols is not None:
        return f"its activations have a scale for each group, {home.scheme.activation}"
    return ""


def _layer(
    name: str, weight: FP8Weight, seen: _Range | None, percentile: float | None, margin: float
) -> CalibratedLayer:
    home = weight._home
    shape = tuple(home.layout.shape)
    if seen is None:
        return CalibratedLayer(name=name, shape=shape, engine=home.engine or "", reason=_reason(weight))
    amax = seen.reaches(percentile)
    scale = float(torch.tensor(amax * margin / LARGEST, dtype=torch.float32, device="cpu"))
    if scale < SCALE_FLOOR:
        reason = "no product with it was seen" if not seen.tokens else "it was given zeros only"
        return CalibratedLayer(name=name, shape=shape, tokens=seen.tokens, engine=home.engine or "", reason=reason)
    scheme = home.scheme.calibrated()
    engine = _engine(name, weight, scheme)
    runs = ENGINES[engine].effective(scheme.at(home.precision))
    return CalibratedLayer(
        name=name,
        shape=shape,
        tokens=seen.tokens,
        amax=amax,
        scale=scale,
        engine=engine,
        used=runs.activation is not None and home.precision != "original",
    )


def _engine(name: str, weight: FP8Weight, scheme: Scheme) -> str:
    """The engine that will run a weight under ``scheme``."""
    home = weight._home
    spec = spec_of(home.layout.shape, home.options, scheme, weight.dtype)
    try:
        return choose(spec, probe(weight.device), home.options.engine).winner
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from None


@contextmanager
def _dynamic(weights: Mapping[str, FP8Weight]) -> Iterator[None]:
    """Within it, activations are not static: a range that was too small would hide how large they are."""
    static = {name: weight._home for name, weight in weights.items() if weight._home.scheme.static}
    before = [(home, home.scheme, home.input_scale) for home in static.values()]
    try:
        for home in static.values():
            set_activation(home, home.scheme.dynamic(), None)
        yield
    finally:
        for home, scheme, input_scale in before:
            set_activation(home, scheme, input_scale)


@contextmanager
def count_saturation(model: nn.Module) -> Iterator[None]:
    """Counts how many activations are beyond the static ranges of a model's layers while the block lasts.

    ``report(model)`` shows the counts, which add up over blocks. They are taken whether or not the engine here
    quantizes activations. Compiled code runs in eager meanwhile, and products take somewhat longer.

    Raises:
        ValueError: no layer of the model has a static activation scale.

    Example:
        >>> from fp8gemm import enable_fp8_gemm, report
        >>> layer = enable_fp8_gemm(nn.Linear(64, 32))
        >>> _ = calibrate(layer, torch.ones(4, 64))
        >>> with count_saturation(layer):
        ...     _ = layer(torch.linspace(0, 2, 64))
        >>> report(layer).rows[0].saturated, report(layer).rows[0].checked
        (32, 64)
    """
    weights = {name: weight for name, weight in _weights(model).items() if weight._home.scheme.static}
    if not weights:
        raise ValueError("no layer has a static activation scale: call calibrate(model, calibration_inputs) first")

    def note(name: str, given: Given) -> None:
        home: Home = weights[name]._home
        if home.input_scale is not None:
            largest = home.input_scale.to(given.x.device) * LARGEST
            home.activity.saturated += int((given.x.detach().to(torch.float32).abs() > largest).sum())
            home.activity.checked += given.x.numel()

    places = {name: (weight, weight._home.layout) for name, weight in weights.items()}
    with uncompiled(), Inputs(places, note):
        yield
