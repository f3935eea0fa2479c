"""QLoRA (https://arxiv.org/abs/2305.14314): frozen weights of 4 or 8 bits below the adapters, by the library bitsandbytes.

They are quantised on the CPU, so that a run has the same weights on every device. The reference is the same quantised model without
adapters. What a run exports is dequantised, because adapters belong to the weights that they were trained on: added to those before
quantisation they give another model.
"""

import importlib.util
import logging
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from tdpo.utils import UserError
from tdpo.weights import is_quantized, linear_layers

NF4_BLOCK = 64  # numbers that share a scale


def check_quantize() -> None:
    """Raise UserError if the libraries for quantised weights are not installed."""
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"model.quantize needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def quiet() -> None:
    """Keep bitsandbytes from printing a line when it is imported, and one per layer and pass. Called before it is imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def loading_options(model: nn.Module, method: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise the linear layers of a model, without its head, on the CPU.

    Args:
        model: of the same class and config, not quantised; may be on the meta device.
        method: nf4, blocks of 64 normal floats with quantised scales, as in the QLoRA paper; or int8 (https://arxiv.org/abs/2208.07339).
        dtype: in which the model computes.
    """
    quiet()
    if method == "nf4":
        # bitsandbytes 0.50 dequantises other widths wrongly on CPUs with AVX-512: blocks that span two rows.
        odd = [name for name, layer in linear_layers(model).items() if width_of(layer) % NF4_BLOCK]
        skipped = {"llm_int8_skip_modules": [*get_keys_to_not_convert(model), *odd]} if odd else {}
        kinds = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, **kinds, **skipped)
    else:
        # With a threshold, the columns that are kept in 16 bits, and so a sequence's loss, depend on the other sequences of the batch.
        settings = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": settings, "device_map": {"": "cpu"}}


def quantized(model: nn.Module, method: str, dtype: torch.dtype) -> nn.Module:
    """Return a model in memory with the weights of its linear layers quantised; the model given must not be used any more."""
    built = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=dtype, **loading_options(model, method, dtype)
    )
    built.generation_config = model.generation_config
    built._weight_conversions = getattr(model, "_weight_conversions", None)
    return settled(built)


def emptied(model: nn.Module, method: str, dtype: torch.dtype) -> nn.Module:
    """Return a model on the meta device with quantised layers in place of those that loading would quantise; it is changed."""
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(loading_options(model, method, dtype)["quantization_config"])
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    quantizer.postprocess_model(model)
    return settled(model)


def settled(model: nn.Module) -> nn.Module:
    """Return a model that was just quantised, made ready for training, in place."""
    for layer in quantized_layers(model):
        # On some CPUs bitsandbytes would repack a weight in passes without gradient, into a form that passes with gradient cannot read.
        layer.support_avx512bf16_for_cpu = False
        if hasattr(layer, "init_8bit_state") and layer.weight.CB is not None:
            layer.init_8bit_state()
    return without_traces(model)


def without_traces(model: nn.Module) -> nn.Module:
    """Return a model without what Transformers notes of its quantised weights, in place, so that it is exported as a plain one."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    return model


def follow(model: nn.Module) -> None:
    """Let the scales of 8-bit layers follow their weights, which were moved to another device; does nothing for other layers."""
    for layer in quantized_layers(model):
        if hasattr(layer, "init_8bit_state"):
            layer.state.CB = layer.weight.data
            layer.state.SCB = layer.state.SCB.to(layer.weight.device)


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model whose weights are quantised."""
    return [layer for layer in model.modules() if is_quantized(layer)]


def width_of(layer: nn.Module) -> int:
    """Return the number of inputs of a linear layer."""
    return layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]


def described(model: nn.Module, method: str) -> str:
    """Return a line that says how much of a quantised model is quantised, and what that means for its files.

    Args:
        model: on the meta device, see `emptied`.
        method: see `loading_options`.

    Raises:
        UserError: nothing is quantised.
    """
    packed = sum(layer.weight.shape.numel() for layer in quantized_layers(model))
    if not packed:
        raise UserError(
            f"model.quantize={method}: {type(model).__name__} has no linear layer that can be quantised (nf4 needs a multiple of "
            f"{NF4_BLOCK} inputs); use model.quantize=null"
        )
    whole = sum(parameter.numel() for parameter in model.parameters())
    return f"quantize: {packed / whole:.0%} of the parameters in {method}; policy.pt, hf/ and base/ hold them dequantised"
