"""Mixed precision on one device: a model computes with copies of its weights in another dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import nn


@contextmanager
def cast_parameters(module: nn.Module, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """Let the module compute, within the block, with copies of its parameters in `dtype`; gradients flow to the originals.

    This is what FSDP's MixedPrecisionPolicy does: weights, gradients, optimizer state and buffers keep their own dtype. Autocast would
    round differently from the reference, so that log-ratio and KL would not start at 0.

    Args:
        module: changed in place, and restored at the end of the block.
        dtype: of floating-point parameters; None changes nothing.
    """
    if dtype is None:
        yield
        return
    owners = [(owner, name, p) for owner in module.modules() for name, p in owner.named_parameters(recurse=False)]
    copies = {id(p): _cast(p, dtype) for _, _, p in owners}  # one copy of a tied parameter
    for owner, name, parameter in owners:
        delattr(owner, name)
        setattr(owner, name, copies[id(parameter)])
    try:
        yield
    finally:
        for owner, name, parameter in owners:
            delattr(owner, name)
            owner.register_parameter(name, parameter)


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy through which gradients flow; under no_grad a parameter, from which `generate` reads the module's dtype and device."""
    if not parameter.is_floating_point():  # quantised
        return parameter
    copy = parameter.to(dtype)
    return copy if torch.is_grad_enabled() else nn.Parameter(copy, requires_grad=False)
