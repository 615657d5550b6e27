"""Where a model's files are: a local directory, the bundled model, or a hub id downloaded through huggingface_hub
(progress bars, resumption, cache).

models/loader.py and the tokenizer's loader ask with what the user wrote as `model`; no other file knows of the hub.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from sapwood.config import BUNDLED_MODEL
from sapwood.errors import InvalidRequest, MissingExtra

log = logging.getLogger(__name__)

_TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
_WEIGHT_FILES = ("*.safetensors",)
# Second copies of the weights in other layouts, as large as the model itself.
_DUPLICATES = ("original/*", "consolidated*", "onnx/*", "metal/*", "gguf/*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model_dir(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory that holds the model: `model` itself where it is one, that of the bundled model where it has its
    name, else the snapshot of that hub id.

    weights   False leaves *.safetensors out (load_format "dummy", tokenizers)

    Raises InvalidRequest when neither exists or the hub cannot be reached, MissingExtra without huggingface_hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model == BUNDLED_MODEL:
        return _bundled()
    if path.exists():
        raise InvalidRequest(
            f"model {model!r} is a file; expected a directory with config.json and *.safetensors, or a hub id", "model"
        )
    if not _HUB_ID.fullmatch(model):
        raise InvalidRequest(
            f"model directory {model!r} does not exist (looked at {path.absolute()}), and it is no hub id", "model"
        )
    return _download(model, revision, weights)


def _bundled() -> Path:
    from sapwood.sapling import MODEL_DIR

    if not (MODEL_DIR / "config.json").is_file():
        raise InvalidRequest(
            f"the bundled model {BUNDLED_MODEL!r} is not part of this installation (no {MODEL_DIR / 'config.json'}); "
            "install sapwood again, or name another model",
            "model",
        )
    return MODEL_DIR


def _download(model: str, revision: str | None, weights: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra(
            f"{model!r} is no local directory, and downloading needs huggingface_hub: pip install huggingface_hub"
        ) from None
    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if weights else ())]
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=list(_DUPLICATES)
            )
        )
    except errors.GatedRepoError:
        raise _refusal(
            model, f"the hub's model {model!r} is gated: accept its licence on the hub and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise _refusal(model, f"the hub's model {model!r} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise _refusal(model, f"the hub has no model {model!r} (or it is private: set HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError as error:
        reason = (
            "HF_HUB_OFFLINE is set"
            if huggingface_hub.constants.HF_HUB_OFFLINE
            else f"the hub cannot be reached ({_root(error)})"
        )
        raise _refusal(model, f"{model!r}{at} is not in the download cache, and {reason}") from None
    except errors.HFValidationError as error:
        raise _refusal(model, str(error)) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise _refusal(model, f"downloading {model!r}{at} failed: {_root(error)}") from None
    except Exception as error:
        # The HTTP client's own errors share no base with huggingface_hub's, and which client it is differs by version.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise _refusal(model, f"downloading {model!r}{at} failed: {_root(error)}") from None


def _refusal(model: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{what}. There is no directory {str(Path(model).absolute())!r} either", "model")


def _root(error: BaseException) -> Any:
    """The first line of the innermost cause: what went wrong rather than what it led to."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
