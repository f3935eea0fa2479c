"""Several processes as one: what they tell each other, and a model sharded over them.

PyTorch's own engine throughout: torch.distributed, `fully_shard` (FSDP2) and DTensor, over NCCL on GPUs and gloo on CPUs.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Optional, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tdpo.utils import PeerError, UserError, full_tensor, some_of

T = TypeVar("T")


def is_of_a_collective(error: Optional[BaseException]) -> bool:
    """PyTorch has no one type for what goes wrong between processes."""
    words = ("gloo", "nccl", "connection", "socket", "timed out")
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words))


class World:
    """The processes of a run. Each method that tells the others something is called by all of them, and costs nothing in a world of one.

    Args:
        rank, size: of this process, and how many there are.
        device: on which this process computes.
        timeout: seconds to wait for the others within a step.
        patience: hours to wait for what one process does alone (downloading, tokenizing, writing a checkpoint).
    """

    def __init__(self, rank: int = 0, size: int = 1, device: Optional[torch.device] = None, timeout: float = 600.0, patience: float = 6.0):
        self.rank, self.size, self.timeout = rank, size, timeout
        self.passes = 0  # forward passes that this process has begun; watch.py tells by it who is behind
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A group of its own, because the others' short time-out is for the collectives of a step.
        self.patient_group = dist.new_group(backend="gloo", timeout=timedelta(hours=patience)) if size > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """If the block raises in some process, it raises in all: in the first of those its own error, in the others PeerError."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.size > 1:
            first_failed = torch.tensor(self.size if error is None else self.rank)
            dist.all_reduce(first_failed, dist.ReduceOp.MIN, group=self.patient_group)
            if first_failed.item() not in (self.rank, self.size):
                raise PeerError("another rank could not go on, and says why") from error
        if error is not None:
            raise error

    def from_first(self, function: Callable[[], T]) -> T:
        """What rank 0 makes of the function, in every process; an error there is one everywhere, as in `agreed`."""
        values = [None]
        with self.agreed():
            if self.is_first:
                values = [function()]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.patient_group, group_src=0)
        return values[0]

    def gather(self, value: Any) -> list:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient_group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes of a tensor on the device or the CPU, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, *values: int) -> list[int]:
        """The largest of each value over processes. Over the CPU: does not wait for the device."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def mesh(self, replicas: int = 1) -> DeviceMesh:
        """All processes in a row; for replicas > 1 as (replicas, shards): neighbours hold the shards of one replica."""
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        mesh = init_device_mesh(self.device.type, (replicas, self.size // replicas), mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():  # made with PyTorch's own time-out
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout), group)
        return mesh


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
        scorer: with `policy` and `reference` (or None), on any device.
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
