"""Which of the formats that can be written each program takes, with which scales: what its own code says, one row each.

* vLLM 0.32, ``vllm/model_executor/layers/quantization``: ``CompressedTensorsConfig._get_scheme_from_parts`` and
  ``CompressedTensorsMoEMethod.get_moe_method`` (compressed_tensors), ``Fp8Config`` and ``Fp8LinearMethod`` (fp8.py),
  ``validate_fp8_block_shape`` (utils/fp8_utils.py).
* SGLang 0.5.23, ``sglang/srt/layers/quantization``: ``CompressedTensorsConfig._get_scheme_from_parts`` and
  ``get_moe_scheme`` (compressed_tensors), ``Fp8Config`` and ``Fp8LinearMethod.validate_block_quant_shapes`` (fp8.py).
* transformers 5.24: ``FineGrainedFP8HfQuantizer``, whose dequantization divides a weight evenly among its scales, and
  ``CompressedTensorsHfQuantizer``, which does not convert experts with blocks.
* ComfyUI: ``QUANT_ALGOS`` (comfy/quant_ops.py), one scale per tensor and MXFP8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UnsupportedError
from ..formats import Format, Written, writer
from ..scaled import BLOCK_128, MX, ROW, TENSOR, Granularity, Scheme
from .ignore import is_head

ReaderName = Literal["vllm", "sglang", "transformers", "comfyui"]
Activations = Literal["dynamic", "static", "weight-only"]

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_GATE_OR_UP = ("gate_proj", "up_proj", "w1", "w3")
_SHOWN = 3  # layers of one format in an error


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Layers that a program takes in ``format``: their scales, and how their activations may be quantized.

    Block scales are taken of weights that are whole blocks if ``whole``. ``experts`` are the ways for experts.
    """

    format: str
    weight: Granularity
    linear: tuple[Activations, ...]
    experts: tuple[Activations, ...] = ()
    heads: bool = False
    whole: bool = False

    def __str__(self) -> str:
        experts = "the same for experts" if self.experts == self.linear else ""
        experts = experts or f"experts {' or '.join(self.experts) or 'dense'}"
        return f"{self.format} with {self.weight} scales ({', '.join(self.linear)}; {experts})"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A program that reads checkpoints: the formats that it takes, the one to prefer first.

    It joins projections of these names (``joined``), whose rows have to be whole blocks then. ``hint`` is what works.

    Example:
        >>> written = Written(scheme=Scheme(weight=ROW, activation=ROW), shape=(64, 64))
        >>> READERS["vllm"].choose({"layer": written}).name
        'compressed-tensors'
    """

    title: str
    takes: tuple[Taken, ...]
    joined: tuple[str, ...] = ()
    hint: str

    def choose(self, layers: Mapping[str, Written], *, format: str | None = None, what: str = "convert") -> Format:
        """The first of its formats that it takes all ``layers`` in, by name of the module; or ``format`` itself.

        Raises:
            UnsupportedError: there is none; with the reasons for each format, and what would work.
        """
        found = []
        for name in dict.fromkeys(taken.format for taken in self.takes if format in (None, taken.format)):
            target = writer(name)
            reasons = self.refuses(name, layers) or (target.refuses(layers) if layers else [])
            if not reasons:
                return target
            more = f"\n  and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            found.append(f"as {name}:\n  " + "\n  ".join(reasons[:_SHOWN]) + more)
        takes = "".join(f"\n  {taken}" for taken in self.takes)
        start = f"cannot {what} for {self.title}" + (f" as {format}" if format else "")
        raise UnsupportedError("\n".join([f"{start}:", *found, f"{self.title} takes:{takes}", self.hint]))

    def refuses(self, format: str, layers: Mapping[str, Written]) -> list[str]:
        """All reasons why it does not take these layers in ``format``; empty if it does."""
        rows = [taken for taken in self.takes if taken.format == format]
        return [reason for name, layer in layers.items() if (reason := self._refuses(rows, name, layer))]

    def _refuses(self, rows: Sequence[Taken], name: str, layer: Written) -> str:
        taken = next((row for row in rows if _has(layer.scheme, row.weight)), None)
        if taken is None:
            known = " or ".join(str(row.weight) for row in rows)
            return f"{name}: {self.title} takes {known} scales in this format, found {layer.scheme}"
        expert, (n, k) = _EXPERT.search(name) is not None, layer.shape[-2:]
        if is_head(name) and not taken.heads:
            return f"{name}: {self.title} takes output heads dense"
        given, ways = _activations(layer.scheme), taken.experts if expert else taken.linear
        if given not in ways:
            kind = "experts" if expert else "layers"
            known = " or ".join(ways) or "dense"
            return f"{name}: {self.title} takes {kind} with {taken.weight} scales {known} in this format, found {given}"
        last = name.rpartition(".")[2]
        joined = last in self.joined or (expert and self.joined and last in _GATE_OR_UP)
        if taken.weight == BLOCK_128 and ((joined and n % 128) or (taken.whole and (n % 128 or k % 128))):
            why = "joins this projection with others" if joined else "divides weights evenly among their scales"
            return f"{name}: {self.title} {why}, which takes whole blocks of 128, found shape {list(layer.shape)}"
        return ""


def _has(scheme: Scheme, weight: Granularity) -> bool:
    return scheme.weight == weight and (weight != MX or scheme.scale_format == "ue8m0")


def _activations(scheme: Scheme) -> Activations:
    return "weight-only" if scheme.activation is None else "static" if scheme.static else "dynamic"


_EVERY: tuple[Activations, ...] = ("dynamic", "static", "weight-only")
_CT, _FINE, _COMFY = "compressed-tensors", "fine-grained", "comfy"
_ROWS = "What works: fp8gemm quantize --scheme row, from the dense checkpoint."

READERS: dict[str, Reader] = {
    "vllm": Reader(
        title="vLLM",
        takes=(
            Taken(format=_FINE, weight=BLOCK_128, linear=("dynamic",), experts=("dynamic",)),
            Taken(format=_CT, weight=ROW, linear=_EVERY, experts=("dynamic",)),
            Taken(format=_CT, weight=TENSOR, linear=_EVERY, experts=("dynamic", "static")),
            Taken(format=_CT, weight=BLOCK_128, linear=("dynamic", "weight-only"), experts=("dynamic",)),
            Taken(format=_CT, weight=MX, linear=("dynamic", "weight-only"), experts=("dynamic", "weight-only")),
        ),
        joined=("q_proj", "k_proj", "gate_proj"),  # the last of those that are joined need not be whole blocks
        hint=_ROWS,
    ),
    "sglang": Reader(
        title="SGLang",
        takes=(
            Taken(format=_FINE, weight=BLOCK_128, linear=("dynamic",), experts=("dynamic",)),
            Taken(format=_CT, weight=ROW, linear=_EVERY, experts=("dynamic",)),
            Taken(format=_CT, weight=TENSOR, linear=_EVERY, experts=("dynamic", "static")),
            Taken(format=_CT, weight=BLOCK_128, linear=("dynamic",), experts=("dynamic",)),
        ),
        joined=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        hint=_ROWS,
    ),
    "transformers": Reader(
        title="transformers",
        takes=(
            Taken(format=_FINE, weight=BLOCK_128, linear=("dynamic",), experts=("dynamic",), whole=True),
            Taken(format=_FINE, weight=MX, linear=("dynamic",), experts=("dynamic",)),
            Taken(format=_CT, weight=ROW, linear=_EVERY, experts=_EVERY, heads=True),
            Taken(format=_CT, weight=TENSOR, linear=_EVERY, experts=_EVERY, heads=True),
            Taken(format=_CT, weight=BLOCK_128, linear=("dynamic", "weight-only")),
            Taken(format=_CT, weight=MX, linear=("dynamic", "weight-only")),
        ),
        hint=_ROWS,
    ),
    "comfyui": Reader(
        title="ComfyUI",
        takes=(
            Taken(format=_COMFY, weight=TENSOR, linear=_EVERY, experts=_EVERY, heads=True),
            Taken(format=_COMFY, weight=MX, linear=("dynamic", "weight-only"), experts=("dynamic",), heads=True),
        ),
        hint="What works: fp8gemm quantize --scheme tensor, from the dense file; or --format comfy without --for, for "
        "ComfyUI-QuantOps, which reads scales per row and block.",
    ),
}


def preferred(reader: str | None, format: str | None) -> Format:
    """The format that is given, or the one that the reader prefers, before any layer is known.

    Raises:
        UnsupportedError: the format cannot be written.
        ValueError: the reader is not in the table.
    """
    if reader is not None and reader not in READERS:
        raise ValueError(f"reader must be one of {', '.join(get_args(ReaderName))}, found {reader!r}")
    return writer(format or (READERS[reader].takes[0].format if reader else _CT))


def format_for(
    reader: ReaderName | None, format: str | None, layers: Mapping[str, Written], *, what: str = "convert"
) -> tuple[Format, dict[str, str]]:
    """The format to write these layers in, by name of the module, and why output heads among them are to be dense.

    If ``what`` is not to convert, heads are layers like others.

    Raises:
        UnsupportedError: the reader takes the layers in no format, or not in the one that is given.
    """
    if reader is None:
        return preferred(None, format), {}
    program = READERS[reader]
    heads = {name: layer for name, layer in layers.items() if what == "convert" and is_head(name)}
    target = program.choose({n: layer for n, layer in layers.items() if n not in heads}, format=format, what=what)
    dense = [name for name, layer in heads.items() if program.refuses(target.name, {name: layer})]
    return target, dict.fromkeys(dense, f"an output head, which {program.title} takes dense")
