"""Prints the tables of docs/scaling.md: python benchmarks/memory_tables.py"""

import sys
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from tdpo.models.adapters import attach  # noqa: E402
from tdpo.models.build import empty_model  # noqa: E402
from tdpo.models.memory import ModelShape, device_memory  # noqa: E402
from tdpo.models.quantized import emptied  # noqa: E402
from tdpo.optimizers import copies_in_step  # noqa: E402

LORA = OmegaConf.create({"rank": 16, "alpha": 32, "targets": "all-linear", "rslora": False, "init": "uniform"})
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
            copies = copies_in_step("RMSprop", {}, n > 1, True)  # AdamW's step is fused on a GPU
            rmsprop = {"shards": n, "optimizer_copies": copies, **PAIR}
            memory = device_memory(shape, **rmsprop)
            adamw = device_memory(shape, shards=n, optimizer_states=2, **PAIR)
            totals = [memory, adamw, device_memory(shape, accumulates_whole=True, **rmsprop)]
            cells = [*memory.values(), *(sum(total.values()) for total in totals)]
            lines.append(f"| {n} | {' | '.join(f'{cell / 1e9:.1f}' for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def lora_table() -> str:
    """Return a Markdown table of GB per GPU with LoRA of rank 16 on all linear layers: each of MODELS on each number of GPUS."""
    lines = [f"| GPUs | {' | '.join(MODELS)} |", "|" + "---:|" * (len(MODELS) + 1)]
    shapes = [_with_adapters(config, None) for config in MODELS.values()]
    for n in GPUS:
        cells = [sum(device_memory(shape, shards=n, **PAIR).values()) / 1e9 for shape in shapes]
        lines.append(f"| {n} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def qlora_table() -> str:
    """Return a Markdown table of GB on one GPU, in parts, with quantised weights below adapters of rank 16: each of MODELS."""
    lines = []
    for method in ("nf4", "int8"):
        for name, config in MODELS.items():
            memory = device_memory(_with_adapters(config, method), **PAIR)
            if not lines:
                lines = [f"| | | {' | '.join(memory)} | GB |", "|---|---|" + "---:|" * (len(memory) + 1)]
            cells = [*memory.values(), sum(memory.values())]
            lines.append(f"| {name} | {method} | {' | '.join(f'{cell / 1e9:.1f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _with_adapters(config: transformers.PreTrainedConfig, method: Optional[str]) -> ModelShape:
    model = empty_model(config)
    if method is not None:
        emptied(model, method, torch.bfloat16)
    attach(model, LORA, torch.float32, 0)
    return ModelShape.of_model(model)


if __name__ == "__main__":
    print(tables())
    print(lora_table())
    print(qlora_table())
