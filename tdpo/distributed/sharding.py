"""A model sharded over several processes, by PyTorch's own engine: `fully_shard` (FSDP2) and DTensor."""

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


def find_blocks(model: nn.Module, block_name: Optional[str]) -> list[nn.Module]:
    """The model's repeated layers: modules of the class `block_name`, or of those that the model itself declares not to be split.

    Raises:
        UserError: there is none.
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

    A unit is gathered for as long as it computes: each block, the reference's remainder (embeddings, final norm, head), and the scorer
    with the policy's remainder. Gradients are summed over ranks, not averaged: the loss was divided by the global batch's size already.

    Args:
        scorer: a Scorer, with `policy` and `reference` (or None), on any device.
        mesh: see World.mesh.
        block_name: see find_blocks.
        compute_dtype: of the policy's gathered parameters; None: as they are. The reference keeps its own.
        gradient_dtype: in which gradients are summed over ranks.
    """
    if scorer.reference is not None:
        for module in [*find_blocks(scorer.reference, block_name), scorer.reference]:
            fully_shard(module, mesh=mesh)
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=gradient_dtype)
    for module in [*find_blocks(scorer.policy, block_name), scorer]:
        # The scorer's inputs are tokens, and perhaps the reference's states, which keep their own dtype.
        fully_shard(module, mesh=mesh, mp_policy=replace(mixed, cast_forward_inputs=module is not scorer))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else gloo is asked for a scaled sum, which it lacks
    for method in ("reference_states", "both_ways"):
        register_fsdp_forward_method(scorer, method)


@torch.no_grad()
def load_weights(world: World, model: nn.Module, build: Callable[[], nn.Module]) -> str:
    """Fill a sharded model from one that rank 0 builds on its CPU; every rank receives its shards alone.

    Args:
        model: without memory for weights yet (on the meta device).
        build: returns the model with weights; called by rank 0 only.

    Returns:
        the weights' fingerprint on rank 0, elsewhere ''.
    """
    model.to_empty(device=world.device)
    model.tie_weights()  # which becoming real undoes where nothing is sharded
    identity = ""
    with world.agreed():
        if world.is_first:
            whole = build()
            identity = fingerprint(whole)
            source = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for name, parameter in model.named_parameters():
        # Where there is no source the full tensor is never touched, so that it takes no memory on a CPU.
        full = source.pop(name).detach() if world.is_first else torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(full)
            if world.size > 1:
                dist.broadcast(parameter.data, 0)
    for name, buffer in model.named_buffers():  # also those that no checkpoint has, as rotary frequencies
        if world.is_first:
            buffer.copy_(source.pop(name))
        if world.size > 1:
            dist.broadcast(buffer, 0)
    return identity


def fingerprint(model: nn.Module, samples: int = 256) -> str:
    """Tells models apart by their weights: a hash of names, shapes and, of each tensor, evenly spaced elements."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // samples)].to(device="cpu", dtype=torch.float64)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def whole_state(world: World, model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's whole weights on rank 0's CPU; {} on the others. Called by all ranks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state, by_parameter = {}, {}
    for name, tensor in model.state_dict().items():
        key = parameters.get(name, tensor)
        if key not in by_parameter:  # one of tied weights is enough
            whole = full_tensor(tensor)
            by_parameter[key] = whole.cpu() if world.is_first else None
        state[name] = by_parameter[key]
    return state if world.is_first else {}
