"""TensorRT-LLM's own checkpoints, as ModelOpt wrote them: ``weights_scaling_factor`` beside the weights."""

from __future__ import annotations

from ..errors import CheckpointError
from ..scaled import ROW, TENSOR, Granularity
from .base import Activation, Contents, Format, Layout


class TensorRT(Format):
    """One file of such a checkpoint. Both factors multiply: ModelOpt divides the weights by them."""

    name = "tensorrt-llm"

    def recognises(self, contents: Contents) -> str:
        factors = any(key.endswith(".weights_scaling_factor") for key in contents.tensors)
        return "tensors named weights_scaling_factor" if factors and contents.holds_fp8 else ""

    def activation(self, contents: Contents, module: str, weight: Granularity) -> Activation:
        return Activation(granularity=TENSOR if weight == TENSOR else ROW)

    def check(self, contents: Contents, layout: Layout) -> None:
        """Raises CheckpointError for a folder, whose files are the parts of the weights that each GPU holds."""
        if contents.model_config is not None:
            raise CheckpointError(
                "this is a TensorRT-LLM checkpoint (weights_scaling_factor), whose projections are fused and split "
                "among GPUs (rank0.safetensors, rank1.safetensors, ...); load the model that it was made from, or open "
                "one of its files to read that part"
            )
