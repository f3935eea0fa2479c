"""A trained model to look at: of a run's folder, of one of its checkpoints, or of a Hugging Face folder."""

import os
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from omegaconf import DictConfig, OmegaConf

from checkpoints import PROGRESS, read_progress
from models import build_model, check_model, load_model_config, load_tokenizer
from utils import DTYPES, UserError, get_local_dir

BLANK_MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "model", "blank_model.yaml")
LENGTHS = {"max_length": 512, "max_prompt_length": 256}  # as in config/config.yaml


class Trained(NamedTuple):
    """Where a model lies, and what is known of how it was trained."""

    name: str  # for tables: the path as it was given
    model: DictConfig  # the config's node, with model.archive the trained weights
    config: Optional[DictConfig]  # of the run; None for a Hugging Face folder
    reference: Optional[str]  # weights that training started from, and its reference's; None: not known, or random ones

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which the policy computed."""
        return DTYPES[self.model.fsdp_policy_mp or self.model.policy_dtype]

    def length(self, key: str, given: Optional[int]) -> int:
        """max_length or max_prompt_length: what is given, else the run's, else config/config.yaml's default."""
        return given or (LENGTHS[key] if self.config is None else self.config[key])

    def datasets(self, given: Optional[DictConfig]) -> dict:
        """Options of datasets by name: those given, else the run's.

        Raises:
            UserError: neither is there.
        """
        if given is None and self.config is None:
            raise UserError(f"run={self.name} is no run's folder, which would name its data: give datasets=[...]")
        return OmegaConf.to_container(self.config.datasets if given is None else given)

    def cache_dir(self) -> str:
        return get_local_dir(self.config.local_dirs if self.config is not None else [".cache"])


def find_trained(path: str) -> Trained:
    """The model of a run's folder (its newest checkpoint), of one of its checkpoints (step-N), or of a Hugging Face folder.

    Raises:
        UserError: it is none of these.
    """
    folder = path.rstrip("/")
    if not os.path.isdir(folder):
        raise UserError(f"run={path}: no such folder")
    if os.path.exists(os.path.join(folder, "config.json")):
        model = OmegaConf.load(BLANK_MODEL)
        model.name_or_path = folder
        return Trained(folder, model, None, None)
    checkpoint = folder if os.path.exists(os.path.join(folder, "policy.pt")) else os.path.join(folder, "LATEST")
    policy, file = os.path.join(checkpoint, "policy.pt"), os.path.join(os.path.dirname(checkpoint), "config.yaml")
    missing = [name for name in (file, policy) if not os.path.exists(name)]
    if missing:
        raise UserError(f"run={path}: neither a run's folder, nor one of its checkpoints, nor a Hugging Face folder: no {missing[0]}")
    config = OmegaConf.load(file)
    model = OmegaConf.merge(config.model, {"archive": policy})
    reference = config.model.archive
    if os.path.exists(os.path.join(checkpoint, PROGRESS)):  # an absolute path, whatever the folder in which the run was started
        reference = read_progress(checkpoint)["reference"]["archive"]
    return Trained(folder, model, config, reference)


def find_all(paths: Union[str, Sequence[str]]) -> list[Trained]:
    """Of a config's `run`, which is one or several."""
    return [find_trained(path) for path in ([paths] if isinstance(paths, str) else paths)]


def load_trained(trained: Trained, device: torch.device, archive: Optional[str] = None, max_length: int = 1):
    """(model, tokenizer): the model on the device, in the dtype in which it computed, for evaluation.

    Args:
        archive: weights in place of the trained ones: a policy.pt or a Hugging Face folder.
        max_length: tokens that the model must take.

    Raises:
        UserError: weights or tokenizer are not there, or do not fit.
    """
    node = trained.model if archive is None else OmegaConf.merge(trained.model, {"archive": archive})
    cache_dir = trained.cache_dir()
    tokenizer = load_tokenizer(node, cache_dir)
    model_config = load_model_config(node, tokenizer, cache_dir)
    weights = check_model(node, model_config, tokenizer, max_length)
    model = build_model(node, model_config, trained.compute_dtype, cache_dir, weights)
    return model.to(device).eval().requires_grad_(False), tokenizer
