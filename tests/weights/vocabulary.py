"""The torch operations that write to tensors, found by their schemas, each with valid arguments."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

SHAPE = (64, 48)  # of the weight that is written to
WHOLE_NUMBERS = ("indices", "pivots", "info", "infos", "LU_pivots", "rank", "counts", "jpvt", "out1", "exponent")
WHOLE_NUMBERS += ("max_values", "min_indices", "infos", "A_pivots")


@dataclass(frozen=True)
class Write:
    """An overload that writes to its targets; ``arguments`` are all others, ``shapes`` are those of the targets.

    A target with a dtype instead of a shape is a plain tensor, which is not checked.
    """

    name: str
    arguments: dict[str, Any]
    shapes: dict[str, tuple[int, ...] | torch.dtype]
    lists: bool = False

    def targets(self, *tensors: torch.Tensor) -> dict[str, Any]:
        """All or consecutive pieces of a tensor of ``SHAPE``; pieces of two such tensors if a list is written to."""
        found: dict[str, Any] = {}
        start = 0
        for key, shape in self.shapes.items():
            if isinstance(shape, torch.dtype):
                found[key] = torch.empty(0, dtype=shape)
                continue
            end = start + torch.Size(shape).numel()
            pieces = [t if shape == SHAPE else t.view(-1)[start:end].view(shape) for t in tensors]
            found[key] = pieces if self.lists else pieces[0]
            start = end
        return found

    def run(self, targets: dict[str, Any]) -> None:
        """Runs it once on these targets; tensor arguments are copied first."""
        overload = overload_of(self.name)
        values = {key: _copied(value) for key, value in self.arguments.items()} | targets
        schema = overload._schema.arguments
        positional = [values.pop(a.name) for a in schema if not a.kwarg_only and a.name in values]
        torch.manual_seed(3)
        overload(*positional, **values)


def overload_of(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write and "Tensor" in str(argument.type)


def names() -> Iterator[str]:
    """Every overload that writes to a tensor and is reachable by a public name of torch."""
    homes = (torch, torch._C._nn, torch._C._linalg, torch._C._special, torch._C._fft)
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if not schema.name.startswith("aten::") or not any(is_written(a) for a in schema.arguments):
            continue
        method = is_written(schema.arguments[0]) and hasattr(torch.Tensor, name)
        function = not name.startswith("_") and any(hasattr(home, name) for home in homes)
        if (method or function or name.startswith("_foreach")) and hasattr(torch.ops.aten, name):
            overload = schema.overload_name or "default"
            if overload in getattr(torch.ops.aten, name).overloads():
                yield f"{name}.{overload}"


# --- arguments ----------------------------------------------------------------------------------------------------


def values(*shape: int) -> torch.Tensor:
    """Values between 0.1 and 0.9, where almost every function is defined."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand(shape, generator=generator, dtype=torch.float32) * 0.8 + 0.1


def positive_definite(n: int) -> torch.Tensor:
    return values(n, n) @ values(n, n).T + n * torch.eye(n, dtype=torch.float32)


# Default tensor arguments, tried one after the other until an operation accepts one.
TENSORS: tuple[Callable[[], torch.Tensor], ...] = (
    lambda: values(*SHAPE),
    lambda: positive_definite(8),
    lambda: values(8),
    lambda: values(2, 8, 8),
    lambda: values(1, 2, 8, 8),
    lambda: values(1, 2, 6, 6, 6),
    lambda: torch.arange(8, dtype=torch.int64) % 4,
    lambda: values(8, 8) > 0.5,
    lambda: torch.tensor(0.5, dtype=torch.float32),
    lambda: torch.complex(values(8, 8), values(8, 8)),
)
OF_TYPE: dict[str, Any] = {"int": 1, "float": 0.5, "number": 0.5, "bool": False, "str": "mean", "complex": 1j}


def _lists(kind: str, like: torch.Tensor) -> Any:
    spatial = max(like.dim() - 2, 1)
    return {
        "List[int]": [2] * spatial,
        "List[Tensor]": [like, like],
        "List[Optional[Tensor]]": [torch.tensor([1, 2], dtype=torch.int64)],
        "List[number]": [0.5, 0.5],
        "List[float]": [0.5],
        "List[bool]": [True, True, True],
    }.get(kind)


def _index(like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0, 2], dtype=torch.int64)


# Tensor arguments by name.
NAMED: dict[str, Callable[[torch.Tensor], Any]] = {
    "dim": lambda t: 0,
    "index": _index,
    "indices": lambda t: [_index(t)],
    "mask": lambda t: t > 0.5,
    "mat1": lambda t: values(t.shape[-2], 8),
    "mat2": lambda t: values(8, t.shape[-1]),
    "mat": lambda t: values(*t.shape, 8),
    "vec": lambda t: values(8),
    "vec1": lambda t: values(t.shape[0]),
    "vec2": lambda t: values(t.shape[-1]),
    "batch1": lambda t: values(2, t.shape[-2], 8),
    "batch2": lambda t: values(2, 8, t.shape[-1]),
    "dtype": lambda t: torch.float32,
    "size": lambda t: list(SHAPE),
    "maxnorm": lambda t: 0.5,
    "source": lambda t: t[:2],
    "values": lambda t: t[0],
    "tau": lambda t: values(t.shape[-1]),
    "memory_format": lambda t: None,
    "generator": lambda t: None,
}


def _of_kind(kind: str, value: Any) -> Any:
    """``dim`` and similar arguments are one number in some overloads and a list in others."""
    if "List" in kind and isinstance(value, int):
        return [value]
    if "List" not in kind and isinstance(value, list):
        return value[0] if "Tensor" in kind else len(value)
    if kind == "int" and isinstance(value, torch.Tensor):
        return 1
    return value


def _arguments(schema: Any, like: torch.Tensor, own: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for argument in schema.arguments:
        if is_written(argument):
            continue
        kind = str(argument.type)
        if argument.name in own:
            found[argument.name] = own[argument.name]
        elif argument.has_default_value():
            continue
        elif argument.name in NAMED:
            found[argument.name] = _of_kind(kind, NAMED[argument.name](like))
        elif kind in ("Tensor", "t"):
            found[argument.name] = like
        else:
            found[argument.name] = OF_TYPE[kind] if kind in OF_TYPE else _lists(kind, like)
    return found


def _convolution(spatial: int, **more: Any) -> dict[str, Any]:
    image = values(1, 2, *[5] * spatial)
    return {"self": image, "weight": values(3, 2, *[2] * spatial), "kernel_size": [2] * spatial} | more


_IMAGE = values(1, 2, 6, 6)
_WHOLE = torch.arange(8, dtype=torch.int64)
# Arguments of operations that need more than that, by packet or overload.
OWN: dict[str, dict[str, Any]] = {
    "lu_unpack": {"LU_data": positive_definite(8), "LU_pivots": torch.arange(1, 9, dtype=torch.int32)},
    "clamp": {"min": 0.3, "max": 0.6},
    "clamp.Tensor_out": {"min": values(48) - 0.2},
    "clamp_": {"min": 0.3, "max": 0.6},
    "clamp_.Tensor": {"min": values(48) - 0.2},
    "clip": {"min": 0.3, "max": 0.6},
    "clip.Tensor_out": {"min": values(48) - 0.2},
    "clip_": {"min": 0.3, "max": 0.6},
    "clip_.Tensor": {"min": values(48) - 0.2},
    "_foreach_addcdiv.Tensor_out": {"scalars": values(2)},
    "_foreach_addcdiv_.Tensor": {"scalars": values(2)},
    "_foreach_addcmul.Tensor_out": {"scalars": values(2)},
    "_foreach_addcmul_.Tensor": {"scalars": values(2)},
    "affine_grid_generator": {"theta": values(1, 2, 3), "size": [1, 2, 4, 4]},
    "as_strided_copy": {"size": [4, 4], "stride": [8, 1]},
    "as_strided_scatter": {"src": values(4, 4), "size": [4, 4], "stride": [8, 1]},
    "as_strided_": {"size": [4, 4], "stride": [8, 1]},
    # These resize their output to all elements for a moment, and torch writes beyond an output that is a view.
    "huber_loss": {"reduction": 0},
    "soft_margin_loss": {"reduction": 0},
    "bmm": {"self": values(2, 4, 8), "mat2": values(2, 8, 4)},
    "bitwise_and": {"self": _WHOLE, "other": 3},
    "cross": {"self": values(4, 3), "other": values(4, 3) + 1},
    "convolution": {
        **{"input": _IMAGE, "weight": values(2, 2, 3, 3), "bias": None, "stride": [1, 1], "padding": [0, 0]},
        **{"dilation": [1, 1], "transposed": False, "output_padding": [0, 0], "groups": 1},
    },
    "col2im": {
        **{"self": values(1, 8, 9), "output_size": [4, 4], "kernel_size": [2, 2], "dilation": [1, 1]},
        **{"padding": [0, 0], "stride": [1, 1]},
    },
    "conv_tbc": {"self": values(6, 1, 2), "weight": values(3, 2, 4), "bias": values(4)},
    "nuclear_norm.dim_out": {"self": values(2, 8, 8), "dim": [0, 1]},
    "orgqr": {"self": values(8, 8), "input2": values(8)},
    "ormqr": {"self": values(8, 8), "input2": values(8), "input3": values(8, 8)},
    "permute_copy": {"self": values(4, 8), "dims": [1, 0]},
    "where": {"condition": values(8, 8) > 0.5, "self": values(8, 8), "other": values(8, 8) + 1},
    "set_": {"source": values(2, 2)},
    "masked_scatter": {"source": values(*SHAPE)},
    "masked_scatter_": {"source": values(*SHAPE)},
    "index_fill.int_Tensor_out": {"value": torch.tensor(0.5, dtype=torch.float32)},
    "index_fill_.int_Tensor": {"value": torch.tensor(0.5, dtype=torch.float32)},
    "diagonal_scatter": {"self": values(8, 8), "src": values(8)},
    "select_scatter": {"self": values(8, 8), "src": values(8)},
    "linalg_cond.p_str_out": {"p": "fro"},
    "linalg_norm.ord_str_out": {"ord": "fro"},
    "linalg_matrix_norm": {"ord": 2},
    "linalg_matrix_norm.str_ord_out": {"ord": "fro"},
    "linalg_pinv.out_rcond_tensor": {"rcond": torch.tensor(0.1, dtype=torch.float32)},
    "linalg_cross": {"self": values(4, 3), "other": values(4, 3) + 1},
    "linalg_lu_solve": {"pivots": torch.arange(1, 9, dtype=torch.int32)},
    "linalg_ldl_solve": {"pivots": torch.arange(1, 9, dtype=torch.int32), "LD": positive_definite(8)},
    "lu_solve": {"LU_pivots": torch.arange(1, 9, dtype=torch.int32)},
    "linalg_tensorinv": {"self": positive_definite(8).reshape(4, 2, 8), "ind": 2},
    "nll_loss": {"self": values(4, 4), "target": torch.tensor([0, 1, 2, 3], dtype=torch.int64)},
    "nll_loss2d": {"self": values(1, 2, 4, 4), "target": torch.zeros(1, 4, 4, dtype=torch.int64)},
    "multi_margin_loss": {"self": values(4, 4), "target": torch.tensor([0, 1, 2, 3], dtype=torch.int64)},
    "multilabel_margin_loss": {"self": values(4), "target": torch.tensor([1, 0, -1, 0], dtype=torch.int64)},
    "native_layer_norm": {"input": values(4, 48), "normalized_shape": [48], "weight": None, "bias": None},
    "native_dropout": {"train": True},
    "grid_sampler_2d": {"input": _IMAGE, "grid": values(1, 3, 3, 2)},
    "grid_sampler_3d": {"input": values(1, 2, 4, 4, 4), "grid": values(1, 3, 3, 3, 3)},
    "fractional_max_pool2d": {
        "self": _IMAGE,
        "kernel_size": [2, 2],
        "output_size": [3, 3],
        "random_samples": values(1, 2, 2),
    },
    "put": {"index": _index(_WHOLE), "source": values(2)},
    "put_": {"index": _index(_WHOLE), "source": values(2)},
    "randint": {"low": 1, "high": 9},
    "randint_like": {"low": 1, "high": 9},
    "randint_like.Tensor_out": {"high": torch.tensor(9, dtype=torch.int64)},
    "randint_like.Tensor_generator_out": {"high": torch.tensor(9, dtype=torch.int64)},
    "reflection_pad1d": {"self": values(2, 8), "padding": [1, 1]},
    "reflection_pad2d": {"self": _IMAGE, "padding": [1, 1, 1, 1]},
    "reflection_pad3d": {"self": values(1, 1, 3, 3, 3), "padding": [1] * 6},
    "replication_pad1d": {"self": values(2, 8), "padding": [1, 1]},
    "replication_pad2d": {"self": _IMAGE, "padding": [1, 1, 1, 1]},
    "replication_pad3d": {"self": values(1, 1, 3, 3, 3), "padding": [1] * 6},
    "scatter.reduce_out": {"index": _index(_WHOLE)[None], "reduce": "add"},
    "scatter.value_reduce_out": {"index": _index(_WHOLE)[None], "reduce": "add"},
    "scatter_.reduce": {"index": _index(_WHOLE)[None], "reduce": "add"},
    "scatter_.value_reduce": {"index": _index(_WHOLE)[None], "reduce": "add"},
    "segment_reduce": {"data": values(8), "lengths": torch.tensor([3, 5], dtype=torch.int64), "reduce": "sum"},
    "slow_conv_dilated2d": _convolution(2),
    "slow_conv_dilated3d": _convolution(3),
    "slow_conv_transpose2d": _convolution(2, weight=values(2, 3, 2, 2)),
    "slow_conv_transpose3d": _convolution(3, weight=values(2, 3, 2, 2, 2)),
    "thnn_conv2d": _convolution(2),
    "slow_conv3d": _convolution(3),
    "split_copy.Tensor_out": {"self": values(8), "split_size": 4},
    "split_with_sizes_copy": {"self": values(8), "split_sizes": [4, 4]},
    "unsafe_split_with_sizes": {"self": values(8), "split_sizes": [4, 4]},
    "squeeze_.dims": {"dim": [0]},
    "take_along_dim": {"self": values(8), "indices": _index(_WHOLE)},
    "unfold_copy": {"self": values(8), "dimension": 0, "size": 4, "step": 2},
    "upsample_bilinear2d.vec_out": {"input": _IMAGE, "output_size": [3, 3], "align_corners": False},
    "upsample_nearest2d.vec_out": {"input": _IMAGE, "output_size": [3, 3]},
}


@functools.cache
def write(name: str) -> Write | str:
    """The overload with arguments that a dense tensor accepts; the last error if there are none."""
    schema = overload_of(name)._schema
    targets = [a for a in schema.arguments if is_written(a)]
    in_place = targets[0] is schema.arguments[0] or is_written(schema.arguments[0])
    problem = "no arguments were tried"
    for make in TENSORS:
        like = make()
        if in_place and not like.is_floating_point():
            continue
        for whole in (None, torch.int64, torch.int32, torch.bool):
            own = OWN.get(name, OWN.get(name.split(".")[0], {}))
            try:
                arguments = _arguments(schema, like, own)
                empty: dict[str, Any] = {}
                for target in targets:
                    start = like.clone() if in_place else torch.empty(0, dtype=torch.float32)
                    if whole is not None and target.name in WHOLE_NUMBERS:
                        start = torch.empty(0, dtype=whole)
                    empty[target.name] = [start, start.clone()] if "List" in str(target.type) else start
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of deprecated operations, and of outputs of another shape
                    Write(name, arguments, {}).run(empty)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                problem = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            lists = any("List" in str(target.type) for target in targets)
            first = {key: t[0] if isinstance(t, list) else t for key, t in empty.items()}
            shapes = {key: tuple(t.shape) if t.is_floating_point() else t.dtype for key, t in first.items()}
            sizes = [torch.Size(shape).numel() for shape in shapes.values() if isinstance(shape, tuple)]
            if not sizes or sum(sizes) > SHAPE[0] * SHAPE[1]:
                continue
            return Write(name, arguments, shapes, lists)
    return problem
