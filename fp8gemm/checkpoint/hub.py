"""Downloads from the Hugging Face Hub: an id becomes a folder of downloaded files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
# Weights, configs and tokenizers; pickles are never fetched.
_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """How to reach the Hub; the defaults are huggingface_hub's own, environment variables included.

    ``offline`` uses only files that were downloaded before.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    offline: bool = False


def is_id(source: str) -> bool:
    """Whether ``source`` has the form ``owner/name``."""
    return _ID.match(source) is not None


def fetch(name: str, hub: Hub) -> Path:
    """The folder with the files of the repository ``name``; cached files are not downloaded again.

    Raises:
        CheckpointError: it does not exist, the token has no access to it, or it could not be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    # huggingface_hub's errors share a base class with those of whichever HTTP library it uses.
    unreachable: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    at = f"{name} at revision {hub.revision}" if hub.revision else name
    try:
        folder = snapshot_download(
            name,
            revision=hub.revision,
            token=hub.token,
            cache_dir=None if hub.cache_dir is None else str(hub.cache_dir),
            local_files_only=hub.offline,
            allow_patterns=_PATTERNS,
        )
    except GatedRepoError as error:
        raise CheckpointError(f"{at} is gated: accept its terms on the Hub and pass token=...") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} exists on the Hub, but has no revision {hub.revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at} is neither a local file or folder nor a repository on the Hub that you can access; private ones "
            "need token=..."
        ) from error
    except unreachable as error:
        if hub.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise CheckpointError(f"{at} has not been downloaded completely, and offline mode is on") from error
        raise CheckpointError(
            f"downloading {at} failed ({type(error).__name__}: {error}); downloaded files are kept, and opening it "
            "again resumes from there"
        ) from error
    return Path(folder)
