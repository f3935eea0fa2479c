"""The optimizer and its learning rate."""

import inspect
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import nn

from tdpo.utils import UserError


def make_optimizer(config: DictConfig, groups: Sequence[Sequence[nn.Parameter]], device: torch.device) -> torch.optim.Optimizer:
    """Build the config's optimizer; on a GPU its fused version, if there is one.

    Args:
        config: a checked config.
        groups: groups of parameters that the optimizer may treat together.
        device: of the parameters.

    Raises:
        UserError: the optimizer does not accept these parameters.
    """
    optimizer = getattr(torch.optim, config.optimizer)
    fused = device.type == "cuda" and "fused" in inspect.signature(optimizer).parameters
    try:
        return optimizer([{"params": list(group)} for group in groups], lr=config.lr, **({"fused": True} if fused else {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer={config.optimizer} does not accept this model's parameters: {error}") from None


def learning_rate(config: DictConfig, updates: int) -> float:
    """Return the learning rate of the step after `updates` optimizer steps: linear warm-up, then constant, as published."""
    return config.lr * min(1.0, (updates + 1) / (config.warmup_steps + 1))
