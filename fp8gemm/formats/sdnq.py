"""SDNQ: ``weight`` and ``scale``, in groups, transposed for the matrix product, or a convolution's."""

from __future__ import annotations

from ..errors import CheckpointError
from ..scaled import FP8_DTYPES, ROW, Granularity
from .arrangements import Arrangement, grouped, transposed
from .base import Activation, Contents, Format, Layout, Names


class SDNQ(Format):
    name = "sdnq"
    names = (Names(weight=".weight", scales=(".scale",)),)

    def recognises(self, contents: Contents) -> str:
        return f"quant_method {contents.method}" if contents.method in ("sdnq", "sdnq_training") else ""

    def arrangement(self, contents: Contents, key: str, scale: str) -> Arrangement | None:
        shape, grid = contents.tensors[key].shape, contents.tensors[scale].shape
        if len(shape) != 2:
            return grouped(shape, grid)
        if grid == (1, shape[1]) and shape[1] > 1:
            return transposed(shape)
        if set(grid) == {1} and contents.config.get("use_quantized_matmul") and _multiplies(shape):
            raise CheckpointError(
                f"{key} has one scale and its config use_quantized_matmul: nothing tells whether it is stored as "
                f"{list(shape)} or transposed; save the model with group_size=-1 or use_quantized_matmul=False"
            )
        return None

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        product = contents.config.get("quantized_matmul_dtype") or "float8_e4m3fn"
        scale = contents.tensors.get(f"{module}.scale")
        runs = scale is not None and len(scale.shape) == 2 and scale.shape[0] == 1 < scale.shape[1]
        return Activation(granularity=ROW if runs and "8" in str(product) else None, static=False)

    def unreadable(self, contents: Contents, module: str) -> str:
        # Only what SDNQ quantizes does it rotate.
        info = contents.tensors.get(f"{module}.weight")
        return "" if info is None or info.dtype not in FP8_DTYPES else super().unreadable(contents, module)

    def check(self, contents: Contents, layout: Layout) -> None:
        if str(contents.config.get("scale_dtype") or "none") != "none":
            layout.suspicious.append(f"the config quantizes scales to {contents.config['scale_dtype']}")


def _multiplies(shape: tuple[int, ...]) -> bool:
    """Whether SDNQ multiplies a matrix of this shape, either way round, in FP8."""
    return all(size >= 32 and size % 16 == 0 for size in shape)
