"""Memory of one device in training, computed before a machine is rented for it.

`python -m tdpo.models.memory_estimate` prints the tables of docs/scaling.md.

The counts of copies below were read off tdpo/scoring and PyTorch's FSDP2; tests/models/test_memory.py holds them against measured
peaks.
"""

from dataclasses import dataclass

import transformers

from tdpo.distributed.sharding import find_blocks
from tdpo.models.build import empty_model
from tdpo.scoring.chunked_loss import CHUNK


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that decide its memory.

    Args:
        parameters: all, tied ones once.
        block: of the largest block.
        blocks: number of them.
        hidden, inner: width of a block and of its feed-forward layer.
        gated: whether that layer has a gate, as Llama's.
        vocabulary: entries.
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
        """Of a Transformers config; builds the model without memory for its weights."""
        model = empty_model(config)
        blocks = find_blocks(model, None)
        size = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        gated = any(name.endswith("gate_proj") for name, _ in model.named_modules())
        total = sum(parameter.numel() for parameter in model.parameters())
        inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
        return cls(total, size, len(blocks), config.hidden_size, inner, gated, config.vocab_size)

    @property
    def rest(self) -> int:
        """Parameters outside blocks: embeddings, norm, head."""
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
    """Peak bytes of one device at the end of the forward pass or within the backward pass, by what they are for.

    Args:
        tokens: of a microbatch on this device, padding included: a prompt once with its responses; plain, once with each of them.
        response_tokens: of them, those that are predicted and trained on.
        shards: devices over which a model is sharded (all / parallel.replicas).
        needs_reference, needs_kl: of the loss.
        weight_bytes, compute_bytes: of model.policy_dtype and model.fsdp_policy_mp; the reference has the latter.
        optimizer_states: numbers a parameter: 1 for RMSprop, 2 for AdamW.
        plain: scoring=plain.
        accumulates_whole: parallel.reduce_once_a_step with gradient_accumulation_steps > 1: whole gradients on every device.

    Returns:
        weights, gradients, optimizer, reference, gathered (what is whole for a time), activations, logits.
    """
    share = shape.parameters / shards
    memory = {
        "weights": weight_bytes * share,
        # A whole gradient goes as its shard comes.
        "gradients": weight_bytes * (shape.parameters if accumulates_whole else share),
        "optimizer": optimizer_states * weight_bytes * share,
        "reference": compute_bytes * share if needs_reference else 0,
        "gathered": _gathered(shape, shards, weight_bytes, compute_bytes),
    }
    # Of a block: norms, queries, keys and values before and after rotation, attention's output; the feed-forward layer's inner values.
    within_block = (12 * shape.hidden + (4 if shape.gated else 2) * shape.inner) * tokens * compute_bytes
    inputs = shape.hidden * tokens * compute_bytes
    memory["activations"] = within_block + shape.blocks * inputs if activation_checkpointing else shape.blocks * within_block
    if plain:
        memory["logits"] = _plain_logits(shape.vocabulary, tokens, response_tokens, needs_reference, needs_kl, compute_bytes)
    else:
        memory["logits"] = head_memory(shape.vocabulary, shape.hidden, response_tokens, needs_reference, needs_kl, compute_bytes)
    return {name: int(value) for name, value in memory.items()}


def _gathered(shape: ModelShape, shards: int, weight_bytes: int, compute_bytes: int) -> float:
    """Copies in which the policy computes. Sharded: its embeddings and head, a block and the next one, and a unit's gradient, whole,
    before and while it is reduced; the reference's are gone before. Else, where it computes in another dtype, all of it."""
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
    """Fast scoring, in bytes: a chunk's log-probabilities of policy and reference and the latter's probabilities (without SeqKL, one of
    these after another), one more where log-softmax is not in place or a copy is in half precision; the gradient of the head's weight, and
    of half precision a chunk's part of it; hidden states at response positions, of policy and reference, and their gradient. Logits with a
    soft cap take one table more."""
    positions = min(chunk, response_tokens)
    tables = 4 * (3 if needs_kl else 1) + (0 if chunk == CHUNK["cpu"] else 4)
    head = vocabulary * hidden * (weight_bytes + (compute_bytes if compute_bytes < 4 else 0))
    states = hidden * response_tokens * compute_bytes * (3 if needs_reference else 2)
    return positions * vocabulary * tables + head + states


def _plain_logits(vocabulary: int, tokens: int, response_tokens: int, needs_reference: bool, needs_kl: bool, compute_bytes: int) -> float:
    """`plain` scoring: policy's and reference's logits at all positions in float32; at response positions, their log-probabilities and
    what the loss makes of them."""
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
# One pair a microbatch and device, filled to max_length=512: a prompt of 256 tokens and two responses of as many.
PAIR = {"tokens": 768, "response_tokens": 512}


def tables() -> str:
    """Markdown: GB a GPU for each of MODELS on each of GPUS, TDPO2, one pair a microbatch."""
    lines = []
    for name, config in MODELS.items():
        shape = ModelShape.of(config)
        parts = list(device_memory(shape, **PAIR))
        lines += [f"**{name}**, {shape.parameters / 1e9:.2f} billion parameters", ""]
        lines += [f"| GPUs | {' | '.join(parts)} | GB a GPU | with AdamW | with whole gradients |", "|" + "---:|" * (len(parts) + 4)]
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
