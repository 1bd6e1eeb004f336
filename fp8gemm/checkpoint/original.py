"""Which models of diffusers have other names in the files of the original implementations, and the mapping of those."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .original_names import TABLES
from .renaming import KeyMapping, Rules, Split, Swap, compiled, renamed

if TYPE_CHECKING:
    from .targets import Target


def original_key_mapping(model: nn.Module, kind: str | None = None) -> KeyMapping:
    """The ``key_mapping`` from the names of original implementations (BFL, ComfyUI, ...) to those of diffusers.

    ``load_checkpoint`` uses it by itself for the classes of diffusers. ``kind`` is the name of such a class, for a
    model of another class with the same names.

    Raises:
        ValueError: no such class is known; the message lists those that are.

    Example:
        >>> original_key_mapping(nn.Module(), "QwenImageTransformer2DModel")
        {'^model\\\\.diffusion_model\\\\.': '', '^diffusion_model\\\\.': ''}
    """
    name = kind or _known(model)
    if name not in TABLES:
        found = kind or type(model).__name__
        raise ValueError(f"original names are known for {', '.join(TABLES)}, not for {found}")
    blocks = getattr(model, "transformer_blocks", None)
    last = str(len(blocks) - 1) if isinstance(blocks, nn.ModuleList) else "{last}"
    return {_pattern(key.replace("{last}", last)): _filled(to, last) for key, to in TABLES[name].items()}


def rules_for(
    model: nn.Module, names: Iterable[str], key_mapping: KeyMapping | None, wanted: Mapping[str, Target]
) -> Rules:
    """The rules of ``key_mapping``, followed by those for original names if more names are in the model with them."""
    own = compiled(key_mapping)
    if not _known(model):
        return own
    both = [*own, *compiled(original_key_mapping(model))]
    return both if _hits(names, both, wanted) > _hits(names, own, wanted) else own


def _known(model: nn.Module) -> str:
    """The class of diffusers in the table that ``model`` derives from, empty if none; diffusers is not imported."""
    bases = (base.__name__ for base in type(model).__mro__ if base.__module__.split(".")[0] == "diffusers")
    return next((name for name in bases if name in TABLES), "")


def _hits(names: Iterable[str], rules: Rules, wanted: Mapping[str, Any]) -> int:
    return len({new for name in names for new in renamed(name, rules).names if new in wanted})


def _pattern(key: str) -> str:
    start, end = "^" * key.startswith("^"), "$" * key.endswith("$")
    return start + re.escape(key.removeprefix("^").removesuffix("$")) + end


def _filled(to: str | Split | Swap | None, last: str) -> str | Split | Swap | None:
    return Swap(to.into.replace("{last}", last)) if isinstance(to, Swap) else to
