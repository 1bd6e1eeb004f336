"""Engines that are broken in ways of their own, for ``fp8gemm doctor --import broken_engines``."""

from __future__ import annotations

import ctypes
import os

import torch

from fp8gemm import Machine, MatmulSpec, UnsupportedError, register_engine
from fp8gemm.engines.base import PackedWeight
from fp8gemm.engines.reference import ReferenceEngine


class Broken(ReferenceEngine):
    """Row scales only, without experts."""

    def rejects(self, spec: MatmulSpec, machine: Machine) -> list[str]:
        return ["row scales only"] if str(spec.scheme) != "weight row, activation row" or spec.experts else []


class Wrong(Broken):
    name = "wrong"

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Wrong in one element, of many tokens only."""
        y = super().linear(x, weight, bias, out_dtype)
        if len(y) > 1:
            y[1, 2] = torch.inf
        return y


class Crashing(Broken):
    name = "crashing"

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        if len(x) == 5:
            ctypes.string_at(0)
        return super().linear(x, weight, bias, out_dtype)

    def probe(self, device: torch.device, machine: Machine) -> None:
        if os.environ.get("BROKEN_WHEN_LOOKED_FOR"):
            ctypes.string_at(0)


class Endless(Broken):
    name = "endless"

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        while weight.k > 10000:
            pass
        return super().linear(x, weight, bias, out_dtype)


class Raising(Broken):
    name = "raising"

    def linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    def prepare(self, weight: object, scheme: object, **others: object) -> PackedWeight:
        packed = super().prepare(weight, scheme, **others)
        if packed.n < 100:
            raise UnsupportedError("takes no narrow weights")
        return packed


if os.environ.get("BROKEN_AT_IMPORT"):
    raise OSError("libbroken.so: undefined symbol")
for _kind in (Wrong, Crashing, Endless, Raising):
    register_engine(_kind())
