"""Estimate of the memory per device in training: of a run before its weights are loaded (training/costs.py), and of models before a machine
is rented (benchmarks/memory_tables.py).

The counts of copies were derived from the code of tdpo/scoring and of PyTorch's FSDP2. tests/models/test_memory.py compares them with
measured peaks.
"""

from dataclasses import dataclass

import torch
import transformers
from torch import nn

from tdpo.distributed.sharding import find_blocks
from tdpo.models.quantized import quantized_layers
from tdpo.scoring.distributions import BLOCK, CHUNK
from tdpo.utils import UserError
from tdpo.weights import PACKED, is_adapter_name


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that determine its memory.

    Args:
        parameters: number of parameters; tied ones count once.
        block: parameters of the largest block (transformer layer).
        blocks: number of blocks.
        hidden, inner: width of a block and of its feed-forward layer.
        gated: whether the feed-forward layer has a gate, as in Llama.
        vocabulary: number of entries.
        adapter: parameters of the trained adapters, which are trained in place of all others; 0: there are none.
        quantized: parameters that are quantised.
        quantized_bytes: bytes that these take, scales included.
        matrix: parameters of the largest quantised matrix.
    """

    parameters: int
    block: int
    blocks: int
    hidden: int
    inner: int
    gated: bool
    vocabulary: int
    adapter: int = 0
    quantized: int = 0
    quantized_bytes: float = 0
    matrix: int = 0

    @classmethod
    def of(cls, config: transformers.PreTrainedConfig) -> "ModelShape":
        """Return the shape of a Transformers config's model, which is built on the meta device for this."""
        with torch.device("meta"):
            return cls.of_model(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False))

    @classmethod
    def of_model(cls, model: nn.Module) -> "ModelShape":
        """Return the shape of a model, which may be on the meta device and have adapters; with quantised layers it must be there."""
        config = model.config.get_text_config()

        def size(module: nn.Module, adapters: bool = False) -> int:
            found = module.named_parameters()
            return sum(p.numel() for name, p in found if (is_adapter_name(f".{name}") and p.requires_grad) == adapters)

        try:
            blocks = find_blocks(model, None)
        except UserError:  # a class that names no blocks: the longest list of layers
            lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
            blocks = list(max(lists, key=len)) if lists else [model]
        gated = any(name.endswith("gate_proj") for name, _ in model.named_modules())
        hidden = getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[-1]
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        inner = max(inner) if isinstance(inner, (list, tuple)) else inner  # one size a layer
        largest = max(map(size, blocks))
        packed = [(layer.weight.shape.numel(), PACKED[type(layer.weight).__name__]) for layer in quantized_layers(model)]
        return cls(
            size(model),
            largest,
            len(blocks),
            hidden,
            inner,
            gated,
            config.vocab_size,
            size(model, adapters=True),
            sum(n for n, _ in packed),
            sum(n * each for n, each in packed),
            max((n for n, _ in packed), default=0),
        )

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return self.adapter or self.parameters

    @property
    def rest(self) -> int:
        """Number of parameters outside the blocks: embeddings, norm, head."""
        return self.parameters - self.block * self.blocks


def device_memory(
    shape: ModelShape,
    *,
    tokens: int,
    response_tokens: int,
    shards: int = 1,
    needs_reference: bool = True,
    needs_kl: bool = True,
    weight_bytes: int = 4,
    compute_bytes: int = 2,
    optimizer_states: float = 1,
    optimizer_copies: int = 0,
    activation_checkpointing: bool = True,
    accumulates_whole: bool = False,
    plain: bool = False,
    chunk: int = CHUNK["cuda"],
) -> dict[str, int]:
    """Estimate the peak memory of one device, reached at the end of the forward pass or during the backward pass.

    Args:
        shape: sizes of policy and reference.
        tokens: tokens of a microbatch on this device, padding included. A prompt counts once; with plain scoring, once per response.
        response_tokens: those of them that are predicted and in the loss.
        shards: devices over which a model is sharded (all / parallel.replicas).
        needs_reference, needs_kl: see Objective.
        weight_bytes: bytes per number of model.policy_dtype, in which trained weights are kept.
        compute_bytes: bytes per number of model.fsdp_policy_mp, which is also the dtype of the reference, and of weights below adapters.
        optimizer_states: numbers of weight_bytes per parameter: 1 for RMSprop, 2 for AdamW.
        optimizer_copies: numbers of weight_bytes per parameter in which the optimizer computes, see optimizers.copies_in_step.
        activation_checkpointing: only the inputs of each block are kept.
        accumulates_whole: unsharded gradients on every device, as with parallel.reduce_once_a_step and gradient_accumulation_steps > 1.
        plain: scoring=plain.
        chunk: positions whose logits fast scoring computes at a time.

    Returns:
        bytes by purpose: weights, gradients, optimizer, reference, gathered (temporarily unsharded or dequantised copies), activations,
        logits, update (what the optimizer's step needs beyond the three parts before, which are free by then).
    """
    frozen = compute_bytes * (shape.parameters - shape.quantized) + shape.quantized_bytes if shape.adapter else 0
    trained = weight_bytes * shape.trained
    memory = {
        "weights": (frozen + trained) / shards,
        # An unsharded gradient is freed when its shard is stored.
        "gradients": trained / (1 if accumulates_whole else shards),
        "optimizer": optimizer_states * trained / shards,
        # With adapters it is the policy itself.
        "reference": compute_bytes * shape.parameters / shards if needs_reference and not shape.adapter else 0,
        "gathered": _gathered(shape, shards, weight_bytes, compute_bytes) + compute_bytes * shape.matrix,
    }
    # Per block: norms, queries, keys and values before and after rotation, output of attention; inner values of the feed-forward layer.
    within_block = (12 * shape.hidden + (4 if shape.gated else 2) * shape.inner) * tokens * compute_bytes
    inputs = shape.hidden * tokens * compute_bytes
    memory["activations"] = within_block + shape.blocks * inputs if activation_checkpointing else shape.blocks * within_block
    if plain:
        memory["logits"] = _plain_logits(shape.vocabulary, tokens, response_tokens, needs_reference, needs_kl, compute_bytes)
    else:
        needs = needs_reference, needs_kl, compute_bytes
        head = weight_bytes if not shape.adapter else 0
        memory["logits"] = head_memory(shape.vocabulary, shape.hidden, response_tokens, *needs, weight_bytes=head, chunk=chunk)
    free_in_update = memory["gathered"] + memory["activations"] + memory["logits"]
    memory["update"] = max(0.0, optimizer_copies * trained / shards - free_in_update)
    return {name: int(value) for name, value in memory.items()}


def _gathered(shape: ModelShape, shards: int, weight_bytes: int, compute_bytes: int) -> float:
    """Return the bytes of the unsharded copies with which the policy computes.

    Sharded: embeddings and head, a block, the next (prefetched) block, and one unit's gradient before and during its reduction; the
    reference's copies are freed by then. On one device: all parameters, if the policy computes in another dtype.
    """
    if shards == 1:
        # A copy's gradient lives until it is added to the parameter's, so at most the largest one, the head's.
        gradient = 0 if shape.adapter else shape.vocabulary * shape.hidden
        return compute_bytes * (shape.trained + gradient) if compute_bytes != weight_bytes else 0
    largest = max(shape.block, shape.rest)
    gradient = shape.adapter / shape.blocks if shape.adapter else largest
    return compute_bytes * (shape.rest + 2 * shape.block + largest) + weight_bytes * gradient


def head_memory(
    vocabulary: int,
    hidden: int,
    response_tokens: int,
    needs_reference: bool,
    needs_kl: bool,
    compute_bytes: int,
    weight_bytes: int = 4,
    chunk: int = CHUNK["cuda"],
) -> float:
    """Estimate the bytes that fast scoring needs for head and loss.

    They are the sum of (positions, vocabulary) tables of a chunk: one for each model with SeqKL, else one for both; on a GPU one more,
    because log-softmax is not in place there, on a CPU a block; one more for matrix products in half precision, and on a GPU for an odd
    vocabulary. To these come the gradient of the head's weight, and in half precision a chunk's contribution to it; and hidden states at
    response positions of policy and reference, and their gradient. The additional table of soft-capped logits is not counted.

    Args:
        vocabulary, hidden: sizes of the head.
        response_tokens: tokens in the loss of a microbatch.
        needs_reference, needs_kl: see Objective.
        compute_bytes: bytes per number of the hidden states.
        weight_bytes: bytes per number of the weight's gradient; 0: it is frozen.
        chunk: positions per chunk.
    """
    positions = min(chunk, response_tokens)
    on_gpu = chunk != CHUNK["cpu"]
    product = compute_bytes if compute_bytes < 4 or (on_gpu and vocabulary % 64) else 0
    tables = 4 * (1 + needs_kl + on_gpu) + product
    head = vocabulary * hidden * (weight_bytes + (compute_bytes if compute_bytes < 4 else 0)) if weight_bytes else 0
    states = hidden * response_tokens * compute_bytes * (3 if needs_reference else 2)
    scratch = 4 * min(BLOCK, positions * vocabulary) if needs_kl and not on_gpu else 0
    return positions * vocabulary * tables + scratch + head + states


def _plain_logits(vocabulary: int, tokens: int, response_tokens: int, needs_reference: bool, needs_kl: bool, compute_bytes: int) -> float:
    """Return the bytes of plain scoring: float32 logits of policy and reference at all positions; at response positions, their
    log-probabilities and the intermediate results of the loss."""
    everywhere = 2 if needs_reference else 1
    at_responses = 6 if needs_kl else 3
    cast = tokens * compute_bytes if compute_bytes != 4 else 0
    return vocabulary * (4 * (everywhere * tokens + at_responses * response_tokens) + cast)
