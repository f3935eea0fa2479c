"""Load a trained model for evaluation: from a run folder, one of its checkpoints, a Hugging Face folder, a GGUF file, or the hub."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from omegaconf import DictConfig, OmegaConf

from tdpo.checkpointing.checkpoints import POLICY, PROGRESS, checkpoint_of
from tdpo.checkpointing.resume import TEMPLATE
from tdpo.checkpointing.training_state import read_progress
from tdpo.cli.check_config import moves_reference
from tdpo.cli.run_config import load_run_config, objective_of_run
from tdpo.data.contract import PAIRS, SFT
from tdpo.distributed.sharding import fingerprint
from tdpo.losses import Objective, get_objective
from tdpo.microbatches import Packing
from tdpo.models.adapters import base_of, is_adapter
from tdpo.models.archive import find_archive
from tdpo.models.build import build_model, check_model, compute_dtype, is_hugging_face, load_model_config, reference_dtype
from tdpo.models.places import find_file, prepare_hub
from tdpo.models.positions import hold_scaling
from tdpo.models.tokenizer import adds_bos, load_tokenizer
from tdpo.scoring.probes import scoring_of
from tdpo.scoring.scorer import Scorer
from tdpo.utils import CONFIG_DIR, UserError, get_local_dir, get_logger, looks_local

log = get_logger(__name__)


class Trained(NamedTuple):
    """Where a model's weights are, and what is known about its training."""

    name: str  # for tables: the path as it was given
    model: DictConfig  # the config's `model`, in which `archive` is the trained weights
    config: Optional[DictConfig]  # of the run; None for a pretrained model
    reference: Optional[DictConfig]  # `model` with the weights that training started from; None: unknown or random
    reference_identity: str = ""  # fingerprint of those weights; "" if the run has recorded none
    checkpoint: str = ""  # its folder; "" for a pretrained model

    def length(self, key: str, given: Optional[int]) -> int:
        """Return `given`, else the run's value, else the default of config/config.yaml.

        Args:
            key: max_length or max_prompt_length.
            given: tokens, or None.
        """
        return given or (OmegaConf.load(os.path.join(CONFIG_DIR, "config.yaml")) if self.config is None else self.config)[key]

    def lengths(self, max_length: Optional[int], max_prompt_length: Optional[int]) -> tuple[int, int]:
        """Return max_length and max_prompt_length in tokens; None takes the value as `length` does.

        Raises:
            UserError: max_prompt_length leaves no room for a response.
        """
        most, prompt = self.length("max_length", max_length), self.length("max_prompt_length", max_prompt_length)
        if prompt >= most:
            raise UserError(f"max_prompt_length={prompt} leaves no room for a response: it must be below max_length={most}")
        return most, prompt

    def datasets(self, given: Optional[DictConfig]) -> dict:
        """Return dataset name -> options: `given`, else the run's datasets.

        Raises:
            UserError: nothing is given, and the model is not that of a run of this program.
        """
        if given is None and self.config is None:
            raise UserError(f"run={self.name} is not a run folder, so its datasets are unknown: give datasets=[...]")
        data = OmegaConf.to_container(self.config.datasets if given is None else given, resolve=True)
        if not isinstance(data, dict) or not all(isinstance(options, dict) and "loader" in options for options in data.values()):
            raise UserError(f"run={self.name} has datasets that are not of this version: give datasets=[...]")
        return data

    def objective(self) -> Optional[Objective]:
        """Return the objective that the model was trained with, if it can be evaluated on plain pairs; None otherwise or if unknown."""
        objective = None if self.config is None else objective_of_run(self.config)
        return objective if objective is not None and objective.roles == PAIRS.roles and not objective.needs_ratings else None

    def moved_its_reference(self) -> bool:
        """Whether training replaced or updated the reference (sDPO, TR-DPO)."""
        return self.config is not None and moves_reference(self.config, objective_of_run(self.config))

    def cache_dir(self) -> str:
        """Return the folder for downloads and tokenized data."""
        return _cache_dir(self.config)

    def on_hub(self) -> list[Optional[str]]:
        """Return the names that may have to be downloaded from the Hugging Face hub."""
        return [self.model.name_or_path, self.model.tokenizer_name_or_path]


def find_trained(path: str) -> Trained:
    """Find the model of a run folder (its newest checkpoint), of one checkpoint (step-N), of a Hugging Face folder or GGUF file, or on the
    Hugging Face hub.

    Args:
        path: the folder or file, or a name on the hub.

    Raises:
        UserError: the path is none of these.
    """
    folder = path.rstrip("/")
    if not os.path.isdir(folder) and not (folder.endswith(".gguf") and os.path.isfile(folder)):
        _check_on_hub(folder)
        return _pretrained(folder)
    if os.path.isfile(folder) or is_hugging_face(folder):
        return _pretrained(folder)
    if is_adapter(folder):
        checkpoint = os.path.dirname(os.path.realpath(folder))
        if checkpoint_of(checkpoint) is None:
            raise UserError(f"run={path} is an adapter without its run: merge it into {base_of(folder)} first, or give a run's checkpoint")
        folder = checkpoint
    checkpoint = folder if os.path.isfile(os.path.join(folder, POLICY)) else checkpoint_of(folder)
    if checkpoint is None:
        raise UserError(f"run={path} is not a run folder, a checkpoint or a Hugging Face folder: '{folder}/LATEST' does not exist")
    checkpoint = os.path.realpath(checkpoint)  # a run that is being trained moves LATEST
    file = os.path.join(os.path.dirname(checkpoint), "config.yaml")
    if not os.path.exists(file):
        raise UserError(f"run={path} is not a run folder, a checkpoint or a Hugging Face folder: '{file}' does not exist")
    config = load_run_config(file)
    model = OmegaConf.merge(config.model, {"archive": find_archive(checkpoint)})
    archive, identity = config.model.archive, ""
    if os.path.exists(os.path.join(checkpoint, PROGRESS)):  # it records an absolute path; config.yaml may hold a relative one
        noted = _reference_of(checkpoint)
        archive, identity = noted["archive"], noted["fingerprint"]
    if config.model.name_or_path is not None:
        model.name_or_path = _base_beside(config.model.name_or_path, checkpoint)
    exported, kept = os.path.join(checkpoint, "hf"), os.path.join(os.path.dirname(checkpoint), TEMPLATE)
    if os.path.isfile(kept):  # as it was in training, whatever has become of the file or the base model
        model.chat_template, model.chat_template_kwargs = kept, None
    if model.chat_template is not None and not os.path.exists(model.chat_template) and os.path.isdir(exported):
        model.tokenizer_name_or_path, model.chat_template, model.chat_template_kwargs = exported, None, None  # it has the template
    archive = os.path.join(os.path.dirname(checkpoint), "base") if model.quantize is not None else archive and _beside(archive, checkpoint)
    # For a loss without reference, the weights that training started from serve as the reference.
    known = objective_of_run(config).roles != SFT.roles and (archive is not None or config.model.from_config is None)
    reference = OmegaConf.merge(model, {"archive": archive}) if known else None
    return Trained(folder, model, config, reference, identity, checkpoint)


def _check_on_hub(name: str) -> None:
    """Raise UserError if the hub, or the cache of its downloads, has no model of a name."""
    if looks_local(name):
        raise UserError(f"run={name}: no such folder")
    prepare_hub([name])
    if find_file(name, "config.json", _cache_dir(None)) is None:
        raise UserError(f"run={name}: no such folder, and no such model on the Hugging Face hub or in its cache")


def _pretrained(name: str) -> Trained:
    """Return a model without a run. Its prompts begin as its tokenizer begins a text, and that of an export does so as its run did."""
    model = OmegaConf.load(os.path.join(CONFIG_DIR, "model", "blank_model.yaml"))
    model.name_or_path = name
    model.add_bos = adds_bos(load_tokenizer(model, _cache_dir(None)))
    return Trained(name, model, None, None)


def _cache_dir(config: Optional[DictConfig]) -> str:
    return get_local_dir(config.local_dirs if config is not None else [".cache"])


def _beside(path: str, checkpoint: str) -> str:
    """Return where a path that a run has recorded is now: if it is gone, under the same names beside the run, as after both were moved.

    A relative path, or a name on the hub, counts as a whole: a folder beside the run may have the last part of a name by chance.
    """
    if os.path.exists(path):
        return path
    parts = pathlib.PurePath(path).parts
    for place in pathlib.Path(checkpoint).parents[1:4]:
        for n in range(len(parts) - 1, 0, -1) if os.path.isabs(path) else [len(parts)]:
            found = place.joinpath(*parts[-n:])
            if found.is_dir() or (n > 1 and found.exists()):
                return str(found)
    return path


def _base_beside(name: str, checkpoint: str) -> str:
    """Return the base model of a run, or, if its folder is gone, what the checkpoint has exported, which has the config and tokenizer."""
    found, exported = _beside(name, checkpoint), os.path.join(checkpoint, "hf")
    if not os.path.exists(name) and os.path.isdir(found) and not is_hugging_face(found):
        found = name  # another folder, such as a run that is called as the model
    if os.path.exists(found) or not looks_local(found):
        return found
    if not os.path.isdir(exported):
        raise UserError(
            f"'{name}', the base model of {os.path.dirname(checkpoint)}, is gone: put it back, or beside the run's folder, or use the "
            "run's last checkpoint, which has its config and tokenizer"
        )
    return exported


def find_all(paths: Union[str, Sequence[str]]) -> list[Trained]:
    """Find the models of a config's `run`, which is one path or a list."""
    return [find_trained(path) for path in ([paths] if isinstance(paths, str) else paths)]


def _reference_of(checkpoint: str) -> dict:
    """Return the archive and fingerprint of the reference that a checkpoint's progress.json records."""
    try:
        noted = read_progress(checkpoint).reference
        return {"archive": noted["archive"], "fingerprint": noted["fingerprint"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"'{os.path.join(checkpoint, PROGRESS)}' is damaged: give another checkpoint") from None


class Inputs(NamedTuple):
    """The models that eval.py or token_report.py compares, and the data and lengths that they share."""

    models: list[Trained]
    data: dict  # dataset name -> options
    lengths: tuple[int, int]  # max_length, max_prompt_length


def find_inputs(config: DictConfig, others_on_hub: Sequence[Optional[str]] = ()) -> Inputs:
    """Find the models, data and lengths that a config names.

    Args:
        config: with run, datasets, max_length, max_prompt_length and out; the first run's data and lengths are used if not given.
        others_on_hub: further names that may have to be downloaded from the Hugging Face hub.

    Raises:
        UserError: see `find_trained`, `Trained`; or `out` cannot be written.
    """
    check_writable(config.out)
    models = find_all(config.run)
    data = models[0].datasets(config.get("datasets"))
    paths = [options.get(key) for options in data.values() for key in ("path", "eval_path")]
    prepare_hub([name for trained in models for name in trained.on_hub()] + paths + list(others_on_hub))
    return Inputs(models, data, models[0].lengths(config.max_length, config.max_prompt_length))


def check_writable(out: Optional[str]) -> None:
    """Check that a file can be written, before the work starts whose result it will hold. Creates it if needed.

    Args:
        out: path of the file; None: nothing is checked.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        return
    try:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        with open(out, "a"):
            pass
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from None


class Loaded(NamedTuple):
    """A trained model and its reference, on the device."""

    policy: torch.nn.Module
    reference: Optional[torch.nn.Module]
    tokenizer: Any
    fast: Union[bool, Packing]  # whether several responses, and several prompts, can be scored in one row, see `token_statistics`


def load_compared(trained: Trained, archive: Optional[str], device: torch.device, max_length: int) -> Loaded:
    """Load the model and its reference.

    Args:
        trained: the model.
        archive: weights of the reference; None: those that the run started from.
        device: where both models run.
        max_length: tokens of prompt and response that the models must accept.

    Raises:
        UserError: weights or tokenizer are missing or do not fit, or the reference's weights have changed since the run started.
    """
    policy, tokenizer = load_trained(trained, device, max_length)
    node = trained.reference if archive is None else OmegaConf.merge(trained.model, {"archive": archive})
    reference = None
    if node is not None:
        if archive is None and trained.moved_its_reference():
            log.info(f"{trained.name}: its reference was updated during training; it is compared with the initial one")
        if archive is None and node.archive is not None and not os.path.exists(node.archive):
            raise UserError(f"run={trained.name}: '{node.archive}', from which it started, does not exist: give reference=<weights>")
        reference = _built(node, trained.cache_dir(), tokenizer, reference_dtype(trained.model), max_length)
        if archive is None and trained.reference_identity not in ("", fingerprint(reference)):
            raise UserError(
                f"run={trained.name}: '{node.archive or node.name_or_path}' no longer holds the weights that this run started from: "
                "give reference=<weights>"
            )
        reference.to(device)
    return Loaded(policy, reference, tokenizer, scoring_of(Scorer(policy, None, get_objective("sft")), max_length))


def load_trained(trained: Trained, device: torch.device, max_length: int = 1, tokenizer: Any = None) -> tuple[torch.nn.Module, Any]:
    """Return (model, tokenizer): the model on the device, without gradients, in the dtype in which it computed during training.

    Args:
        trained: the model.
        device: where it runs.
        max_length: tokens of prompt and response that it must accept.
        tokenizer: if it has been loaded already.

    Raises:
        UserError: weights or tokenizer are missing or do not fit.
    """
    tokenizer = load_tokenizer(trained.model, trained.cache_dir()) if tokenizer is None else tokenizer
    return _built(trained.model, trained.cache_dir(), tokenizer, compute_dtype(trained.model), max_length).to(device), tokenizer


def _built(node: DictConfig, cache_dir: str, tokenizer, dtype: torch.dtype, max_length: int) -> torch.nn.Module:
    model_config = load_model_config(node, tokenizer, cache_dir)
    weights = check_model(node, model_config, tokenizer, max_length)
    built = build_model(node, model_config, dtype, cache_dir, weights)
    hold_scaling(built, max_length)
    return built.eval().requires_grad_(False)
