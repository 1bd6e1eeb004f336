"""The two exceptions of fp8gemm besides ValueError. They say what was requested, what was found and what would work."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """No engine, or not the requested one, supports this on this machine; or a format cannot express it.

    Example:
        >>> from fp8gemm import FP8GemmOptions, enable_fp8_gemm
        >>> try:
        ...     enable_fp8_gemm(torch.nn.Linear(8, 8).double(), options=FP8GemmOptions(engine="vllm"))
        ... except UnsupportedError as error:
        ...     print(str(error).splitlines()[0])
        the model itself: engine 'vllm' cannot multiply [8, 8] in torch.float64, weight row, activation row
    """


class CheckpointError(RuntimeError):
    """A checkpoint file is broken, ambiguous or inconsistent; the message names the file or tensor.

    Example:
        >>> import pathlib, tempfile
        >>> from fp8gemm import open_checkpoint
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "model.safetensors").write_bytes(b"no tensors")
        >>> try:
        ...     open_checkpoint(folder)
        ... except CheckpointError as error:
        ...     print("refused:", "model.safetensors" in str(error))
        refused: True
    """
