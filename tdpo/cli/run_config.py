"""The config.yaml of a run, which may come from a stranger: read as plain values, without resolving or executing anything in it."""

import os
import re

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import PositiveInt

from tdpo.cli.schema import Model, Node
from tdpo.losses import Objective, objective_of
from tdpo.utils import CONFIG_DIR, UserError

LARGEST = 2**20  # bytes; a run's config has a few thousand


class _Needed(Node):
    """What the commands read of a run's config, except for datasets and loss."""

    model: Model
    max_length: PositiveInt
    max_prompt_length: PositiveInt
    local_dirs: list[str]


NEEDED = ("model", "datasets", "loss", "max_length", "max_prompt_length", "local_dirs")


def load_run_config(file: str) -> DictConfig:
    """Return the config that a run has saved.

    Values such as ${oc.env:TOKEN} stay text: a run saves no references, and one of a stranger could read this machine's environment.

    Args:
        file: path of config.yaml.

    Raises:
        UserError: it cannot be read, or is not the config of a run.
    """
    try:
        if os.path.getsize(file) > LARGEST:
            raise ValueError("too large")
        with open(file, encoding="utf-8") as handle:
            text = handle.read()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it holds YAML aliases")  # a few lines of which could fill the memory
        values = _literal(OmegaConf.to_container(OmegaConf.create(text), resolve=False))
        if missing := [key for key in NEEDED if key not in values]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        defaults = OmegaConf.load(os.path.join(CONFIG_DIR, "model", "blank_model.yaml"))
        values["model"] = OmegaConf.to_container(OmegaConf.merge(defaults, values["model"]))  # an older run may lack newer keys
        config = OmegaConf.create(values)
        plain = OmegaConf.to_container(config, resolve=True)
        _Needed.model_validate({key: plain[key] for key in _Needed.model_fields})
        return config
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        reason = f"{'.'.join(map(str, problem['loc']))}={problem['input']}: {problem['msg']}"
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"'{file}' is not the config of a run ({reason[:160]})")


def objective_of_run(config: DictConfig) -> Objective:
    """Return the objective of a run's config.

    Raises:
        UserError: this version does not know the loss, or not with these hyperparameters.
    """
    loss = OmegaConf.to_container(config.loss, resolve=True) if OmegaConf.is_dict(config.loss) else config.loss
    try:
        return objective_of(loss, config.get("log_kl", False))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the run's loss={loss} is not one of this version: {type(error).__name__} {error}") from None


def _literal(value):
    """Escape references in all texts of nested lists and dicts, so that they stay text."""
    if isinstance(value, dict):
        return {key: _literal(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_literal(entry) for entry in value]
    # With an even number of backslashes before it, ${ begins a reference.
    return re.sub(r"(?<!\\)((?:\\\\)*)\$\{", r"\1\\${", value) if isinstance(value, str) else value
