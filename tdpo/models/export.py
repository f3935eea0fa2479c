"""Export of a policy as a Hugging Face folder that other programs load, with names, settings and files as its base model has them."""

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
import transformers
import yaml
from omegaconf import DictConfig
from torch import nn

from tdpo.data.chat_template import end_tokens
from tdpo.models.adapters import has_adapters
from tdpo.models.build import empty_model
from tdpo.models.generation import ids_of, own_settings, source_of
from tdpo.models.places import find_file
from tdpo.models.tokenizer import TOKENIZER_FILES, with_bos
from tdpo.utils import get_logger

log = get_logger(__name__)


# Files of models for text and images, which their training on text does not change.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def export_policy(
    policy: nn.Module, tokenizer, folder: str, state: Mapping[str, torch.Tensor], model: DictConfig, cache_dir: Optional[str], card: str
) -> None:
    """Write policy and tokenizer into a Hugging Face folder.

    Args:
        policy: a causal language model of Transformers; its tensors are not used.
        tokenizer: with which it was trained.
        folder: to be made.
        state: the policy's whole state dict.
        model: the config's `model`, which names the model that training began from.
        cache_dir: of downloads.
        card: text of the folder's README.md.
    """
    policy = _without_layers(policy)
    source = _source(model)
    settings = own_settings(policy, source, cache_dir)
    ends = [*ids_of(settings.eos_token_id, tokenizer), *ids_of(getattr(policy.config, "eos_token_id", None), tokenizer)]
    ends = list(dict.fromkeys([*ends, *end_tokens(tokenizer)]))
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    with _replaced(policy, settings, ends):
        policy.save_pretrained(folder, state_dict=dict(state), is_main_process=True)
    _add_older_keys(os.path.join(folder, "config.json"), type(policy.config))
    with_bos(tokenizer, model.add_bos).save_pretrained(folder)
    _note_bos(os.path.join(folder, "tokenizer_config.json"), model.add_bos)
    for file in TOKENIZER_FILES:
        _copy(model.tokenizer_name_or_path or source, file, folder, cache_dir)
    for file in PROCESSOR_FILES:
        _copy(source, file, folder, cache_dir)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as handle:
        handle.write(card)


def _without_layers(policy: nn.Module) -> nn.Module:
    """Return a model without adapters' layers, and without weights, that Transformers saves as it would the policy's own class."""
    if not has_adapters(policy):
        return policy
    plain = empty_model(policy.config)
    plain.generation_config = policy.generation_config
    if hasattr(policy, "_weight_conversions"):
        plain._weight_conversions = policy._weight_conversions
    return plain


def _source(model: DictConfig) -> Optional[str]:
    return source_of(model, model.archive is not None and os.path.isfile(os.path.join(model.archive, "config.json")))


def model_card(config: DictConfig, progress: Mapping[str, Any], command: str, cache_dir: Optional[str]) -> str:
    """Return the text of a model card.

    Args:
        config: the run's.
        progress: what progress.json holds.
        command: with which the run was started; '' if that is not known.
        cache_dir: of downloads, among which the base model's own card is looked for.
    """
    licence = _licence_of(_source(config.model), cache_dir)
    base = config.model.name_or_path or f"random weights ({config.model.from_config.get('model_type')})"
    on_hub = config.model.name_or_path and not os.path.exists(config.model.name_or_path)
    entries = {"library_name": "transformers", "tags": ["tdpo"], **({"base_model": base} if on_hub else {})}
    head = yaml.safe_dump({**entries, **({"license": licence} if licence else {})}, sort_keys=False).splitlines()
    loss = ", ".join(f"{key} {value}" for key, value in config.loss.items() if key != "name")
    data = ", ".join(f"{name} ({node.get('path') or 'generated'})" for name, node in config.datasets.items())
    lines = [
        f"# {config.exp_name}",
        "",
        f"- base model: {base}" + ("" if licence else "; its licence is not known here"),
        f"- weights that training began from: {config.model.archive or 'those of the base model'}",
        f"- loss: {config.loss.name}" + (f" ({loss})" if loss else ""),
        f"- data: {data}",
        f"- {progress['examples']:,} train examples, {progress['updates']:,} updates, {config.optimizer} with lr {config.lr:g}",
        f"- prompts begin with the beginning-of-sequence token: {'yes' if config.model.add_bos else 'only where the text has it'}",
    ]
    if command:
        lines += ["", "```", command, "```"]
    metrics = [f"| {name} | {value:.4g} |" for name, value in progress["eval_metrics"].items() if isinstance(value, (int, float))]
    if metrics:
        lines += ["", "| metric of the eval split | value |", "|---|---|", *metrics]
    return "\n".join(["---", *head, "---", "", *lines, ""])


def _licence_of(source: Optional[str], cache_dir: Optional[str]) -> Optional[str]:
    """Return the licence that a model's own card names; None if there is none."""
    path = find_file(source, "README.md", cache_dir)
    if path is None:
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(2**16)
    parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        licence = (yaml.safe_load(parts[1]) or {}).get("license")
    except (yaml.YAMLError, AttributeError):
        return None
    licence = licence[0] if isinstance(licence, list) and licence else licence
    return licence.strip() if isinstance(licence, str) and licence.strip() else None


@contextmanager
def _replaced(policy: nn.Module, settings: transformers.GenerationConfig, ends: list[int]) -> Iterator[None]:
    """Within the block, give the model these generation settings, and the end-of-sequence tokens in its config."""
    config, own = policy.config, getattr(policy, "generation_config", None)
    before = getattr(config, "eos_token_id", None)
    policy.generation_config, config.eos_token_id = settings, ends[0] if len(ends) == 1 else ends
    try:
        yield
    finally:
        policy.generation_config, config.eos_token_id = own, before


def _add_older_keys(path: str, config_class: type[transformers.PreTrainedConfig]) -> None:
    """Add to config.json the names that programs and versions of Transformers before 5 read, but none by which this version would read
    another config: some classes prefer the older names, or reject them."""
    with open(path) as file:
        values = json.load(file)
    values.pop("auto_map", None)  # names code of the base model's repository, which is not copied
    expected = _read_config(values, config_class)
    for part in (values, values.get("text_config") or {}):
        for key, value in _older_keys(part).items():
            part[key] = value
            found = _read_config(values, config_class)
            if found is None or any(found.get(name) != entry for name, entry in (expected or {}).items()):
                del part[key]
    with open(path, "w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def _read_config(values: Mapping[str, Any], config_class: type[transformers.PreTrainedConfig]) -> Optional[dict[str, Any]]:
    """Return what Transformers makes of the content of a config.json; None if it rejects it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the older names
            return config_class.from_dict(copy.deepcopy(dict(values))).to_dict()
    except Exception:  # configs of Transformers raise errors of many types
        return None


def _older_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older names, with their values, that the content of a config.json lacks."""
    older = {"torch_dtype": values["dtype"]} if "dtype" in values else {}
    rope = values.get("rope_parameters")
    if isinstance(rope, Mapping):
        if isinstance(rope.get("sliding_attention"), Mapping):  # one set a kind of layer, as Gemma 3
            older["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
            rope = rope.get("full_attention") or {}
        older |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if values.get("model_type") in ("gpt_neox", "gpt_neox_japanese"):
            older |= {"rotary_pct": rope.get("partial_rotary_factor"), "rotary_emb_base": rope.get("rope_theta")}
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        scaled = scaling.get("rope_type", "default") != "default"
        older["rope_scaling"] = {**scaling, "type": scaling["rope_type"]} if scaled else None
    return {key: value for key, value in older.items() if key not in values}


def _note_bos(path: str, add_bos: bool) -> None:
    """Write into tokenizer_config.json whether prompts began with the beginning-of-sequence token."""
    with open(path) as file:
        values = json.load(file)
    values["add_bos_token"] = add_bos
    with open(path, "w") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _copy(source: Optional[str], file: str, folder: str, cache_dir: Optional[str]) -> None:
    target = os.path.join(folder, file)
    if not os.path.exists(target) and (path := find_file(source, file, cache_dir)) is not None:
        shutil.copyfile(path, target)
