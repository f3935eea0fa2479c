"""What a trainer does on one device, and on several: where the models lie, how they compute, how gradients and sums are put together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Optional

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor

from tdpo.distributed.sharding import find_blocks, fingerprint, load_weights, shard_scorer
from tdpo.distributed.tensor_parallel import split_matrices, tensor_parallel_plan
from tdpo.distributed.world import World
from tdpo.scoring.scorer import Scorer
from tdpo.utils import DTYPES, full_tensor

Weights = Mapping[str, Callable[[], nn.Module]]  # functions that build {"policy", "reference"} with their weights, called on rank 0


class SingleDevice:
    """One process, on a GPU if there is one, else the CPU.

    Args:
        config: a checked config.
        world: the processes that train together.
    """

    sharded = False  # whether `place` wants models on the meta device, and `weights`

    def __init__(self, config: DictConfig, world: World):
        self.config, self.world = config, world
        mp = config.model.fsdp_policy_mp
        self.compute_dtype = DTYPES[mp] if mp not in (None, config.model.policy_dtype) else None

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        """Raise UserError if this strategy cannot train such a model; weights play no part."""

    @property
    def data_rank(self) -> tuple[int, int]:
        """(i, n): this process works on the i-th of n shards of every batch."""
        return 0, 1

    def place(self, scorer: Scorer, weights: Weights) -> str:
        """Put policy and reference where they will compute, in place.

        Returns:
            a fingerprint of the reference's weights on rank 0, elsewhere or without a reference ''.
        """
        self.scorer = scorer
        identity = "" if scorer.reference is None else fingerprint(scorer.reference)
        scorer.to(self.world.device)
        return identity

    def forward_context(self) -> AbstractContextManager:
        """Return a context in which the policy computes in `compute_dtype`."""
        return cast_parameters(self.scorer.policy, self.compute_dtype)

    def gathered(self) -> AbstractContextManager:
        """Return a context in which policy and reference can be called by themselves."""
        return nullcontext()

    def before_backward(self, is_last: bool) -> None:
        """Prepare a backward pass; `is_last`: of the step's microbatches."""

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum over the processes that have other examples."""
        return sums

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The policy's parameters in groups that an optimizer may treat together."""
        return [list(self.scorer.policy.parameters())]

    def clip_gradient(self, max_norm: float) -> torch.Tensor:
        """Scale the gradient down to max_norm; return its norm before, a scalar on the device."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.scorer.policy.parameters(), max_norm))


class FullySharded(SingleDevice):
    """Several processes, on one or many nodes: each holds a shard of policy, reference, gradients and optimizer state (FSDP2)."""

    sharded = True

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        find_blocks(policy, config.model.block_name)

    @property
    def data_rank(self) -> tuple[int, int]:
        return self.world.rank, self.world.size

    def place(self, scorer: Scorer, weights: Weights) -> str:
        self.scorer = scorer
        model, mesh = self.config.model, self.world.mesh(self.config.parallel.replicas)
        shard_scorer(scorer, mesh, model.block_name, self.compute_dtype, DTYPES[model.policy_dtype])
        load_weights(self.world, scorer.policy, weights["policy"])
        return "" if scorer.reference is None else load_weights(self.world, scorer.reference, weights["reference"])

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.scorer.reshard()  # the scorer's own unit stays gathered after a forward pass

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The scorer's own unit (embeddings, head); blocks are gathered one after another as they compute."""
        self.scorer.unshard()
        try:
            yield
        finally:
            self.scorer.reshard()

    def before_backward(self, is_last: bool) -> None:
        if self.config.parallel.reduce_once_a_step:
            self.scorer.set_requires_gradient_sync(is_last)

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        return self.world.sum(sums)


class TensorParallel(SingleDevice):
    """Several processes that hold and multiply a part of every matrix each, and all work on the whole batch."""

    sharded = True

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        tensor_parallel_plan(policy, world.size)

    def place(self, scorer: Scorer, weights: Weights) -> str:
        self.scorer, mesh = scorer, self.world.mesh()
        partial = split_matrices(scorer.policy, mesh)
        load_weights(self.world, scorer.policy, weights["policy"])
        self.partial = [parameter for name, parameter in scorer.policy.named_parameters() if name in partial]
        if scorer.reference is None:
            return ""
        split_matrices(scorer.reference, mesh)
        return load_weights(self.world, scorer.reference, weights["reference"])

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Split ones, and whole ones: neither optimizers nor norms take both together."""
        groups = [], []
        for parameter in self.scorer.policy.parameters():
            groups[isinstance(parameter, DTensor)].append(parameter)
        return [group for group in groups if group]

    def clip_gradient(self, max_norm: float) -> torch.Tensor:
        for parameter in self.partial:
            self.world.sum(parameter.grad)
        groups = self.parameter_groups()
        norms = [full_tensor(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        return norm


def prepare_blocks(config: DictConfig, policy: nn.Module, reference_model: Optional[nn.Module]) -> None:
    """Turn on activation checkpointing and compilation of the models' blocks, as the config asks for."""
    if config.activation_checkpointing:
        # Its name before Transformers 5.23, and since.
        enable = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if config.compile:
        models = [model for model in (policy, reference_model) if model is not None]
        for block in [block for model in models for block in find_blocks(model, config.model.block_name)]:
            block.compile(dynamic=True)


@contextmanager
def cast_parameters(module: nn.Module, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """Within the block the module computes with copies of its parameters in `dtype`; their gradients reach the originals.

    This is what FSDP's MixedPrecisionPolicy does: weights, gradients and optimizer state keep the parameters' own dtype. Autocast would
    round other things than the reference does, so that log-ratio and KL would not start at 0. Buffers keep their dtype. None: nothing.
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
    """A copy through which gradients flow; where none are wanted, a parameter, by which `generate` tells the module's dtype and device."""
    copy = parameter.to(dtype) if parameter.is_floating_point() else parameter
    return copy if torch.is_grad_enabled() else nn.Parameter(copy, requires_grad=False)
