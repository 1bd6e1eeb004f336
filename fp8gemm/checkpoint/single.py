"""Writes a checkpoint as one safetensors file that describes itself, for formats without a config.json."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..progress import byte_progress
from .write import Piece, _header, _write_tensor

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
    infos = {key: info for piece in pieces for key, info in piece.tensors.items()}
    header, offsets = _header(infos)
    # The same name each time, so that a save that was killed leaves nothing behind after the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file, byte_progress(sum(p.nbytes for p in pieces), what=what) as counter:
            file.write(header)
            for piece in pieces:
                made = piece.make()
                for key, info in piece.tensors.items():
                    _write_tensor(file, len(header) + offsets[key], key, made[key], info)
                counter.update(piece.nbytes)
            file.truncate(len(header) + sum(info.nbytes for info in infos.values()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; it is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path
