"""A ready ``module_filter`` for models of diffusers: what their own layerwise casting casts."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

# What diffusers leaves alone in every model (``diffusers.hooks.layerwise_casting``), and peft's adapters.
_ALWAYS = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$", "lora_", "hada_", "lokr_")
_OWN = ("_skip_layerwise_casting_patterns", "_keep_in_fp32_modules")  # attributes of its model classes


def layerwise_casting_filter(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """A ``module_filter`` that leaves dense what diffusers' ``enable_layerwise_casting`` does not cast to FP8.

    Those are the patterns that the authors of a model class have named for it, such as ``time_embedder`` or ``norm``,
    and diffusers' own for all models. Models within ``model`` bring their own patterns, for their own layers.

    Raises:
        ValueError: no model in ``model`` has such patterns: it is not of diffusers.

    Example:
        >>> class Transformer(nn.Module):
        ...     _skip_layerwise_casting_patterns = ["time_embedder"]
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.time_embedder, self.to_q, self.proj_out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        >>> from fp8gemm import enable_fp8_gemm, report
        >>> model = Transformer()
        >>> model = enable_fp8_gemm(model, module_filter=layerwise_casting_filter(model))
        >>> [row.name for row in report(model).converted]
        ['to_q']
    """
    models = {name: _patterns(module) for name, module in model.named_modules() if hasattr(type(module), _OWN[0])}
    if not models:
        raise ValueError(
            f"{type(model).__name__} has no _skip_layerwise_casting_patterns, which models of diffusers have; name its "
            "layers by glob patterns instead, such as module_filter='!*norm*'"
        )

    def chosen(name: str, module: nn.Module) -> bool:
        for owner, patterns in models.items():
            inside = name if not owner else name[len(owner) + 1 :] if name.startswith(f"{owner}.") else None
            if inside is not None and any(re.search(pattern, inside) for pattern in patterns):
                return False
        return True

    return chosen


def _patterns(module: nn.Module) -> list[str]:
    return [*_ALWAYS, *(pattern for name in _OWN for pattern in getattr(type(module), name, None) or ())]
