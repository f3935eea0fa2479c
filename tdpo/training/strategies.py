"""Strategies: what differs between one device and several, such as where models are placed and how gradients and sums are reduced."""

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
from tdpo.models.adapters import has_adapters
from tdpo.models.quantized import follow
from tdpo.scoring.mixed_precision import cast_parameters
from tdpo.scoring.scorer import Scorer
from tdpo.training.compiling import compile_blocks
from tdpo.utils import DTYPES, full_tensor

Weights = Mapping[str, Callable[[], nn.Module]]  # {"policy", "reference"}: functions that build the models, called on rank 0


class SingleDevice:
    """One process, on a GPU if there is one, else on the CPU.

    Args:
        config: a checked config.
        world: the ranks that train together.
    """

    sharded = False  # whether `place` takes models on the meta device, and fills them from `weights`

    def __init__(self, config: DictConfig, world: World):
        self.config, self.world = config, world
        mp = config.model.fsdp_policy_mp
        self.compute_dtype = DTYPES[mp] if mp not in (None, config.model.policy_dtype) else None

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        """Raise UserError if this strategy cannot train such a model. The model may be on the meta device."""

    @property
    def data_rank(self) -> tuple[int, int]:
        """(i, n): this rank works on the i-th of n shards of every batch."""
        return 0, 1

    def place(self, scorer: Scorer, weights: Weights) -> str:
        """Put policy and reference where they will compute, in place.

        Args:
            scorer: holds policy and reference.
            weights: functions that build the models with their weights; used if `sharded`.

        Returns:
            a fingerprint of the weights that do not change, the reference's or those below adapters; '' on ranks other than 0 or if there
            are none.
        """
        self.scorer = scorer
        fixed = scorer.policy if has_adapters(scorer.policy) else scorer.reference
        identity = "" if fixed is None else fingerprint(fixed)
        scorer.to(self.world.device)
        follow(scorer.policy)
        return identity

    def forward_context(self) -> AbstractContextManager:
        """Return a context in which the policy computes in `compute_dtype`."""
        return cast_parameters(self.scorer.policy, self.compute_dtype)

    def gathered(self) -> AbstractContextManager:
        """Return a context in which policy and reference can be called directly, not through the scorer."""
        return nullcontext()

    def before_backward(self, is_last: bool) -> None:
        """Prepare the backward pass of a microbatch; `is_last`: of the step's last one."""

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks that have other examples; the result is the same on all of them.

        Args:
            sums: any shape; may be changed in place.
        """
        return sums

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Return the policy's parameters in groups that an optimizer may treat together."""
        return [[parameter for parameter in self.scorer.policy.parameters() if parameter.requires_grad]]

    def clip_gradient(self, max_norm: float) -> torch.Tensor:
        """Scale the gradient down to norm max_norm if it is larger; return the norm before, a scalar on the device."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.scorer.policy.parameters(), max_norm))


class FullySharded(SingleDevice):
    """Several ranks, on one or more nodes; each holds a shard of policy, reference, gradients and optimizer state (FSDP2)."""

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
        identity = load_weights(self.world, scorer.policy, weights["policy"])
        if has_adapters(scorer.policy):
            return identity
        return "" if scorer.reference is None else load_weights(self.world, scorer.reference, weights["reference"])

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.scorer.reshard()  # the scorer's own unit stays gathered after a forward pass

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather the scorer's own unit (embeddings, head) within the block; transformer blocks are gathered one by one as they compute."""
        self.scorer.unshard()
        try:
            yield
        finally:
            self.scorer.reshard()

    def before_backward(self, is_last: bool) -> None:
        if self.config.parallel.reduce_once_a_step:
            self.scorer.set_requires_gradient_sync(is_last)

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks.

        Args:
            sums: any shape; changed in place.
        """
        return self.world.sum(sums)


class TensorParallel(SingleDevice):
    """Several ranks; each holds a part of every matrix and multiplies with it, and all work on the whole batch."""

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
        """Return whole and split parameters as separate groups: neither optimizers nor norms accept both together."""
        groups = [], []
        for parameter in self.scorer.policy.parameters():
            groups[isinstance(parameter, DTensor)].append(parameter)
        return [group for group in groups if group]

    def clip_gradient(self, max_norm: float) -> torch.Tensor:
        for parameter in self.partial:  # each rank has computed only a part of their gradients
            self.world.sum(parameter.grad)
        groups = self.parameter_groups()
        norms = [full_tensor(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        return norm


def prepare_blocks(config: DictConfig, policy: nn.Module, reference_model: Optional[nn.Module]) -> None:
    """Turn on activation checkpointing and compile the models' blocks, in place, if the config asks for it."""
    if config.activation_checkpointing:
        # Transformers 5.23 renamed gradient_checkpointing_enable.
        enable = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if config.compile:
        models = [model for model in (policy, reference_model) if model is not None and not hasattr(model, "is_policy")]
        compile_blocks(block for model in models for block in find_blocks(model, config.model.block_name))


def without_randomness(policy: nn.Module) -> None:
    """Put a model into the mode in which it is trained: as in evaluation, so that it draws nothing (dropout, noise of routers, dropped
    layers) and agrees with the reference; only blocks whose activations are checkpointed are told that they train."""
    policy.eval()
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of this module alone, not of those inside
