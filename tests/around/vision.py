"""PyPI's torchvision, which is compiled for torch with CUDA, beside a torch for CPUs.

Its models are Python and run, but importing it fails for want of two of its operators, and with it all of transformers.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare_missing_operators() -> None:
    """Declares the two operators without an implementation, where torchvision cannot bring its own."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return
    if "+cu" in Path(spec.origin).with_name("version.py").read_text():
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_missing_operators()
