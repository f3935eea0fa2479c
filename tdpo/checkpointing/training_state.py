"""What decides a run's future: tensors (weights, optimizer state, random numbers) and Progress; and how it is put back."""

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

from tdpo.checkpointing.checkpoints import PROGRESS, load_tensors, saved_tensors
from tdpo.distributed.world import World
from tdpo.utils import UserError


@dataclass
class Progress:
    """The non-tensor part of a checkpoint, progress.json: counters needed to resume, and what identifies the run."""

    examples: int = 0  # trained on
    previous_examples: int = -1  # `examples` before the last step
    updates: int = 0  # optimizer steps
    skipped_steps: int = 0
    batches: int = 0  # position in the train data
    evaluated_at: int = -1  # `examples` at the last eval
    eval_metrics: dict[str, float] = field(default_factory=dict)  # of the present weights; {} if they were not evaluated
    hooks: dict[str, dict] = field(default_factory=dict)  # state of each hook by its class's name
    ranks: str = ""  # number of processes and kind of device
    wandb_id: Optional[str] = None
    data: dict[str, str] = field(default_factory=dict)  # fingerprint of each split
    reference: dict[str, Optional[str]] = field(default_factory=dict)  # fingerprint of its weights, and the archive they came from
    config: dict[str, Any] = field(default_factory=dict)

    def advance(self, examples: int, took_step: bool) -> None:
        """Count a train step on so many examples; `took_step`: false for a skipped one."""
        self.previous_examples, self.examples = self.examples, self.examples + examples
        self.batches += 1
        self.updates += took_step
        self.skipped_steps += not took_step
        self.eval_metrics = {}  # they were the weights' before this step

    @classmethod
    def of(cls, values: Mapping[str, Any], folder: str) -> "Progress":
        """Read what progress.json of a checkpoint's folder holds, also one from before hooks had a state of their own.

        Raises:
            UserError: it was written by a version of this program that is too different.
        """
        values = dict(values)
        if "hooks" not in values:
            values["hooks"] = {"Stages": {"order": values.pop("order", None)}}
        missing = sorted({entry.name for entry in fields(cls)} - set(values))
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if missing or unknown:
            what = f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(unknown)}"
            raise UserError(f"{folder} was written by another version of this program ({what}): resume it with that version, or start anew")
        return cls(**values)


def read_progress(folder: str) -> Progress:
    """Read what save_checkpoint was given as `progress`. Of a sound checkpoint, see damaged_files.

    Raises:
        UserError: another version of this program wrote it.
    """
    with open(os.path.join(folder, PROGRESS)) as handle:
        return Progress.of(json.load(handle), folder)


def training_tensors(
    world: World, policy: nn.Module, optimizer: torch.optim.Optimizer, moving_reference: Optional[nn.Module]
) -> dict[str, dict]:
    """{"policy": by name, "optimizer": by parameter and kind, "random": of this rank}, sharded where the policy is; where the reference
    moves, also "reference"."""
    names = {parameter: name for name, parameter in policy.named_parameters()}
    state = {
        names[parameter]: {key: value for key, value in values.items() if torch.is_tensor(value)}
        for parameter, values in optimizer.state.items()
    }
    reference = {} if moving_reference is None else {"reference": moving_reference.state_dict()}
    return {"policy": policy.state_dict(), "optimizer": state, "random": {str(world.rank): random_state(world.device)}, **reference}


def restore_tensors(
    world: World, folder: str, policy: nn.Module, optimizer: torch.optim.Optimizer, moving_reference: Optional[nn.Module], with_random: bool
) -> None:
    """The inverse of saving training_tensors in a checkpoint, on any number of ranks; random numbers where `with_random`.

    Raises:
        RunError: the checkpoint holds other tensors.
    """
    if any(name.startswith("optimizer.") for name in saved_tensors(folder)):
        get_optimizer_state_dict(policy, optimizer)  # makes the optimizer's state, which it otherwise does in its first step
    tensors = training_tensors(world, policy, optimizer, moving_reference)
    if not with_random:
        del tensors["random"]
    load_tensors(world, folder, tensors)
    if with_random:
        set_random_state(tensors["random"][str(world.rank)], world.device)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of every generator that a step might use, as tensors."""
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
    """The inverse of random_state."""
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
