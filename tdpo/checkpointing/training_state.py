"""The state of a run that resuming needs, saved and restored: tensors (weights, optimizer state, random states) and Progress."""

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tdpo.checkpointing.checkpoints import PROGRESS
from tdpo.checkpointing.state_reader import load_tensors, saved_tensors
from tdpo.distributed.world import World
from tdpo.utils import UserError
from tdpo.weights import is_adapter_name


@dataclass
class Progress:
    """The non-tensor part of a checkpoint, progress.json: counters needed to resume, and what identifies the run."""

    examples: int = 0  # train examples so far
    previous_examples: int = -1  # `examples` before the last step; -1 before the first
    updates: int = 0  # optimizer steps taken
    skipped_steps: int = 0  # because loss or gradient was not finite
    batches: int = 0  # position in the train data
    evaluated_at: int = -1  # `examples` at the last eval; -1 before the first
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the current weights; {} if they were not evaluated
    hooks: dict[str, dict] = field(default_factory=dict)  # state of each hook, by class name
    ranks: str = ""  # number of processes and kind of device
    wandb_id: Optional[str] = None
    data: dict[str, str] = field(default_factory=dict)  # fingerprint of each split
    reference: dict[str, Optional[str]] = field(default_factory=dict)  # fingerprint of its weights, and the archive they came from
    config: dict[str, Any] = field(default_factory=dict)

    def advance(self, examples: int, took_step: bool) -> None:
        """Count a train step.

        Args:
            examples: size of the step's global batch.
            took_step: false if the step was skipped.
        """
        self.previous_examples, self.examples = self.examples, self.examples + examples
        self.batches += 1
        self.updates += took_step
        self.skipped_steps += not took_step
        self.eval_metrics = {}  # they belong to the weights before this step

    @classmethod
    def of(cls, values: Mapping[str, Any], folder: str) -> "Progress":
        """Build a Progress from the content of progress.json, also if it was written before hooks had a state of their own.

        Args:
            values: the content of progress.json.
            folder: the checkpoint's folder, for the error message.

        Raises:
            UserError: an incompatible version of this program wrote it.
            ValueError: a value is of another type than this program writes.
        """
        values = dict(values)
        if "hooks" not in values:
            values["hooks"] = {"Stages": {"order": values.pop("order", None)}}
        missing = sorted({entry.name for entry in fields(cls)} - set(values))
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if missing or unknown:
            what = f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(unknown)}"
            raise UserError(f"{folder} was written by another version of this program ({what}): resume it with that version or start again")
        progress = cls(**values)
        wrong = [name for name, default in vars(cls()).items() if default is not None and type(values[name]) is not type(default)]
        if wrong or not {"train", "eval"} <= set(progress.data) or not {"fingerprint", "archive"} <= set(progress.reference):
            raise ValueError(f"{folder} has a {PROGRESS} that this program did not write")
        return progress


def read_progress(folder: str) -> Progress:
    """Read the Progress of a checkpoint, which must be undamaged (see damaged_files).

    Raises:
        UserError: an incompatible version of this program wrote it.
        ValueError: it is not what this program writes.
    """
    with open(os.path.join(folder, PROGRESS)) as handle:
        return Progress.of(json.load(handle), folder)


def training_tensors(
    world: World, policy: nn.Module, optimizer: torch.optim.Optimizer, moving_reference: Optional[nn.Module]
) -> dict[str, dict]:
    """Return the tensors of a checkpoint, sharded if the policy is.

    Args:
        moving_reference: the reference if its weights change, else None.

    Returns:
        {"policy": by name, with adapters theirs only, "optimizer": by parameter and kind, "random": of this rank}; with a moving reference
        that has weights of its own also "reference".
    """
    names = {parameter: name for name, parameter in policy.named_parameters()}
    # bitsandbytes counts its steps in an int.
    state = {
        names[parameter]: {
            key: value if torch.is_tensor(value) else torch.tensor(value) for key, value in values.items() if value is not None
        }
        for parameter, values in optimizer.state.items()
    }
    of_reference = {} if moving_reference is None else moving_reference.state_dict()
    reference = {"reference": of_reference} if of_reference else {}  # a second adapter is in the policy's own state
    weights = policy.state_dict()
    trained = {name: tensor for name, tensor in weights.items() if is_adapter_name(name)} or weights
    return {"policy": trained, "optimizer": state, "random": {str(world.rank): random_state(world.device)}, **reference}


def restore_tensors(
    world: World, folder: str, policy: nn.Module, optimizer: torch.optim.Optimizer, moving_reference: Optional[nn.Module], with_random: bool
) -> None:
    """Load the training_tensors of a checkpoint, which any number of ranks may have written, into policy, optimizer and reference.

    Args:
        folder: the checkpoint's folder.
        policy, optimizer, moving_reference: changed in place, see training_tensors.
        with_random: also restore this rank's random state, which needs the same number of ranks and kind of device.

    Raises:
        RunError: the checkpoint holds other tensors.
    """
    if any(name.startswith("optimizer.") for name in saved_tensors(folder)):
        get_optimizer_state_dict(policy, optimizer)  # creates the optimizer's state, which is otherwise created in the first step
    tensors = training_tensors(world, policy, optimizer, moving_reference)
    if not with_random:
        del tensors["random"]
    load_tensors(world, folder, tensors)
    names = {name: parameter for name, parameter in policy.named_parameters()}
    for name, values in tensors["optimizer"].items():
        own = optimizer.state[names[name]]
        own.update({key: value.item() for key, value in values.items() if own[key] is not value})
    if with_random:
        set_random_state(tensors["random"][str(world.rank)], world.device)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of every random number generator that a step might use, as tensors on the CPU."""
    _, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the random number generators.

    Args:
        state: one-dimensional or scalar tensors by generator, as random_state returns them.
        device: the device of this rank.
    """
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
