"""What a checkpoint holds, and everything suspicious about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CheckpointError
from .files import readable_size
from .guards import companion_problems
from .read import Checkpoint


@dataclass(frozen=True, kw_only=True)
class InspectedLayer:
    """An FP8 weight, by the keys of its scales; dtypes without ``torch.``."""

    shape: tuple[int, ...]
    dtype: str
    scheme: str
    scale: str | None
    scale_shape: tuple[int, ...] | None
    scale_dtype: str | None
    input_scale: str | None

    def __str__(self) -> str:
        return f"{self.dtype}, {self.scheme}, scales {self.scale_dtype or 'none, taken as 1'}"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``inspect`` found; ``problems`` are what a load would stumble over."""

    source: str
    format: str
    recognised_by: str
    files: tuple[str, ...]
    bytes: int
    fp8_bytes: int
    layers: Mapping[str, InspectedLayer]
    dense: int
    stacked: Mapping[str, tuple[int, ...]]
    kv_scales: tuple[str, ...]
    unused_keys: Mapping[str, str]
    suspicious: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return bool(self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.format} ({self.recognised_by})",
            f"{len(self.files)} files, {readable_size(self.bytes)}, of which FP8 {readable_size(self.fp8_bytes)}",
            f"{len(self.layers)} FP8 weights, {self.dense} dense tensors",
        ]
        kinds = Counter(map(str, self.layers.values()))
        lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
        if self.stacked:
            name, shape = next(iter(self.stacked.items()))
            lines.append(f"{len(self.stacked)} stacks of experts, such as {name} {list(shape)}")
        if self.kv_scales:
            lines.append(f"{len(self.kv_scales)} KV cache scales")
        lines += [f"unused: {key}: {reason}" for key, reason in self.unused_keys.items()]
        lines += [f"suspicious: {sentence}" for sentence in self.suspicious]
        lines += [f"broken: {problem}" for problem in self.problems]
        return "\n".join(lines)


def inspect(checkpoint: Checkpoint, *, check: bool = False) -> Inspection:
    """Reads every scale; with ``check`` also every weight, and looks for NaN."""
    layers = {}
    problems = [f"{name}: {reason}" for name, reason in checkpoint.layout.unsupported.items()]
    problems += companion_problems(checkpoint, checkpoint.layers, known=())
    for name, layer in checkpoint.layers.items():
        scale = checkpoint.contents.tensors.get(layer.scale or "")
        layers[name] = InspectedLayer(
            shape=tuple(layer.shape),
            dtype=str(layer.dtype).removeprefix("torch."),
            scheme=str(layer.scheme),
            scale=layer.scale,
            scale_shape=None if scale is None else tuple(scale.shape),
            scale_dtype=None if scale is None else str(scale.dtype).removeprefix("torch."),
            input_scale=layer.input_scale,
        )
        try:
            if check:
                layer.read(checkpoint.read)
            checkpoint.doubt(name, layer.read_scale(checkpoint.read))
        except CheckpointError as error:
            problems.append(str(error))
    return Inspection(
        source=str(checkpoint.source.path),
        format=checkpoint.format.name,
        recognised_by=checkpoint.recognised_by,
        files=tuple(path.name for path in checkpoint.source.files),
        bytes=checkpoint.nbytes,
        fp8_bytes=sum(layer.nbytes for layer in checkpoint.layers.values()),
        layers=layers,
        dense=len(checkpoint.layout.plain),
        stacked=_stacked(checkpoint),
        kv_scales=tuple(checkpoint.layout.kv_scales),
        unused_keys=dict(checkpoint.unused_keys),
        suspicious=tuple(sentence for sentence in checkpoint.layout.suspicious if sentence not in problems),
        problems=tuple(problems),
    )


def _stacked(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of the stacks whose experts can all be read."""
    unread = checkpoint.layout.unsupported
    whole = [
        name
        for name, stack in checkpoint.stacks.items()
        if not any(part in unread for row in stack.parts for part in row)
    ]
    return {name: tuple(checkpoint.shape(name)) for name in whole}
