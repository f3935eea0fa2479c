"""Tensor parallelism: split every matrix over the ranks with PyTorch's DTensor, by the plan that Transformers has for the model."""

from fnmatch import fnmatch

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tdpo.utils import UserError

# Transformers' names of the ways to split a module (styles), and PyTorch's equivalents.
TENSOR_PARALLEL_STYLES = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
}


def tensor_parallel_plan(model: nn.Module, n: int) -> tuple[dict[str, str], list[str]]:
    """Return how to split a model's matrices over n ranks, by its plan in Transformers.

    Returns:
        the style (a key of TENSOR_PARALLEL_STYLES) for each pattern of module names; and patterns of replicated modules that each rank
        applies only to its own heads, so that their gradients must be summed over ranks.

    Raises:
        UserError: the model has no plan, its plan has unsupported styles, or its numbers of heads are not divisible by n.
    """
    plan, name = dict(getattr(model, "tp_plan", None) or {}), type(model).__name__
    if not any(style.startswith("colwise") for pattern, style in plan.items() if "*" in pattern):
        raise UserError(
            f"trainer=TensorParallelTrainer: Transformers has no plan that splits the layers of {name}; use trainer=FSDPTrainer"
        )
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model.config, key, None)
        if heads is not None and heads % n:
            raise UserError(
                f"trainer=TensorParallelTrainer: the {heads} {key} of {name} are not divisible by {n} processes; "
                "use a number of processes that divides them, or trainer=FSDPTrainer"
            )
    summed = [pattern for pattern, style in plan.items() if style == "replicated_with_grad_allreduce"]
    whole = list(summed)
    if model.config.tie_word_embeddings:  # a matrix with two uses cannot be split in two ways
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        whole += [name for name, module in model.named_modules() if module in embeddings]
    plan = {pattern: style for pattern, style in plan.items() if pattern not in whole}
    if unknown := sorted(set(plan.values()) - set(TENSOR_PARALLEL_STYLES)):
        raise UserError(
            f"trainer=TensorParallelTrainer: the plan of {name} has unsupported styles ({', '.join(unknown)}); use trainer=FSDPTrainer"
        )
    return plan, summed


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Split a model's matrices over the ranks, in place: each rank holds and multiplies its part. Modules outside the plan are replicated.

    Returns:
        names of replicated parameters whose gradients are partial on each rank and must be all-reduced before use.
    """
    plan, summed = tensor_parallel_plan(model, mesh.size())
    parallelize_module(model, mesh, {pattern: TENSOR_PARALLEL_STYLES[style] for pattern, style in plan.items()})
    return [name for name, _ in model.named_parameters() if any(fnmatch(name, f"{pattern}.*") for pattern in summed)]
