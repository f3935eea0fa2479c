"""Shard models over several ranks with PyTorch's `fully_shard` (FSDP2) and DTensor."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Optional

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tdpo.distributed.world import World
from tdpo.utils import UserError, full_tensor, some_of
from tdpo.weights import plain_weights, without_adapters


def find_blocks(model: nn.Module, block_name: Optional[str]) -> list[nn.Module]:
    """Return the model's repeated layers: modules of class `block_name`, or, if that is None, of the model's own `_no_split_modules`.

    Raises:
        UserError: the model has no such module.
    """
    names = {block_name} if block_name else set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if blocks:
        return blocks
    lists = {type(child).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for child in module}
    hint = f"; its layers are {some_of(sorted(lists))}" if lists else ""
    raise UserError(f"model.block_name={block_name}: {type(model).__name__} has no such module{hint}")


def shard_scorer(
    scorer: nn.Module, mesh: DeviceMesh, block_name: Optional[str], compute_dtype: Optional[torch.dtype], gradient_dtype: torch.dtype
) -> None:
    """Shard policy and reference in place, over the mesh's last dimension.

    FSDP gathers parameters unit by unit, as they compute. The units are each block, the rest of the reference (embeddings, final norm,
    head), and the scorer with the rest of the policy. Gradients are summed over ranks, not averaged, because the loss is already divided
    by the size of the global batch.

    Args:
        scorer: a Scorer, with `policy` and `reference` (or None), on any device.
        mesh: see World.mesh.
        block_name: see find_blocks.
        compute_dtype: dtype of the policy's gathered parameters; None: unchanged. The reference keeps its own dtype.
        gradient_dtype: dtype in which gradients are summed over ranks.
    """
    if scorer.reference is not None and not hasattr(scorer.reference, "is_policy"):
        for module in [*find_blocks(scorer.reference, block_name), scorer.reference]:
            fully_shard(module, mesh=mesh)
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=gradient_dtype)
    blocks = find_blocks(scorer.policy, block_name)
    for module in [*blocks, scorer]:
        # The scorer's inputs are tokens, and possibly cached states of the reference, which must keep their dtype.
        fully_shard(module, mesh=mesh, mp_policy=replace(mixed, cast_forward_inputs=module is not scorer))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # otherwise FSDP asks gloo for a scaled sum, which gloo lacks
    # Left to itself FSDP gathers, during a block's backward pass, what was computed before it, the reference's blocks too.
    for module, before in zip([scorer, *reversed(blocks)], [*reversed(blocks), scorer]):  # the scorer is gathered by then
        module.set_modules_to_backward_prefetch([before])
    for method in ("reference_states", "logits_of_all", "both_ways"):
        register_fsdp_forward_method(scorer, method)


@torch.no_grad()
def load_weights(world: World, model: nn.Module, build: Callable[[], nn.Module]) -> str:
    """Fill a sharded model with the weights of one that rank 0 builds on its CPU; each rank receives only its shards. Called by all ranks.

    Args:
        model: the sharded model, on the meta device (without memory for weights).
        build: returns the model with weights; called on rank 0 only.

    Returns:
        the fingerprint of the weights on rank 0, '' on the other ranks.
    """
    model.to_empty(device=world.device)
    model.tie_weights()  # to_empty unties weights where nothing is sharded
    identity = ""
    with world.agreed():
        if world.is_first:
            whole = build()
            identity = fingerprint(whole)
            source = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for name, parameter in model.named_parameters():
        # On the other ranks the full tensor is never touched, so it takes no memory on a CPU.
        full = source.pop(name).detach() if world.is_first else torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(full)
            if world.size > 1:
                dist.broadcast(parameter.data, 0)
    for name, buffer in model.named_buffers():  # including buffers that no checkpoint has, such as rotary frequencies
        if world.is_first:
            buffer.copy_(source.pop(name))
        if world.size > 1:
            dist.broadcast(buffer, 0)
    return identity


def fingerprint(model: nn.Module, samples: int = 256) -> str:
    """Return a hash that identifies a model's weights: names, shapes, dtypes and about `samples` evenly spaced elements of each tensor.

    Adapters do not count: with them it identifies the frozen weights, by the names of the model without adapters; quantised weights count
    as what they are dequantised to.
    """
    parts = {}
    for name, tensor in plain_weights(model):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // samples)].to(device="cpu", dtype=torch.float64)
        parts[name] = f"{tuple(tensor.shape)} {tensor.dtype}".encode() + some.numpy().tobytes()
    digest = hashlib.sha256()
    for name, part in sorted(without_adapters(parts).items()):
        digest.update(f"{name} ".encode() + part)
    return digest.hexdigest()


def whole_state(world: World, model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Return a model's full state dict, dequantised, on rank 0's CPU, {} on the other ranks. Called by all ranks.

    Args:
        wanted: which names to return.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state, by_parameter = {}, {}
    for name, tensor in plain_weights(model, wanted):
        key = parameters.get(name, tensor)
        if key not in by_parameter:  # gather tied weights only once
            whole = full_tensor(tensor)
            by_parameter[key] = whole.cpu() if world.is_first else None
        state[name] = by_parameter[key]
    return state if world.is_first else {}
