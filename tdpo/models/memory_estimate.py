"""Estimate of the memory per device in training, to be made before a machine is rented.

`python -m tdpo.models.memory_estimate` prints the tables of docs/scaling.md.

The counts of copies were derived from the code of tdpo/scoring and of PyTorch's FSDP2. tests/models/test_memory_estimate.py compares
them with measured peaks.
"""

from dataclasses import dataclass

import transformers

from tdpo.distributed.sharding import find_blocks
from tdpo.models.build import empty_model
from tdpo.scoring.chunked_loss import CHUNK


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
    """

    parameters: int
    block: int
    blocks: int
    hidden: int
    inner: int
    gated: bool
    vocabulary: int

    @classmethod
    def of(cls, config: transformers.PreTrainedConfig) -> "ModelShape":
        """Return the shape of a Transformers config's model, which is built on the meta device for this."""
        model = empty_model(config)
        blocks = find_blocks(model, None)
        size = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        gated = any(name.endswith("gate_proj") for name, _ in model.named_modules())
        total = sum(parameter.numel() for parameter in model.parameters())
        inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
        return cls(total, size, len(blocks), config.hidden_size, inner, gated, config.vocab_size)

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
    optimizer_states: int = 1,
    activation_checkpointing: bool = True,
    accumulates_whole: bool = False,
    plain: bool = False,
) -> dict[str, int]:
    """Estimate the peak memory of one device, reached at the end of the forward pass or during the backward pass.

    Args:
        shape: sizes of policy and reference.
        tokens: tokens of a microbatch on this device, padding included. A prompt counts once; with plain scoring, once per response.
        response_tokens: those of them that are predicted and in the loss.
        shards: devices over which a model is sharded (all / parallel.replicas).
        needs_reference, needs_kl: see Objective.
        weight_bytes: bytes per number of model.policy_dtype.
        compute_bytes: bytes per number of model.fsdp_policy_mp, which is also the reference's dtype.
        optimizer_states: numbers per parameter: 1 for RMSprop, 2 for AdamW.
        activation_checkpointing: only the inputs of each block are kept.
        accumulates_whole: unsharded gradients on every device, as with parallel.reduce_once_a_step and gradient_accumulation_steps > 1.
        plain: scoring=plain.

    Returns:
        bytes by purpose: weights, gradients, optimizer, reference, gathered (temporarily unsharded copies), activations, logits.
    """
    share = shape.parameters / shards
    memory = {
        "weights": weight_bytes * share,
        # An unsharded gradient is freed when its shard is stored.
        "gradients": weight_bytes * (shape.parameters if accumulates_whole else share),
        "optimizer": optimizer_states * weight_bytes * share,
        "reference": compute_bytes * share if needs_reference else 0,
        "gathered": _gathered(shape, shards, weight_bytes, compute_bytes),
    }
    # Per block: norms, queries, keys and values before and after rotation, output of attention; inner values of the feed-forward layer.
    within_block = (12 * shape.hidden + (4 if shape.gated else 2) * shape.inner) * tokens * compute_bytes
    inputs = shape.hidden * tokens * compute_bytes
    memory["activations"] = within_block + shape.blocks * inputs if activation_checkpointing else shape.blocks * within_block
    if plain:
        memory["logits"] = _plain_logits(shape.vocabulary, tokens, response_tokens, needs_reference, needs_kl, compute_bytes)
    else:
        memory["logits"] = head_memory(shape.vocabulary, shape.hidden, response_tokens, needs_reference, needs_kl, compute_bytes)
    return {name: int(value) for name, value in memory.items()}


def _gathered(shape: ModelShape, shards: int, weight_bytes: int, compute_bytes: int) -> float:
    """Return the bytes of the unsharded copies with which the policy computes.

    Sharded: embeddings and head, a block, the next (prefetched) block, and one unit's gradient before and during its reduction; the
    reference's copies are freed by then. On one device: all parameters, if the policy computes in another dtype.
    """
    if shards == 1:
        return compute_bytes * shape.parameters if compute_bytes != weight_bytes else 0
    largest = max(shape.block, shape.rest)
    return compute_bytes * (shape.rest + 2 * shape.block + largest) + weight_bytes * largest


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

    They are the sum of (positions, vocabulary) tables of a chunk (log-probabilities of policy and reference and the reference's
    probabilities, or without SeqKL one table for all; one more on a GPU, where log-softmax is not in place); the gradient of the head's
    weight, and in half precision a chunk's contribution to it; and hidden states at response positions of policy and reference, and their
    gradient. The additional table of soft-capped logits is not counted.

    Args:
        vocabulary, hidden: sizes of the head.
        response_tokens: tokens in the loss of a microbatch.
        needs_reference, needs_kl: see Objective.
        compute_bytes: bytes per number of the hidden states.
        weight_bytes: bytes per number of the weight's gradient.
        chunk: positions per chunk.
    """
    positions = min(chunk, response_tokens)
    tables = 4 * (3 if needs_kl else 1) + (0 if chunk == CHUNK["cpu"] else 4)
    head = vocabulary * hidden * (weight_bytes + (compute_bytes if compute_bytes < 4 else 0))
    states = hidden * response_tokens * compute_bytes * (3 if needs_reference else 2)
    return positions * vocabulary * tables + head + states


def _plain_logits(vocabulary: int, tokens: int, response_tokens: int, needs_reference: bool, needs_kl: bool, compute_bytes: int) -> float:
    """Return the bytes of plain scoring: float32 logits of policy and reference at all positions; at response positions, their
    log-probabilities and the intermediate results of the loss."""
    everywhere = 2 if needs_reference else 1
    at_responses = 6 if needs_kl else 3
    cast = tokens * compute_bytes if compute_bytes != 4 else 0
    return vocabulary * (4 * (everywhere * tokens + at_responses * response_tokens) + cast)


MODELS = {
    "Pythia 2.8B": transformers.GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=2_560,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=10_240,
        max_position_embeddings=2_048,
    ),
    "Llama 3 8B": transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4_096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14_336,
        max_position_embeddings=8_192,
    ),
    "Llama 3 70B": transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=8_192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28_672,
        max_position_embeddings=8_192,
    ),
}
GPUS = (1, 2, 4, 8, 16, 32, 64)
# One pair per microbatch and device, filled to max_length=512: a prompt of 256 tokens and two responses of 256 tokens each.
PAIR = {"tokens": 768, "response_tokens": 512}


def tables() -> str:
    """Return Markdown tables of GB per GPU: each of MODELS on each number of GPUS, for TDPO2 with one pair per microbatch."""
    lines = []
    for name, config in MODELS.items():
        shape = ModelShape.of(config)
        parts = list(device_memory(shape, **PAIR))
        lines += [f"**{name}**, {shape.parameters / 1e9:.2f} billion parameters", ""]
        lines += [f"| GPUs | {' | '.join(parts)} | GB per GPU | with AdamW | with whole gradients |", "|" + "---:|" * (len(parts) + 4)]
        for n in GPUS:
            memory = device_memory(shape, shards=n, **PAIR)
            variants = ({"optimizer_states": 2}, {"accumulates_whole": True})
            totals = [memory, *(device_memory(shape, shards=n, **PAIR, **variant) for variant in variants)]
            cells = [*memory.values(), *(sum(total.values()) for total in totals)]
            lines.append(f"| {n} | {' | '.join(f'{cell / 1e9:.1f}' for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
