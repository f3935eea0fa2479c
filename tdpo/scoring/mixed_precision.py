"""Mixed precision on one device: a model computes with copies of its weights in another dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import nn

# Instructions of x86 processors for products in a dtype, as torch.cpu.get_capabilities names them.
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def slow_dtype(device: torch.device, dtype: torch.dtype) -> str:
    """Say in a line if matrix products in a dtype are no faster than in float32: in bfloat16 or float16 on an x86 processor with AVX2 or
    more, but without instructions for that dtype (docs/speed.md has the times); "" otherwise, or if it cannot be told.

    Args:
        device: that computes.
        dtype: in which it computes.
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of PyTorch
    if device.type != "cpu" or dtype not in INSTRUCTIONS or not has.get("avx2") or any(map(has.get, INSTRUCTIONS[dtype])):
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} is no faster than float32 on this processor, which has no instructions for it, and may take several times as long: "
        "to compute in float32, give model.fsdp_policy_mp=null model.policy_dtype=float32"
    )


@contextmanager
def cast_parameters(module: nn.Module, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """Let the module compute, within the block, with copies of its parameters in `dtype`; gradients are added to the originals'.

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
    """Return a copy; under no_grad a parameter, from which `generate` reads the module's dtype and device.

    The copy is a leaf, and its gradient moves to the parameter as soon as it is complete. A copy that autograd makes would be among the
    first nodes of the graph, whose gradients are passed on last: those of the whole model would live until the end of every backward pass.
    """
    if not parameter.is_floating_point():  # quantised
        return parameter
    copy = parameter.detach().to(dtype)
    if not torch.is_grad_enabled():
        return nn.Parameter(copy, requires_grad=False)
    if parameter.requires_grad:
        copy.requires_grad_().register_post_accumulate_grad_hook(lambda copy: _move_gradient(copy, parameter))
    return copy


@torch.no_grad()
def _move_gradient(copy: torch.Tensor, parameter: nn.Parameter) -> None:
    """Add a copy's gradient to its parameter's, in the parameter's dtype, and free it."""
    if parameter.grad is None:
        parameter.grad = copy.grad.to(parameter.dtype)
    else:
        parameter.grad.add_(copy.grad)
    copy.grad = None
