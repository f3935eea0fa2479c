"""Several processes as one: what they tell each other.

PyTorch's own engine: torch.distributed, over NCCL on GPUs and gloo on CPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Optional, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tdpo.utils import PeerError

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
        self.forward_passes = 0  # that this process has begun; watchdog.py tells by it who is behind
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A group of its own, because the others' short time-out is for the collectives of a step.
        self.long_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(hours=patience)) if size > 1 else None

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
            dist.all_reduce(first_failed, dist.ReduceOp.MIN, group=self.long_timeout_group)
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
            dist.broadcast_object_list(values, group=self.long_timeout_group, group_src=0)
        return values[0]

    def gather(self, value: Any) -> list:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.long_timeout_group)
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
