"""Sharding of FP8 weights by FSDP2: all-gathers move bytes and scales, and resharding frees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics import dequantize, quantize
from ..scaled import FP8GemmOptions, Granularity, Precision, ScaledTensor, Scheme
from .activity import Activity
from .geometry import Layout
from .home import Home
from .stored import Stored


@dataclass(frozen=True, kw_only=True)
class Sharded(Scheme):
    """The scheme of a shard whose scales, in the scheme ``whole``, would be shared by the rows of several ranks."""

    whole: Scheme


def whole_scheme(scheme: Scheme) -> Scheme:
    """The scheme of the unsharded weight."""
    return scheme.whole if isinstance(scheme, Sharded) else scheme


def shard_scheme(scheme: Scheme, n: int, rows: int) -> Scheme:
    """The scheme of a shard of ``rows`` rows of ``[n, K]``: scales are repeated until none spans two ranks."""
    whole = whole_scheme(scheme)
    block, uneven = whole.weight.rows, n % rows != 0
    if rows == n or block == 1:
        return whole
    if block is not None and not uneven and rows % block == 0:
        return whole
    fine = 1 if block is None or uneven else math.gcd(rows, block)
    return Sharded(
        weight=Granularity(fine, whole.weight.cols),
        activation=whole.activation,
        static=whole.static,
        scale_format=whole.scale_format,
        whole=whole,
    )


def refined(weight: ScaledTensor, grid: Granularity) -> ScaledTensor:
    """The same bytes with each scale repeated for the smaller blocks of ``grid``."""
    if weight.granularity == grid:
        return weight
    return ScaledTensor(weight.data, repeated(weight.scale, weight.shape, weight.granularity, grid), grid)


def repeated(scale: torch.Tensor, shape: tuple[int, ...], old: Granularity, new: Granularity) -> torch.Tensor:
    """One value per block of a weight of this shape, repeated for smaller blocks."""
    for dim, wide, narrow in zip((-2, -1), old.block(shape), (new.rows, new.cols), strict=True):
        if narrow is not None and narrow != wide:
            scale = scale.repeat_interleave(-(-wide // narrow), dim=dim).narrow(dim, 0, -(-shape[dim] // narrow))
    return scale.contiguous()


def coarsened(weight: ScaledTensor, scheme: Scheme) -> ScaledTensor:
    """Undoes ``refined``. If a shard was written to, the weight is quantized again, identically on every rank.

    Whether repeated scales still agree is computed on the device, which synchronizes with it.
    """
    grid = scheme.weight
    if weight.granularity == grid:
        return weight
    fine = weight.granularity.block(weight.shape)[0]
    scale = weight.scale[..., :: grid.block(weight.shape)[0] // fine, :].contiguous()
    whole = ScaledTensor(weight.data, scale, grid)
    if refined(whole, weight.granularity).scale.equal(weight.scale):
        return whole
    return quantize(dequantize(weight), grid, dtype=weight.data.dtype, scale_format=scheme.scale_format)


class Gathered(Home):
    """The home of a weight that FSDP2 has all-gathered; FSDP2 frees its memory and fills it again."""

    lease: Lease

    def copy(self, stored: Stored | None = None, layout: Layout | None = None) -> Home:
        """A copy that shares no memory, as it may outlive the gathered weight."""
        kept = self.stored if stored is None else stored
        if kept is not None:
            kept = Stored(kept.scaled().clone())
        return super().copy(kept, layout)


class Lease:
    """Poses as one of the tensors that FSDP2 frees on resharding, to drop what engines packed from the gathered
    weight."""

    itemsize = 1

    def __init__(self, home: Gathered) -> None:
        self.renew(home)

    def renew(self, home: Gathered) -> None:
        assert home.stored is not None
        self._home, self._plain, self._size = home, home.stored.plain, 1
        home.lease = self

    def numel(self) -> int:
        return 1

    def untyped_storage(self) -> Lease:
        return self

    def size(self) -> int:
        return self._size

    def resize_(self, size: int) -> None:
        self._size = size
        if size == 0:
            self._home.stored, self._home.dense, self._home.flat = Stored(self._plain), None, None


@dataclass(frozen=True)
class Facts:
    """What the gathered weight needs to know of a shard, apart from its bytes and scales."""

    options: FP8GemmOptions
    scheme: Scheme  # of the shard
    layout: Layout  # of the whole weight
    scale: torch.Tensor  # of the shard
    packed: bool  # whether the scales are gathered in a tensor of the data's shape
    trains: bool
    input_scale: torch.Tensor | None
    activity: Activity
    precision: Precision


class Shardable:
    """The methods that FSDP2 looks up on the class of a sharded parameter."""

    _home: Home

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], Facts]:
        """The shard's bytes as uint8, padded, and its scales; the sizes are the same on all ranks.

        Where some rank holds fewer rows, torch requires every tensor to have the size of the padded shard: the scales
        then are at the beginning of each row of a second tensor.
        """
        from .managed import refuse_smaller_mesh

        refuse_smaller_mesh(module, mesh)
        home = self._home
        home.owned = True
        stored = home.settle()
        assert stored is not None
        scaled = stored.scaled()
        raw, scale, turned = scaled.data.view(torch.uint8), scaled.scale, home.layout.turned
        uneven = outer_size[0] != mesh.size() * raw.shape[0]
        if uneven:
            room = torch.zeros_like(raw).view(raw.shape[0], -1)
            values = scale.reshape(scale.shape[0], -1).view(torch.uint8)
            room[: values.shape[0], : values.shape[1]] = values
            raw, scale = raw.reshape(home.layout.size), room.view(home.layout.size)
        layout = Layout((outer_size[0], *home.layout.shape[1:]), turned)
        facts = Facts(
            home.options,
            home.scheme,
            layout,
            scaled.scale,
            uneven,
            home.trains,
            home.input_scale,
            home.activity,
            home.precision,
        )
        return (raw, scale) if mesh.size() > 1 else (raw,), facts  # a mesh of one rank receives only the first tensor

    def fsdp_post_all_gather(
        self,
        outputs: tuple[torch.Tensor, ...],
        facts: Facts,
        param_dtype: torch.dtype,
        *,
        out: Any = None,
    ) -> Any:
        """The whole weight from the gathered tensors, or None after updating ``out``, the result of the previous
        gather."""
        raw, scale = outputs if len(outputs) > 1 else (outputs[0], facts.scale)
        shape, grid = facts.layout.shape, facts.scheme.weight
        expected = grid.scale_shape(shape)
        if facts.packed:
            rows, width = self._home.layout.shape[0], 4 * math.prod(expected[1:])
            lines = scale.view(-1, rows, math.prod(shape[1:]))[:, : len(facts.scale), :width]
            scale = lines.contiguous().view(torch.float32).view(-1, *expected[1:])
        data = raw.view(-1, *shape[1:])[: shape[0]].view(facts.options.weight_dtype)
        scheme = whole_scheme(facts.scheme)
        scaled = coarsened(ScaledTensor(data, scale[: expected[0]], grid), scheme)
        home = Gathered(
            facts.options,
            facts.layout,
            stored=Stored(scaled),
            input_scale=facts.input_scale,
            scheme=scheme,
            trains=facts.trains,
        )
        home.owned, home.activity, home.precision = True, facts.activity, facts.precision
        if out is not None:
            weight = held(out)  # ``out`` may be a DTensor, under tensor parallelism
            weight._home.lease.renew(home)
            weight._home = home
            return None
        return type(self)(home, param_dtype), (Lease(home),)  # type: ignore[call-arg]


def held(parameter: Any) -> Any:
    """The local tensor of a DTensor; any other parameter itself."""
    return getattr(parameter, "_local_tensor", parameter)


def is_distributed(parameter: Any) -> bool:
    """Whether it is an FP8 weight that DTensor or FSDP2 has distributed."""
    home = getattr(held(parameter), "_home", None)
    return isinstance(home, Gathered) or (isinstance(home, Home) and hasattr(parameter, "_local_tensor"))
