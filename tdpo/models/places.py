"""Where models, tokenizers and datasets are: local folders, GGUF files, the Hugging Face hub and its cache."""

import importlib.util
import os
from collections.abc import Iterable
from typing import Optional

import datasets
import huggingface_hub
import transformers
from transformers.utils import cached_file

from tdpo.utils import UserError, get_logger, looks_local, reason_of

log = get_logger(__name__)

transformers.logging.set_verbosity_error()  # this package checks what matters of its advice, and reports it in one line
transformers.logging.disable_progress_bar()

EMBEDDED_TOKENIZER = "reviews"  # model.tokenizer_name_or_path of model=tiny


def prepare_hub(names: Iterable[Optional[str]]) -> None:
    """Use only the local cache if one of these models or datasets is on the hub and the hub cannot be reached.

    Otherwise the hub's client would retry each file for half a minute.

    Args:
        names: local paths, names on the hub, or None.
    """
    remote = [name for name in names if name and name != EMBEDDED_TOKENIZER and not looks_local(name)]
    if not remote or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever HTTP library the hub's client uses
        log.info(f"the Hugging Face hub cannot be reached ({error}): {', '.join(remote)} will be read from the local cache only")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def check_local(names: Iterable[Optional[str]]) -> None:
    """Check that local paths exist, before anything is downloaded.

    Args:
        names: as for `prepare_hub`.

    Raises:
        UserError: one of them does not exist.
    """
    for name in names:
        if name and looks_local(name) and not os.path.exists(name):
            raise UserError(f"'{name}' does not exist; give a local path, or owner/name for a model or dataset on the hub")


def place_of(name: str) -> tuple[str, dict[str, str]]:
    """Return what Transformers loads a model from: (folder, {"gguf_file": file}) for a GGUF file, else (name, {}).

    Raises:
        UserError: it is a GGUF file, and the packages that read one are not installed.
    """
    if not name.endswith(".gguf"):
        return name, {}
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"'{name}' is a GGUF file, which needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    folder, file = os.path.split(name)
    return folder or ".", {"gguf_file": file}


def find_file(source: Optional[str], file: str, cache_dir: Optional[str]) -> Optional[str]:
    """Return the path of a file of a model or tokenizer, in its folder or the cache of downloads; None if it has no such file."""
    if source is None or source == EMBEDDED_TOKENIZER:
        return None
    if os.path.isdir(source):
        path = os.path.join(source, file)
        return path if os.path.isfile(path) else None
    if looks_local(source):  # a GGUF file
        return None
    try:
        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return cached_file(source, file, cache_dir=cache_dir, **options)
    except Exception as error:  # the hub's client raises a dozen types
        log.info(f"{file} of {source} cannot be had: {reason_of(error, 120)}")
        return None
