"""Writes a checkpoint as one safetensors file that describes itself, for formats without a config.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..progress import byte_progress
from .switch import replacing, sync
from .write import Piece, fill

_SUFFIX = ".safetensors"


def single_file(path: str | os.PathLike[str]) -> Path:
    """The file that a single-file format writes: ``path`` if it ends with ``.safetensors``, else one in that folder.

    Raises:
        ValueError: a config.json there would be taken for the description of the file.
    """
    given = Path(path)
    file = given if given.suffix == _SUFFIX else given / f"model{_SUFFIX}"
    if (file.parent / "config.json").exists() and file.name.startswith(("model", "diffusion_pytorch_model")):
        raise ValueError(
            f"{file.parent / 'config.json'} would be taken for the config of {file.name}, which has none; choose "
            "another folder, or a name that ends with .safetensors and does not begin with model"
        )
    return file


def write_single_file(path: Path, pieces: Sequence[Piece], *, what: str) -> Path:
    """Writes all pieces into ``path``, which appears complete or not at all; returns it.

    Raises:
        CheckpointError: writing failed; what was there before is unchanged.
    """
    with replacing(path.parent) as new, byte_progress(sum(piece.nbytes for piece in pieces), what=what) as counter:
        os.replace(new.write(path.name, partial(fill, pieces=pieces, count=counter.update)), path)
        sync(path.parent)
    return path
