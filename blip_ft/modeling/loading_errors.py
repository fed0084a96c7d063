"""Turn errors of the libraries that load a checkpoint into one message that says what to check."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from blip_ft.data.secrets import hide_secrets


@contextmanager
def explain_loading(name: str, of: str = "") -> Iterator[None]:
    """Turn errors raised while the checkpoint `name` is loaded into a ValueError that says what to check.

    of: beginning of the message, e.g. which adapter the checkpoint is the base of.
    """
    try:
        yield
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{of}The weights of {name} do not have the shapes described in its {CONFIG_NAME}: the files do not belong "
            f"together. Save or download them again.\n{error}"
        ) from error
    # EOFError and KeyError come from a pickle or a tokenizer.json that is empty or has other content
    except (
        *(OSError, EntryNotFoundError, HFValidationError, SafetensorError),
        *(pickle.UnpicklingError, EOFError, KeyError),
    ) as error:
        raise ValueError(of + describe_loading_error(name, error)) from error


@contextmanager
def blame_file(file: str, name: str) -> Iterator[None]:
    """Turn any error inside the block into a ValueError that names the config file, whose values must be the cause.

    Errors that explain_loading describes are raised as they are: files that cannot be found or read, and weights of
    other shapes.
    """
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError, SafetensorError, pickle.UnpicklingError, EOFError):
        raise
    except Exception as error:
        if any(text in str(error) for text in ("size mismatch", "ignore_mismatched_sizes", "out of memory")):
            raise
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"A value in {file} of {name} is invalid. Correct it, or save or download the file again. "
            f"{type(error).__name__}: {said}"
        ) from error


def describe_loading_error(name: str, error: Exception) -> str:
    """Say whether the name, the network, the disk or missing access caused the error, as far as the errors show."""
    path, causes = Path(name), [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(*types: type) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes):
        advice = (
            f"The disk is full. Free some space, or set HF_HOME to a folder on another disk (now {constants.HF_HOME})."
        )
    elif path.exists():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:20]) if path.is_dir() else "a file"
        advice = (
            f"{name} must be a folder with config.json, model.safetensors and the processor's files; found: {found}."
        )
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        advice = f"The folder {name} does not exist. Check the path."
    elif caused_by(GatedRepoError):
        advice = f"{name} is gated. Accept its terms on its Hub page, and set HF_TOKEN."
    elif caused_by(RevisionNotFoundError):
        advice = f"{name} is on the Hub, but does not have this revision. Check the revision."
    elif caused_by(RepositoryNotFoundError, HFValidationError):
        advice = (
            f"{name} is not a local folder, and not a model on the Hub that you can access. Check the spelling "
            "(owner/name). If the model is private, set HF_TOKEN."
        )
    elif constants.HF_HUB_OFFLINE:
        advice = (
            f"{name} is not a local folder and not in the cache, and HF_HUB_OFFLINE is set. Unset it, or check the "
            "name."
        )
    elif caused_by(EntryNotFoundError) and not caused_by(LocalEntryNotFoundError):
        advice = f"{name} is on the Hub, but a required file is missing. Check that it is a BLIP checkpoint."
    else:
        advice = (
            f"{name} is not a local folder and not in the cache, and {constants.ENDPOINT} could not be reached. Check "
            "the network, the proxy, HF_ENDPOINT, and the spelling (owner/name)."
        )
    return hide_secrets(f"{advice}\nThe loader said: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
