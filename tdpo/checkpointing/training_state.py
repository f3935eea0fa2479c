"""What decides a run's future and is a tensor: weights, optimizer state, random numbers; and how it is put back."""

import random
from collections.abc import Mapping
from typing import Optional

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tdpo.checkpointing.checkpoints import load_tensors, saved_tensors
from tdpo.distributed.world import World


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
