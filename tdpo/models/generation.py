"""Generation settings of a model: its own, made valid, with the tokens that end a text."""

import copy
import json
from collections.abc import Sequence
from typing import Any, Optional, Union

import transformers
from omegaconf import DictConfig
from torch import nn

from tdpo.models.places import find_file
from tdpo.utils import get_logger

log = get_logger(__name__)

FILE = "generation_config.json"
KEPT = ("do_sample", "bos_token_id", "eos_token_id", "pad_token_id")  # never left out
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # settings that only have an effect in sampling


def own_settings(policy: nn.Module, source: Optional[str], cache_dir: Optional[str]) -> transformers.GenerationConfig:
    """Return the generation settings of the model that training began from; if it has none, those that follow from its config.

    Settings that contradict each other, which Transformers refuses to write, are made valid, and what was changed is said.

    Args:
        policy: the model.
        source: name or folder of the model that training began from; None: random weights.
        cache_dir: of downloads.
    """
    path = find_file(source, FILE, cache_dir)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            return _valid(dict(values), path)
        except (OSError, ValueError, TypeError) as error:
            log.warning(f"{path} cannot be read, so its settings are not used: {' '.join(str(error).split())[:120]}")
    return copy.deepcopy(getattr(policy, "generation_config", None) or transformers.GenerationConfig.from_model_config(policy.config))


def _valid(values: dict[str, Any], path: str) -> transformers.GenerationConfig:
    """Return settings that Transformers writes. Those of Vicuna and Llama 2 have a temperature, but do not sample."""
    if not values.get("do_sample") and values.get("temperature") == 0:
        del values["temperature"]  # greedy, which do_sample says already
    settings = transformers.GenerationConfig()
    for name, value in values.items():  # one by one, because its constructor rejects some that contradict each other
        setattr(settings, name, value)
    if _is_valid(settings):
        return settings
    settings.do_sample = values.get("do_sample", False) or any(name in values for name in SAMPLING)
    if _is_valid(settings):
        return settings
    settings.do_sample, dropped, default = values.get("do_sample", False), [], transformers.GenerationConfig()
    for name in (name for name in values if name not in KEPT and hasattr(default, name)):
        if not _is_valid(settings):
            setattr(settings, name, getattr(default, name))
            dropped.append(name)
    if not _is_valid(settings):
        raise ValueError("settings that contradict each other")
    log.warning(f"{path} has settings that contradict each other: {', '.join(dropped)} left out")
    return settings


def _is_valid(settings: transformers.GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def source_of(model: DictConfig, folder_of_archive: bool) -> Optional[str]:
    """Return the model whose settings and files an export keeps: a Hugging Face folder as archive, else the base model; None: neither.

    Args:
        model: the config's `model`.
        folder_of_archive: whether model.archive is a Hugging Face folder.
    """
    if folder_of_archive:
        return model.archive
    return model.name_or_path if model.from_config is None else None


def ids_of(ends: Union[int, str, Sequence[Union[int, str]], None], tokenizer) -> list[int]:
    """Return the ids of tokens that end a text, which settings may name by id or by text."""
    listed = [] if ends is None else [ends] if isinstance(ends, (int, str)) else list(ends)
    found = [tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end for end in listed]
    return [end for end in found if isinstance(end, int)]
