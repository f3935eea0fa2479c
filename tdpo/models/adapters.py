"""LoRA (https://arxiv.org/abs/2106.09685): small trained matrices A and B beside frozen ones, W + s B A, by the library peft.

The reference is the policy itself with its adapters off, so that it takes no memory of its own and cannot be another model. B starts as 0:
at the first step policy and reference agree exactly. A reference that follows the policy (TR-DPO, sDPO) is the policy with a second, frozen
adapter in place of the trained one.
"""

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Optional

import torch
from omegaconf import DictConfig, ListConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tdpo.models.quantized import quiet
from tdpo.utils import UserError, nearest, reason_of, some_of
from tdpo.weights import BASE_LAYER, is_adapter_name, is_transposed, linear_layers, without_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED, REFERENCE = "default", "reference"  # peft's names of the two adapters
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
ROUTERS = ("gate", "router", "shared_expert_gate")  # names of linear layers that choose experts


def is_adapter(path: str) -> bool:
    """Whether a path is a folder of peft's form."""
    return os.path.isfile(os.path.join(path, CONFIG))


def check_peft() -> None:
    """Raise UserError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters (adapter.rank, or an adapter folder as model.archive) need peft: pip install peft accelerate")


def attach(model: nn.Module, adapter: DictConfig, dtype: torch.dtype, seed: int, for_reference: bool = False) -> str:
    """Freeze a model and give its linear layers adapters, in place.

    Args:
        model: a causal language model of Transformers; may be on the meta device.
        adapter: the config's `adapter`, whose rank is not None.
        dtype: of the adapters.
        seed: of the random matrices A.
        for_reference: add a second, frozen adapter, which changes nothing until `OwnReference.follow` is called.

    Returns:
        a line that says which layers have adapters, and which linear layers have none.

    Raises:
        UserError: peft is not installed, or the targets match no linear layer.
    """
    check_peft()
    quiet()
    import peft  # imported here, because that takes seconds; it imports bitsandbytes if that is installed

    names, left_out = _targets(model, adapter.targets)
    modules = dict(model.named_modules())
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=_as_suffixes(names, model),
        use_rslora=adapter.rslora,
        init_lora_weights=True if adapter.init == "uniform" else adapter.init,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) or is_transposed(modules[name]) for name in names),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        for kind in (TRAINED, REFERENCE) if for_reference else (TRAINED,):
            torch.manual_seed(seed)
            with warnings.catch_warnings(action="ignore"):  # that there is an adapter already
                peft.inject_adapter_in_model(config, model, kind)
            for module in _layers(model):
                for matrices in (module.lora_A, module.lora_B):
                    matrices[kind].to(dtype)
                if not module.lora_A[kind].weight.is_meta:  # drawn in `dtype`, not in that of the frozen weights
                    module.reset_lora_parameters(kind, config.init_lora_weights)
    _activate(model, TRAINED)  # peft has activated the one that was added last
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_of(TRAINED, name))
    layers = set(_layers(model))
    adapted = sorted(name for name, module in model.named_modules() if module in layers)
    if adapted != names:
        raise UserError(f"peft has given adapters to {some_of(sorted(set(adapted) ^ set(names)), 3)}: name other layers as adapter.targets")
    trained, whole = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True))
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    without = f"; no adapters on {', '.join(left_out)}" if left_out else ""
    return f"adapter: rank {adapter.rank} on {kinds}, {trained:,} trained parameters ({trained / whole:.2%} of all){without}"


def has_adapters(model: nn.Module) -> bool:
    """Whether `attach` has given a model adapters."""
    return getattr(model, "peft_config", None) is not None


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _targets(model: nn.Module, wanted: Any) -> tuple[list[str], list[str]]:
    """Return the names of the layers to adapt, and what of the linear layers is left out, for a message.

    Raises:
        UserError: a target matches no linear layer, or is the head.
    """
    linear = linear_layers(model)
    head = {name for name, module in linear.items() if module is model.get_output_embeddings()}
    routing = {name for name in linear if name.rpartition(".")[2] in ROUTERS or "router" in name.split(".")}
    experts = {name for name in linear if "experts" in name.split(".")}
    fused = any(".experts." in name for name, _ in model.named_parameters())
    # For a mixture peft takes these names, also those of a shared expert or a dense layer, for the experts' fused weights.
    shared = {name for name in linear if fused and name.rpartition(".")[2] in EXPERT_LAYERS}
    if wanted == "all-linear":
        left_out = ["router"] * bool(routing or fused) + ["experts"] * bool(experts or fused)
        left_out += sorted({name.rpartition(".")[2] for name in shared - experts})
        return sorted(set(linear) - head - routing - experts - shared), left_out
    found = []
    for target in wanted if isinstance(wanted, (list, tuple, ListConfig)) else [wanted]:
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if set(matching) & head:
            raise UserError(f"adapter.targets: {target} is the head, which may be tied to the embeddings: leave it out")
        if not matching:
            names = sorted({name.rpartition(".")[2] for name in set(linear) - head})
            raise UserError(f"adapter.targets: no linear layer is called {target}{nearest(target, names)}; there are {some_of(names, 12)}")
        if taken := set(matching) & (routing | experts | shared):
            raise UserError(f"adapter.targets: {target} is part of a mixture's router or experts ({sorted(taken)[0]}): leave it out")
        found += matching
    return sorted(set(found)), []


def _as_suffixes(names: list[str], model: nn.Module) -> list[str]:
    """Return the last parts of names if they match those layers only, as in published adapters; else the whole names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return last if matched == set(names) else names


@contextmanager
def off(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, let a model compute without its adapters."""
    layers = _layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def second(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, let a model compute with its second adapter in place of the trained one."""
    _activate(model, REFERENCE)
    try:
        yield model
    finally:
        _activate(model, TRAINED)


def _activate(model: nn.Module, adapter: str) -> None:
    for layer in _layers(model):
        layer._active_adapter = adapter  # peft's own set_adapter would also change which parameters are trained


def _is_of(adapter: str, name: str) -> bool:
    """Whether a name is that of a tensor of one of the two adapters."""
    return is_adapter_name(name) and f".{adapter}." in name


class OwnReference(nn.Module):
    """The reference of a policy with adapters: the policy's own weights, with the adapters off, or with the second adapter in place of the
    trained one if there is one. It has no parameters of its own.

    Args:
        policy: a model to which `attach` has given adapters.
    """

    is_policy = True  # whether the weights are the policy's, so that they are neither sharded, moved nor freed on their own

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.__dict__["policy"] = policy  # not registered as a submodule: its parameters are not the reference's

    def _as_reference(self) -> AbstractContextManager:
        return second(self.policy) if REFERENCE in self.policy.peft_config else off(self.policy)

    @torch.no_grad()
    def follow(self) -> None:
        """Replace the second adapter by a copy of the trained one, in place; whole or sharded."""
        parameters = dict(self.policy.named_parameters())
        for name, parameter in parameters.items():
            if _is_of(REFERENCE, name):
                parameter.copy_(parameters[name.replace(f".{REFERENCE}.", f".{TRAINED}.")])

    def forward(self, *args, **kwargs):
        with self._as_reference():
            return self.policy(*args, **kwargs)

    def base_model(self, *args, **kwargs):
        """Compute hidden states, as the policy's `base_model` does."""
        with self._as_reference():
            return self.policy.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """Generate as the policy's `generate` does."""
        with self._as_reference():
            return self.policy.generate(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.policy.get_output_embeddings()

    @property
    def config(self):
        return self.policy.config

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def dtype(self) -> torch.dtype:
        return self.policy.dtype

    @property
    def generation_config(self):
        return self.policy.generation_config

    @generation_config.setter
    def generation_config(self, settings) -> None:
        self.policy.generation_config = settings


def merged(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of the model without adapters whose weights are W + s B A, computed in at least float32, then rounded.

    Args:
        model: has adapters; its own tensors are not used.
        state: its whole state dict.

    Returns:
        name -> tensor, in the names, shapes and dtypes of the model before `attach`.
    """
    found = without_adapters(state)
    for name, module in model.named_modules():
        if f"{name}.lora_A.default.weight" not in state:
            continue
        weight, a, b = (state[f"{name}.{part}.weight"] for part in (BASE_LAYER, "lora_A.default", "lora_B.default"))
        dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
        change = b.to(dtype) @ a.to(dtype) * module.scaling["default"]
        change = change.t() if module.fan_in_fan_out or is_transposed(module.get_base_layer()) else change
        found[f"{name}.weight"] = (weight.to(dtype) + change.to(weight.device)).to(weight.dtype)
    return found


def save_adapter(model: nn.Module, state: Mapping[str, torch.Tensor], base: str, folder: str) -> None:
    """Write a model's adapters in peft's form.

    Args:
        model: has adapters; its own tensors are not used.
        state: its state dict; the adapters' tensors suffice.
        base: folder, or name on the hub, of the model that the adapters belong to.
        folder: to be made.
    """
    os.makedirs(folder)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    config.inference_mode = False
    own = {name.replace(f".{TRAINED}.", "."): tensor for name, tensor in state.items() if _is_of(TRAINED, name)}
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})


def named_base(model: DictConfig, archive: Optional[str]) -> Optional[str]:
    """Return the folder or name by which peft finds the model that a run's adapters belong to; None if there is none.

    Args:
        model: the config's `model`.
        archive: the weights that the run started from.
    """
    if model.quantize is not None:
        return None  # the adapters belong to the dequantised weights
    if archive is not None:
        return os.path.abspath(archive) if os.path.isfile(os.path.join(archive, "config.json")) else None
    name = model.name_or_path
    if name is None or name.endswith(".gguf"):
        return None
    return os.path.abspath(name) if os.path.exists(name) else name


def base_of(folder: str) -> Optional[str]:
    """Return the model that an adapter folder names as its base; None if it names none.

    Raises:
        UserError: its config cannot be read.
    """
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file).get("base_model_name_or_path") or None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model.archive={folder}: {CONFIG} cannot be read ({reason_of(error, 120)})") from None


def merge_folder(model: nn.Module, folder: str) -> nn.Module:
    """Return a model with the adapters of a folder merged into its weights.

    Args:
        model: the adapters' base, without adapters; it is changed.
        folder: of peft's form.

    Raises:
        UserError: peft is not installed, or the adapters do not fit the model.
    """
    check_peft()
    quiet()
    import peft
    from safetensors import safe_open

    try:
        with warnings.catch_warnings(action="ignore"):  # of what Transformers has renamed since
            found = peft.PeftModel.from_pretrained(model, folder)
        with safe_open(os.path.join(folder, WEIGHTS), "pt") as file:
            given = set(file.keys())
        own = {name.replace(".default.", ".").replace(".default", "") for name, _ in found.named_parameters() if is_adapter_name(name)}
        if wrong := sorted(given ^ own):
            raise UserError(f"model.archive={folder} does not fit the model: {some_of(wrong, 4)}")
        plain = found.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except Exception as error:  # peft and safetensors raise errors of many types
        raise UserError(f"model.archive={folder}: the adapter cannot be loaded: {reason_of(error)}") from None
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(plain).pop(name, None)
    return plain.requires_grad_(True)
