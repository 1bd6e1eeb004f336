"""Measuring what FP8 does to the output of each layer of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..models.batches import Batch, batches, evaluating
from ..models.filters import ModuleFilter
from ..models.inputs import uncompiled
from ..models.interrupts import Interrupts, undisturbed
from ..models.recipe import Options
from ..progress import counting
from ..weights.structure import ITSELF
from .layers import Layer, layers_of, uncounted
from .measurement import LayerError, Measurement, OutputError
from .probes import Pass, duplicate, first_tensor
from .roles import roles
from .tally import ErrorTally


def measure(
    model: nn.Module,
    calibration_inputs: object,
    *,
    options: Options = None,
    module_filter: ModuleFilter | None = None,
) -> Measurement:
    """Measures, for each layer, how far FP8 moves its output from the original's, given the same inputs.

    The inputs of a layer are those that reach it in the original model, so its error is its own. The model is run twice
    on each batch, in evaluation mode and without gradients: on its originals, where each layer is run once more with
    its FP8 weight; and with all layers in FP8, for the error of the model's output.

    With ``y`` the layer's output, ``y8`` its output in FP8, and a *token* a row of the last dimension (of a
    convolution, a position):

    * ``sqnr = 10 log10(sum |y|^2 / sum |y - y8|^2)`` in dB, summed in float64 over all tokens of all calls;
    * the same for each token gives ``p50``, ``p1`` and ``worst``: what 50 %, 1 % and no more than one of the tokens
      do not exceed. Tokens of padding count, too.
    * An *outlier* is an input channel (or token) whose largest magnitude is more than 20 times the median one's. FP8
      has an exponent, so an outlier costs other values precision only from ratios of 2**14 on; a weight that is
      quantized for INT8 suffers from them.
    * *saturated* are values that the scheme's scales put beyond the largest FP8 value, by more than half a step.
      Scales that follow the values themselves let none.

    Rounding to e4m3 (3 bits of mantissa) gives about 31.5 dB, and 28.5 dB if weights and activations are rounded. What
    is rounded depends on the engine: on a CPU only the weights are. ``FP8GemmOptions(engine="reference")`` computes
    on any machine what the scheme says.

    A dense model gets FP8 weights only for one layer at a time, each for one call: memory grows by the largest FP8
    weight, plus the outputs of that layer. It ends as it was, bit for bit, also after an error or Ctrl-C. Of a patched
    model, originals must be kept, and no weight is quantized.

    Args:
        calibration_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or an iterable
            of those, such as a list or a DataLoader.
        options: how the layers of a dense model would be converted, as ``enable_fp8_gemm`` takes them (also a recipe);
            not for a patched model. A ``weight_search`` is made with the calibration inputs themselves; to measure it
            on others, patch the model with ``fp16_weight_storage="keep"`` first.
        module_filter: the layers to measure, as in ``enable_fp8_gemm``.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: there are no inputs, no layers or no originals; or an output is NaN or infinite, and then the
            message says of which layer, and whether FP8 or the original itself gave it.
        UnsupportedError: the requested engine cannot run a layer, or weights are split among processes.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))
        >>> found = measure(model, torch.randn(16, 64))
        >>> [layer.name for layer in found.layers], found.worst(1)[0].sqnr > 20
        (['0', '2'], True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"measure takes an nn.Module, found {type(model).__name__}")
    data = batches(calibration_inputs)
    layers, kept = layers_of(model, options, module_filter, data)
    found, whole = undisturbed(lambda interrupts: _run(model, data, layers, interrupts))
    rows = tuple(_row(layer, found.get("" if layer.name == ITSELF else layer.name, "")) for layer in layers)
    return Measurement(layers=rows, output=OutputError(**_percentiles(whole)), kept=kept)


def _run(
    model: nn.Module, data: list[Batch], layers: list[Layer], interrupts: Interrupts
) -> tuple[Mapping[str, str], ErrorTally]:
    """Runs all batches: the role of each layer, and the error of the model's output.

    Ctrl-C interrupts only what is restored here afterwards.
    """
    whole = ErrorTally()
    total = len(data) * sum(len(layer.runs) for layer in layers)
    with counting(total, what="measuring", unit="layer") as bar:
        passing = Pass(layers, bar.update)
        with evaluating(model), uncounted(layers), passing.installed(), uncompiled(), passing.watching():
            try:
                interrupts.open = True
                found = roles(model, Batch(duplicate(data[0].args), duplicate(data[0].kwargs)))
                for number, batch in enumerate(data, start=1):
                    passing.where = f"batch {number} of {len(data)}"
                    y, y8 = (first_tensor(each) for each in passing.run(model, batch))
                    if y is not None and y8 is not None:
                        kept = torch.isfinite(y)  # a mask may be -inf in both
                        whole.add(y.where(kept, 0), y8.where(kept, 0))
            finally:
                interrupts.open = False
    return found, whole


def _percentiles(error: ErrorTally) -> dict[str, Any]:
    nothing = dict.fromkeys(("sqnr", "p50", "p1", "worst"), float("nan"))
    if not error.tokens:
        return {"tokens": 0, **nothing}
    p50, p1, worst = error.percentiles(50, 1, 0)
    return {"tokens": error.tokens, "sqnr": error.sqnr, "p50": p50, "p1": p1, "worst": worst}


def _row(layer: Layer, role: str) -> LayerError:
    return LayerError(
        name=layer.name,
        shape=tuple(layer.shape),
        scheme=layer.scheme,
        engine=layer.engine,
        role=role,
        depth=_depth(layer.name),
        calls=layer.error.calls,
        **_percentiles(layer.error),
        outlier_channels=layer.inputs.outlier_channels,
        outlier_tokens=layer.inputs.outlier_tokens,
        saturated=layer.inputs.saturated_share,
        saturated_weights=layer.saturated_weights,
        ties=layer.ties,
        reason=layer.reason(),
    )


def _depth(name: str) -> int | None:
    """The number of the block that a layer is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None
