"""What is counted while a layer is measured: the error of its outputs, and the magnitudes of its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..numerics import expand_scale
from ..scaled import Granularity, ScaledTensor

# How many times larger than the median channel's (or token's) its largest magnitude must be for one to be an outlier.
# LLM.int8() (Dettmers et al., 2022) takes a fixed 6.0 for models whose other activations are below 1; a ratio does not
# depend on a model's units. At 20, one INT8 scale leaves the median channel 6 of 127 levels.
OUTLIER = 20.0

# Elements of a part of a tensor that is computed with in float64 at a time.
_PART = 2**20


@dataclass
class ErrorTally:
    """Sums over all tokens of the squares of ``y`` and of ``y - y8``, in float64, and the SQNR of each token."""

    signal: float = 0.0
    noise: float = 0.0
    by_token: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0

    def add(self, y: torch.Tensor, y8: torch.Tensor, channels: int = -1) -> None:
        """Counts one call; ``channels`` is the dimension of the output channels, all others are tokens."""
        self.calls += 1
        for dense, fp8 in zip(_parts(y, channels), _parts(y8, channels), strict=True):
            signal, noise = dense.square().sum(1), (dense - fp8).square().sum(1)
            self.signal += signal.sum().item()
            self.noise += noise.sum().item()
            exact = torch.where(noise == 0, torch.inf, signal / noise)  # also of a token of zeros
            self.by_token.append((10 * exact.log10()).to("cpu", torch.float32))

    @property
    def sqnr(self) -> float:
        return decibels(self.signal, self.noise)

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self.by_token)

    def percentiles(self, *percents: float) -> list[float]:
        """The SQNR that this percentage of tokens does not exceed, by nearest rank; that of the worst token for 0."""
        ordered = torch.cat(self.by_token).sort().values
        ranks = [max(1, math.ceil(percent / 100 * len(ordered))) for percent in percents]
        return [float(ordered[rank - 1]) for rank in ranks]


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``: infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass
class InputTally:
    """The largest magnitude of each input channel and of each token, and how many values saturate."""

    by_channel: torch.Tensor | None = None
    by_token: list[torch.Tensor] = field(default_factory=list)
    values: int = 0
    saturated: int = 0
    uneven: bool = False  # whether products have contracted different dimensions

    def add(self, x: torch.Tensor, channels: int, static: tuple[torch.Tensor, Granularity] | None) -> None:
        """Counts one factor of a product with the weight.

        Args:
            channels: the dimension that the product contracts; all others are tokens.
            static: the activation scale that was calibrated, if there is one, and its granularity.
        """
        if x.numel() == 0:
            return
        rows = x.detach().movedim(channels, -1)
        rows = rows.reshape(-1, rows.shape[-1]).abs()
        self.values += rows.numel()
        if static is not None:
            self.saturated += _beyond(rows, *static, torch.float8_e4m3fn)
        largest = rows.amax(0).to("cpu", torch.float32)
        self.by_token.append(rows.amax(1).to("cpu", torch.float32))
        if self.by_channel is None:
            self.by_channel = largest
        elif len(self.by_channel) != len(largest):
            self.uneven = True
        else:
            self.by_channel = torch.maximum(self.by_channel, largest)

    @property
    def outlier_channels(self) -> tuple[int, ...] | None:
        """The indices of outliers; None if the inputs were not seen."""
        if self.by_channel is None or self.uneven:
            return None
        return tuple(_outliers(self.by_channel).nonzero().flatten().tolist())

    @property
    def outlier_tokens(self) -> int | None:
        return int(_outliers(torch.cat(self.by_token)).sum()) if self.by_token else None

    @property
    def saturated_share(self) -> float:
        return self.saturated / self.values if self.values else 0.0


def _outliers(magnitudes: torch.Tensor) -> torch.Tensor:
    """Which are outliers; the median is that of the channels or tokens that are not always zero."""
    other = magnitudes[magnitudes > 0]
    return magnitudes > OUTLIER * other.median() if len(other) else torch.zeros_like(magnitudes, dtype=torch.bool)


def saturated_weights(w: torch.Tensor, scaled: ScaledTensor) -> float:
    """The share of the values ``w [(E,) N, K]`` that are beyond the range of FP8 under the scales of ``scaled``."""
    matrices = [(w, scaled)]
    if w.dim() == 3:
        parts = zip(scaled.data, scaled.scale, strict=True)
        matrices = [(w[e], ScaledTensor(*part, scaled.granularity)) for e, part in enumerate(parts)]
    count = sum(
        _beyond(matrix, one.scale, one.granularity, one.data.dtype) for matrix, one in matrices if matrix.numel()
    )
    return count / max(w.numel(), 1)


def _beyond(x: torch.Tensor, scale: torch.Tensor, granularity: Granularity, dtype: torch.dtype) -> int:
    """How many values would be rounded to more than the largest of ``dtype``, if there were larger ones.

    Those are half a step beyond the largest value, 464 for e4m3: a value that float32 puts a little above it by the
    division by its own maximum is not one of them.
    """
    info = torch.finfo(dtype)
    limit = info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2
    scale = scale.to(x.device, torch.float32).broadcast_to(granularity.scale_shape(x.shape))
    block = 1 if scale.shape[0] == 1 else granularity.block(x.shape)[0]
    rows = max(1, _PART // max(x.shape[-1], 1) // block) * block
    count = 0
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        own = scale if scale.shape[0] == 1 else scale[start // block : -(-(start + len(part)) // block)]
        count += int((part.to(torch.float32).abs() > limit * expand_scale(own, granularity, part.shape)).sum())
    return count


def _parts(y: torch.Tensor, channels: int) -> Iterator[torch.Tensor]:
    """The tokens of ``y`` as rows in float64, part by part; on the CPU where the device has no float64."""
    rows = y.detach().movedim(channels, -1) if y.dim() else y.detach().reshape(1)
    rows = rows.reshape(-1, rows.shape[-1])
    for part in torch.split(rows, max(1, _PART // max(rows.shape[-1], 1))):
        yield (part.cpu() if part.device.type == "mps" else part).to(torch.float64)
