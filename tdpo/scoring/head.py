"""The language-model head of fast scoring: logits from hidden states, of the whole vocabulary or of this rank's part of it.

Shapes: C positions, V vocabulary entries (under tensor parallelism those of this rank), H hidden size.
"""

from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tdpo.utils import full_tensor


@dataclass(frozen=True)
class VocabularyPart:
    """The entries of the vocabulary whose logits this rank computes under tensor parallelism. The other ranks compute the others.

    Its methods must be called on all ranks of the group.
    """

    group: dist.ProcessGroup
    start: int  # the first entry
    size: int  # number of entries

    @classmethod
    def of(cls, weight: DTensor) -> "VocabularyPart":
        """Return the part of a weight (V, H) whose rows are split over the ranks."""
        mesh = weight.device_mesh
        each = -(-weight.shape[0] // mesh.size())  # DTensor splits as torch.chunk does
        return cls(mesh.get_group(), min(mesh.get_local_rank() * each, weight.shape[0]), weight.to_local().shape[0])

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the sum of exponentials over the whole vocabulary, (C,), of this rank's logits (C, V)."""
        own = logits.logsumexp(-1)
        of_ranks = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(of_ranks, own, group=self.group)
        return torch.stack(of_ranks).logsumexp(0)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def places(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places of labels (C,) in this rank's logits, and whether they are there; places of others are any."""
        places = labels - self.start
        return places.clamp(0, self.size - 1), (places >= 0) & (places < self.size)


@dataclass(frozen=True)
class Head:
    """A model's output layer: logits = softcap * tanh((states @ weight.T + bias) / softcap)."""

    weight: torch.Tensor  # (V, H)
    bias: Optional[torch.Tensor]  # (V,)
    softcap: Optional[float] = None  # bound of the logits; None: no soft cap
    compiled: bool = False  # use torch.compile for the operations on its logits
    part: Optional[VocabularyPart] = None  # of the vocabulary, which weight and bias hold; None: they hold all of it

    @classmethod
    def of(cls, model: nn.Module, compiled: bool = False, split: bool = False) -> "Head":
        """Return the head of a causal language model of Transformers, for which `unsupported_head` must return None.

        Args:
            split: under tensor parallelism return this rank's part of the head; False: gather all of it on every rank.
        """
        layer, part = model.get_output_embeddings(), None
        if split and isinstance(layer.weight, DTensor) and layer.weight.placements[0].is_shard(0):
            part = VocabularyPart.of(layer.weight)
            weight, bias = (None if x is None else x.to_local() for x in (layer.weight, layer.bias))
        else:
            weight, bias = (None if x is None else full_tensor(x) for x in (layer.weight, layer.bias))
        return cls(weight, bias, getattr(model.config.get_text_config(), "final_logit_softcapping", None), compiled, part)

    def split_as(self, other: "Head") -> "Head":
        """Return this head with the part of the vocabulary that another has."""
        if other.part is None or self.part is not None:
            return self
        own = slice(other.part.start, other.part.start + other.part.size)
        return replace(self, weight=self.weight[own], bias=None if self.bias is None else self.bias[own], part=other.part)

    def logits(self, states: torch.Tensor, out: Optional[torch.Tensor] = None, product: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Compute logits in at least float32.

        Args:
            states: (C, H).
            out: (C, V), overwritten with the result (only without autograd); None: a new tensor.
            product: (C, V), overwritten with the matrix product if it has the dtype of the states; it may be `out`.

        Returns:
            (C, V), unnormalised.
        """
        if product is not None and product.dtype == states.dtype:
            weight = self.weight.detach().t()
            torch.mm(states, weight, out=product) if self.bias is None else torch.addmm(self.bias.detach(), states, weight, out=product)
        else:
            product = F.linear(states, self.weight, self.bias)
        # In half precision the product is rounded before the cast, as in the model's own forward pass.
        if out is None:
            out = product.to(torch.promote_types(product.dtype, torch.float32))
        elif product is not out:
            out.copy_(product)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


class HeadOnly(nn.Module):
    """The head of a model whose hidden states are cached, unsharded on every rank. It replaces the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        head = Head.of(model)
        self.config = model.config
        self.register_buffer("weight", head.weight.detach().clone())
        self.register_buffer("bias", None if head.bias is None else head.bias.detach().clone())

    @classmethod
    def instead_of(cls, model: nn.Module) -> "HeadOnly":
        """Copy the model's head and free the model's memory, even if references to it remain, as FSDP keeps them."""
        head = cls(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if storage.resizable():
                storage.resize_(0)
            elif not isinstance(tensor, DTensor):  # on a CPU, weights of a safetensors file are its pages, mapped into memory
                tensor.data = tensor.new_empty(0)
        return head

    def get_output_embeddings(self) -> nn.Module:
        return self


def unsupported_head(model: nn.Module) -> Optional[str]:
    """Return why fast scoring does not support this model's head, as a clause; None if it does."""
    layer = model.get_output_embeddings()
    return None if isinstance(layer, nn.Linear) else f"its head is a {type(layer).__name__}, not a linear layer"
