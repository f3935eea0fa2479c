"""A trained model to look at: of a run's folder, of one of its checkpoints, or of a Hugging Face folder."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from omegaconf import DictConfig, OmegaConf

from tdpo.checkpointing.checkpoints import PROGRESS
from tdpo.checkpointing.training_state import read_progress
from tdpo.data.contract import PAIRS, SFT
from tdpo.distributed.sharding import fingerprint
from tdpo.losses import Objective, get_objective, objective_of
from tdpo.models.build import build_model, check_model, compute_dtype, load_model_config, load_tokenizer, prepare_hub, reference_dtype
from tdpo.scoring.scorer import Scorer, fast_scoring_problem
from tdpo.utils import CONFIG_DIR, UserError, get_local_dir, get_logger

log = get_logger(__name__)


class Trained(NamedTuple):
    """Where a model lies, and what is known of how it was trained."""

    name: str  # for tables: the path as it was given
    model: DictConfig  # the config's node, with model.archive the trained weights
    config: Optional[DictConfig]  # of the run; None for a Hugging Face folder
    reference: Optional[DictConfig]  # the node of the weights that training started from; None: not known, or random ones
    reference_identity: str = ""  # a fingerprint of them; "" where the run has noted none

    def length(self, key: str, given: Optional[int]) -> int:
        """max_length or max_prompt_length: what is given, else the run's, else config/config.yaml's default."""
        return given or (OmegaConf.load(os.path.join(CONFIG_DIR, "config.yaml")) if self.config is None else self.config)[key]

    def lengths(self, max_length: Optional[int], max_prompt_length: Optional[int]) -> tuple[int, int]:
        """Both.

        Raises:
            UserError: they leave no room for a response.
        """
        most, prompt = self.length("max_length", max_length), self.length("max_prompt_length", max_prompt_length)
        if prompt >= most:
            raise UserError(f"max_prompt_length={prompt} leaves no room for a response: it must be below max_length={most}")
        return most, prompt

    def datasets(self, given: Optional[DictConfig]) -> dict:
        """Options of datasets by name: those given, else the run's.

        Raises:
            UserError: neither is there.
        """
        if given is None and self.config is None:
            raise UserError(f"run={self.name} is no run's folder, which would name its data: give datasets=[...]")
        return OmegaConf.to_container(self.config.datasets if given is None else given)

    def objective(self) -> Optional[Objective]:
        """Of pairs alone, with which the model was trained; None where it needs more of the data, or is not known."""
        objective = None if self.config is None else _objective_of(self.config)
        return objective if objective is not None and objective.roles == PAIRS.roles and not objective.needs_ratings else None

    def moved_its_reference(self) -> bool:
        return self.config is not None and (
            _objective_of(self.config).stages > 1 or OmegaConf.select(self.config, "reference.update_every") is not None
        )

    def cache_dir(self) -> str:
        return get_local_dir(self.config.local_dirs if self.config is not None else [".cache"])

    def on_hub(self) -> list[Optional[str]]:
        """What may have to come from there."""
        return [self.model.name_or_path, self.model.tokenizer_name_or_path]


def _objective_of(config: DictConfig) -> Objective:
    return objective_of(OmegaConf.to_container(config.loss), config.get("log_kl", False))


def find_trained(path: str) -> Trained:
    """The model of a run's folder (its newest checkpoint), of one of its checkpoints (step-N), or of a Hugging Face folder.

    Raises:
        UserError: it is none of these.
    """
    folder = path.rstrip("/")
    if not os.path.isdir(folder):
        raise UserError(f"run={path}: no such folder")
    if os.path.exists(os.path.join(folder, "config.json")):
        model = OmegaConf.load(os.path.join(CONFIG_DIR, "model", "blank_model.yaml"))
        model.name_or_path = folder
        return Trained(folder, model, None, None)
    checkpoint = folder if os.path.exists(os.path.join(folder, "policy.pt")) else os.path.join(folder, "LATEST")
    policy, file = os.path.join(checkpoint, "policy.pt"), os.path.join(os.path.dirname(checkpoint), "config.yaml")
    missing = [name for name in (file, policy) if not os.path.exists(name)]
    if missing:
        raise UserError(f"run={path}: neither a run's folder, nor one of its checkpoints, nor a Hugging Face folder: no {missing[0]}")
    config = OmegaConf.load(file)
    model = OmegaConf.merge(config.model, {"archive": policy})
    archive, identity = config.model.archive, ""
    if os.path.exists(os.path.join(checkpoint, PROGRESS)):  # an absolute path, whatever the folder in which the run was started
        noted = read_progress(checkpoint).reference
        archive, identity = noted["archive"], noted["fingerprint"]
    # What a loss without reference has started from will do as well.
    known = _objective_of(config).roles != SFT.roles and (archive is not None or config.model.from_config is None)
    return Trained(folder, model, config, OmegaConf.merge(config.model, {"archive": archive}) if known else None, identity)


def find_all(paths: Union[str, Sequence[str]]) -> list[Trained]:
    """Of a config's `run`, which is one or several."""
    return [find_trained(path) for path in ([paths] if isinstance(paths, str) else paths)]


class Inputs(NamedTuple):
    """What eval.py and token_report.py are given."""

    models: list[Trained]
    data: dict  # options of datasets by name
    lengths: tuple[int, int]  # max_length, max_prompt_length


def find_inputs(config: DictConfig, others_on_hub: Sequence[Optional[str]] = ()) -> Inputs:
    """Of a config with run, datasets, reference, max_length and max_prompt_length; the first run decides what is not given.

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
    """Before the work whose result it is for.

    Raises:
        UserError: this is no place for a file.
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
    """A trained model on the device, and what it started from."""

    policy: torch.nn.Module
    reference: Optional[torch.nn.Module]
    tokenizer: Any
    fast: bool  # whether rows of several responses can be scored, see scoring.token_statistics


def load_compared(trained: Trained, archive: Optional[str], device: torch.device, max_length: int) -> Loaded:
    """The model and its reference: weights of `archive`, else the run's own.

    Raises:
        UserError: weights or tokenizer are not there, do not fit, or are not those that the run started from.
    """
    policy, tokenizer = load_trained(trained, device, max_length)
    node = trained.reference if archive is None else OmegaConf.merge(trained.model, {"archive": archive})
    reference = None
    if node is not None:
        if archive is None and trained.moved_its_reference():
            log.info(f"{trained.name}: its reference has moved while it was trained; it is compared with the one that it started from")
        reference = _built(node, trained.cache_dir(), tokenizer, reference_dtype(trained.model), max_length)
        if archive is None and trained.reference_identity not in ("", fingerprint(reference)):
            raise UserError(
                f"run={trained.name}: {node.archive or node.name_or_path} no longer holds the weights that this run started from: "
                "give reference=<weights>"
            )
        reference.to(device)
    return Loaded(policy, reference, tokenizer, fast_scoring_problem(Scorer(policy, None, get_objective("sft")), max_length) is None)


def load_trained(trained: Trained, device: torch.device, max_length: int = 1) -> tuple[torch.nn.Module, Any]:
    """(model, tokenizer): the model on the device, in the dtype in which it computed, for evaluation.

    Args:
        max_length: tokens that the model must take.

    Raises:
        UserError: weights or tokenizer are not there, or do not fit.
    """
    tokenizer = load_tokenizer(trained.model, trained.cache_dir())
    return _built(trained.model, trained.cache_dir(), tokenizer, compute_dtype(trained.model), max_length).to(device), tokenizer


def _built(node: DictConfig, cache_dir: str, tokenizer, dtype: torch.dtype, max_length: int) -> torch.nn.Module:
    model_config = load_model_config(node, tokenizer, cache_dir)
    weights = check_model(node, model_config, tokenizer, max_length)
    return build_model(node, model_config, dtype, cache_dir, weights).eval().requires_grad_(False)
