"""What a policy with adapters is compared with: the model whose weights are W + s B A."""

import torch
from helpers import padded, token_pairs
from torch import nn
from transformers.pytorch_utils import Conv1D

from tdpo.losses import Objective
from tdpo.models.adapters import OwnReference
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.scorer import Scorer


def draw_b(model: nn.Module) -> nn.Module:
    """Return a model whose adapters change it: B is drawn, not 0."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def assert_same_step(
    model: nn.Module, whole: nn.Module, base: nn.Module, objective: Objective, scoring: str, scale: float, tolerance: float, least: float
) -> None:
    """Check loss and gradients of a policy with adapters. With G = dL/dW of the whole model: dL/dB = s G A^T and dL/dA = s B^T G.

    Args:
        model: has adapters.
        whole, base: without; their weights are W + s B A, and W.
        scoring: fast or plain.
        scale: s.
        tolerance: of the loss, and of each gradient relative to its norm.
        least: added to the tolerance of a gradient's norm.
    """
    rows = [(prompt, responses[: len(objective.roles)]) for prompt, responses in token_pairs()]
    batch = shared_prefix_batch(rows) if scoring == "fast" else padded(token_pairs())
    ours = Scorer(model, OwnReference(model) if objective.needs_reference else None, objective)(batch)
    theirs = Scorer(whole, base if objective.needs_reference else None, objective)(batch)
    assert abs(ours.loss.item() - theirs.loss.item()) <= tolerance * abs(theirs.loss.item())
    ours.loss.backward(), theirs.loss.backward()
    found = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        original = whole.get_submodule(name)
        gradient = original.weight.grad.t() if isinstance(original, Conv1D) else original.weight.grad  # (out, in)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        for own, expected in ((b.grad, scale * gradient @ a.t()), (a.grad, scale * b.t() @ gradient)):
            assert (own - expected).norm() <= tolerance * expected.norm() + least
        found += 1
    assert found >= 8
