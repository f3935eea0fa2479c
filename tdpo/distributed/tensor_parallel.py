"""Tensor parallelism: every matrix split over the ranks, by the model's own plan in Transformers, through PyTorch's DTensor."""

from fnmatch import fnmatch

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tdpo.utils import UserError

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
