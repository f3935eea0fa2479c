"""The processes (ranks) of a run and what they exchange, over torch.distributed: NCCL on GPUs, gloo on CPUs."""

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
    """Whether an error comes from communication between processes, for which PyTorch has no single type."""
    words = ("gloo", "nccl", "connection", "socket", "timed out")
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words))


class World:
    """The processes of a run. Methods that exchange data must be called by all ranks; with one process they cost nothing.

    Args:
        rank, size: rank of this process, and number of processes.
        device: device on which this process computes; by default a GPU if there is one, else the CPU.
        timeout: seconds to wait for the other ranks within a step.
        patience: hours to wait while one rank works alone (downloading, tokenizing, writing a checkpoint).
    """

    def __init__(self, rank: int = 0, size: int = 1, device: Optional[torch.device] = None, timeout: float = 600.0, patience: float = 6.0):
        self.rank, self.size, self.timeout = rank, size, timeout
        self.forward_passes = 0  # begun by this process; watchdog.py compares them to find a rank that is behind
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A separate group, because the default group's short timeout is for the collectives of a step.
        self.long_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(hours=patience)) if size > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """If the block raises on any rank, raise on all: the lowest failing rank raises its own error, all others PeerError."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.size > 1:
            first_failed = torch.tensor(self.size if error is None else self.rank)
            dist.all_reduce(first_failed, dist.ReduceOp.MIN, group=self.long_timeout_group)
            if first_failed.item() not in (self.rank, self.size):
                raise PeerError("another rank failed and reports why") from error
        if error is not None:
            raise error

    def from_first(self, function: Callable[[], T]) -> T:
        """Call the function on rank 0 and return its result on every rank. If it raises, all ranks raise, as in `agreed`."""
        values = [None]
        with self.agreed():
            if self.is_first:
                values = [function()]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.long_timeout_group, group_src=0)
        return values[0]

    def gather(self, value: Any) -> list:
        """Return the values of all processes, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.long_timeout_group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place.

        Args:
            values: on the device or the CPU, of any shape that is the same on all ranks.

        Returns:
            values.
        """
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes. Communicates on the CPU, so it does not wait for the device."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def mesh(self, replicas: int = 1) -> DeviceMesh:
        """Return a mesh of all processes: one-dimensional, or (replicas, shards) if replicas > 1; neighbours shard the same replica."""
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        mesh = init_device_mesh(self.device.type, (replicas, self.size // replicas), mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():  # PyTorch creates them with its own default timeout
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout), group)
        return mesh
