"""Optimizers: those of torch.optim, and those of bitsandbytes whose state has 8 bits a number. This file imports torch alone."""

import importlib.util
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tdpo.utils import UserError, nearest

# Classes of torch.optim that cannot train a model from dense gradients: the base class, and those that need a closure, sparse gradients
# or only matrices.
UNSUITABLE = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in UNSUITABLE
)
WHOLE = ("Adafactor", "Rprop")  # those that PyTorch cannot run on sharded weights
# Those of bitsandbytes that have been trained with and resumed here.
EIGHT_BIT = ("AdEMAMix8bit", "Adagrad8bit", "Adam8bit", "AdamW8bit", "LAMB8bit", "LARS8bit", "Lion8bit", "RMSprop8bit", "SGD8bit")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of an optimizer.

    Raises:
        UserError: it is one of bitsandbytes', which is not installed.
    """
    if name not in EIGHT_BIT:
        return getattr(torch.optim, name)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"optimizer={name} needs bitsandbytes: pip install bitsandbytes, or use optimizer={name.removesuffix('8bit')}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it prints a line when it is imported
    import bitsandbytes  # here, because it is optional

    return getattr(bitsandbytes.optim, name)


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of an optimizer by name, without the weights and the learning rate, which the training loop gives."""
    found = inspect.signature(optimizer_class(name)).parameters
    return {key: parameter for key, parameter in found.items() if key not in ("params", "lr")}


def own_weight_decay(name: str) -> float:
    """Return the weight decay that an optimizer has by its own default: 0.01 for AdamW; 0 where it has none."""
    parameter = _parameters(name).get("weight_decay")
    return 0.0 if parameter is None else float(parameter.default)


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which an optimizer is built, except for weights and learning rate.

    Args:
        name: of the optimizer.
        options: config.optimizer_options; lists become tuples. Without weight_decay it is 0, for every optimizer that has it.
    """
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return {**({"weight_decay": 0.0} if "weight_decay" in _parameters(name) else {}), **given}


def option_problems(name: str, options: Mapping[str, Any]) -> list[str]:
    """Return a line for each option that an optimizer does not take, as its signature and one step with a small weight show.

    Args:
        name: of the optimizer.
        options: config.optimizer_options.
    """
    try:
        known = _parameters(name)
    except UserError as error:
        return [str(error)]
    problems = []
    for key in options:
        if key in ("lr", "params"):
            problems.append(f"optimizer_options.{key}: {'set lr' if key == 'lr' else 'the weights are those of the model'}; leave it out")
        elif key not in known:
            problems.append(f"optimizer_options.{key}: {name} has no such argument{nearest(key, known)}; it has {', '.join(known)}")
    if problems:
        return problems
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones_like(weight)
    try:
        built = optimizer_class(name)([weight], lr=1e-3, **complete_options(name, options))
        if not any(options.get(key) for key in ("capturable", "fused")):  # which may need a GPU
            built.step()
    except Exception as error:  # each optimizer checks its arguments in its own way, if at all
        return [f"optimizer_options={dict(options)}: {name} refuses this: {' '.join(str(error).split())[:200] or type(error).__name__}"]
    return [] if weight.isfinite().all() else [f"optimizer_options={dict(options)}: a step of {name} gives weights that are not finite"]


def make_optimizer(
    name: str,
    groups: Sequence[Sequence[nn.Parameter]],
    lr: float,
    options: Mapping[str, Any],
    decays_vectors: bool = True,
    device: Optional[torch.device] = None,
) -> torch.optim.Optimizer:
    """Build an optimizer, in the implementation that suits the weights (see `_implementation`), if the options do not choose one.

    Args:
        name: of the optimizer.
        groups: groups of parameters that the optimizer may treat together.
        lr: learning rate until the training loop sets one.
        options: config.optimizer_options, checked by `option_problems`.
        decays_vectors: whether norms and biases, the parameters with one dimension, have weight decay too.
        device: of the parameters; None: the CPU.

    Raises:
        UserError: the optimizer does not accept these parameters.
    """
    arguments = complete_options(name, options)
    if not {"fused", "foreach", "differentiable"} & set(options):
        arguments |= _implementation(name, [weight for group in groups for weight in group], device)
    split = [{"params": list(group)} for group in groups]
    if not decays_vectors and "weight_decay" in arguments:
        matrices = [{"params": [p for p in group if p.ndim > 1]} for group in groups]
        vectors = [{"params": [p for p in group if p.ndim < 2], "weight_decay": 0.0} for group in groups]
        split = [group for group in [*matrices, *vectors] if group["params"]]
    try:
        return optimizer_class(name)(split, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer={name} does not accept this model's parameters: {error}") from None


def _implementation(name: str, weights: Sequence[nn.Parameter], device: Optional[torch.device]) -> dict[str, bool]:
    """Return the argument by which an optimizer works on many weights at once, or on one at a time; {} leaves the choice to PyTorch.

    On a GPU it is `fused` where PyTorch has that. Sharded weights take `foreach`: PyTorch would take them one at a time, and to launch a
    thousand small kernels may be a quarter of a step on eight GPUs. On a GPU weights of 1 GB or more are taken one at a time: `foreach`
    computes in a copy of all weights (4 bytes a parameter), and large kernels take longer than their launch.

    Args:
        name: of the optimizer.
        weights: what it will update.
        device: of the weights; None: the CPU.
    """
    known, on_gpu = _parameters(name), device is not None and device.type == "cuda"
    if "fused" in known and on_gpu:
        return {"fused": True}
    if "foreach" not in known:
        return {}
    if is_sharded(weights):
        return {"foreach": True}
    return {"foreach": sum(weight.numel() * weight.element_size() for weight in weights) < 1e9} if on_gpu else {}


def is_sharded(weights: Sequence[nn.Parameter]) -> bool:
    """Whether a weight is one of several ranks'."""
    return any(isinstance(weight, DTensor) for weight in weights)


def copies_in_step(name: str, options: Mapping[str, Any], sharded: bool, on_gpu: bool) -> int:
    """Return how many numbers per weight a step computes in, apart from the optimizer's state: 1 for foreach, see `_implementation`.

    Args:
        name, options: as for `make_optimizer`.
        sharded: whether the weights are.
        on_gpu: whether they are on a GPU.
    """
    known = _parameters(name)
    fused = options.get("fused", on_gpu and "fused" in known)
    return int(not fused and options.get("foreach", sharded and "foreach" in known))


def bytes_per_weight(name: str, options: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Return the bytes that an optimizer keeps per number of a weight, as a step of it shows.

    Args:
        name, options: as for `make_optimizer`.
        dtype: of the weight.
    """
    weight = nn.Parameter(torch.zeros(512, 512, dtype=dtype))
    on_cpu = {key: value for key, value in options.items() if key not in ("capturable", "fused")}
    optimizer = make_optimizer(name, [[weight]], 1e-3, on_cpu)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept) / weight.numel()
