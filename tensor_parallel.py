"""Tensor parallelism: every matrix split over the ranks, by the model's own plan in Transformers, through PyTorch's DTensor."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from parallel import World, load_weights
from scoring import Scorer
from trainers import BasicTrainer
from utils import UserError, full_tensor

# The names that Transformers gives to ways of splitting a module, as PyTorch's.
TENSOR_PARALLEL_STYLES = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
}


def tensor_parallel_plan(model: nn.Module, n: int) -> tuple[dict[str, str], list[str]]:
    """How to split a model's matrices over n ranks, by its own plan in Transformers.

    Returns:
        the way of splitting by pattern of module names, one of TENSOR_PARALLEL_STYLES; and patterns of whole modules that are applied
        to the heads of a rank alone, so that their gradients must be summed over ranks.

    Raises:
        UserError: the model has no plan, one with other ways of splitting, or heads that do not divide.
    """
    plan, name = dict(getattr(model, "tp_plan", None) or {}), type(model).__name__
    if not any(style.startswith("colwise") for pattern, style in plan.items() if "*" in pattern):
        raise UserError(f"trainer=TensorParallelTrainer: Transformers has no plan that splits the layers of {name}; trainer=FSDPTrainer")
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model.config, key, None)
        if heads is not None and heads % n:
            raise UserError(f"trainer=TensorParallelTrainer: the {heads} {key} of {name} do not divide by {n} processes")
    summed = [pattern for pattern, style in plan.items() if style == "replicated_with_grad_allreduce"]
    whole = list(summed)
    if model.config.tie_word_embeddings:  # one matrix for two uses cannot be split in two ways
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        whole += [name for name, module in model.named_modules() if module in embeddings]
    plan = {pattern: style for pattern, style in plan.items() if pattern not in whole}
    if unknown := sorted(set(plan.values()) - set(TENSOR_PARALLEL_STYLES)):
        raise UserError(f"trainer=TensorParallelTrainer: the plan of {name} has {', '.join(unknown)}, not supported; trainer=FSDPTrainer")
    return plan, summed


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Tensor parallelism in place: each rank holds and multiplies a part of every matrix; what the plan leaves out it has whole.

    Returns:
        names of whole parameters of whose gradient a rank computes but its part: to be summed before they are used.
    """
    plan, summed = tensor_parallel_plan(model, mesh.size())
    parallelize_module(model, mesh, {pattern: TENSOR_PARALLEL_STYLES[style] for pattern, style in plan.items()})
    return [name for name, _ in model.named_parameters() if any(fnmatch(name, f"{pattern}.*") for pattern in summed)]


class TensorParallelTrainer(BasicTrainer):
    """Trains on several devices that hold and multiply a part of every matrix each, and all work on the whole batch."""

    sharded = True

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        tensor_parallel_plan(policy, world.size)

    def place(self, scorer: Scorer, weights: Mapping[str, Callable[[], nn.Module]]) -> Scorer:
        mesh = self.world.mesh()
        partial = split_matrices(scorer.policy, mesh)
        load_weights(self.world, scorer.policy, weights["policy"])
        self.partial = [parameter for name, parameter in scorer.policy.named_parameters() if name in partial]
        if scorer.reference is not None:
            split_matrices(scorer.reference, mesh)
            self.reference_identity = load_weights(self.world, scorer.reference, weights["reference"])
        return scorer

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Split ones, and whole ones: neither optimizers nor norms take both together."""
        groups = [], []
        for parameter in self.policy.parameters():
            groups[isinstance(parameter, DTensor)].append(parameter)
        return [group for group in groups if group]

    def clip_gradient(self) -> torch.Tensor:
        for parameter in self.partial:
            self.world.sum(parameter.grad)
        groups = self.parameter_groups()
        norms = [full_tensor(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, self.config.max_grad_norm, norm)
        return norm
