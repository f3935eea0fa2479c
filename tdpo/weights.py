"""A model's weights in the names and shapes of its own class, whatever lies around them: layers of adapters, quantised numbers."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

T = TypeVar("T")
BASE_LAYER = "base_layer"  # peft's name of the frozen layer that an adapter belongs to
# Classes in which bitsandbytes keeps quantised weights, and bytes per number: in NF4 with a byte per 64 numbers, and 4 per 256 of these.
PACKED = {"Params4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "Int8Params": 1.0}


def is_adapter_name(name: str) -> bool:
    """Whether a name in a state dict is that of a tensor of an adapter (see models/adapters.py)."""
    return ".lora_A." in name or ".lora_B." in name


def without_adapters(state: Mapping[str, T]) -> dict[str, T]:
    """Return the entries of a state dict that belong to the model itself, in its own names."""
    return {name.replace(f".{BASE_LAYER}.", "."): value for name, value in state.items() if not is_adapter_name(name)}


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's own weight is quantised (see models/quantized.py); a layer of adapters has none, but shows that of its base."""
    return type(layer._parameters.get("weight")).__name__ in PACKED


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, GPT-2's Conv1D and the head included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def is_transposed(layer: nn.Module) -> bool:
    """Whether a quantised layer stands for one whose weight is (in, out), GPT-2's Conv1D; bitsandbytes keeps (out, in)."""
    return getattr(layer, "source_cls", None) is Conv1D


def plain_weights(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a model's state dict, quantised weights dequantised, one at a time.

    Args:
        model: may have adapters, whose names stay.
        wanted: which names to yield.
    """
    quantized = {name: layer for name, layer in model.named_modules() if is_quantized(layer)}
    scales = tuple(f"{name}.{part}" for name in quantized for part in ("weight.", "SCB", "weight_format"))
    for name, tensor in model.state_dict().items():
        if not wanted(name) or name.startswith(scales):
            continue
        layer = quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        yield name, tensor if layer is None else _dequantized(layer).to(model.get_input_embeddings().weight.dtype)


def parameter_count(model: nn.Module) -> int:
    """Return the number of a model's parameters; tied ones count once, several quantised in one byte count each."""
    return sum(getattr(getattr(p, "quant_state", None), "shape", p.shape).numel() for p in model.parameters())


def _dequantized(layer: nn.Module) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes

    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).detach()
    return weight.t().contiguous() if is_transposed(layer) else weight
