"""Stage "environment": what machine this is, and whether its GPU can be used."""

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu_stages.rows import Measurement, Row, Sizes, judged, skipped

PACKAGES = (
    "torch transformers triton numpy hydra-core omegaconf datasets pydantic beautifulsoup4 wandb peft bitsandbytes accelerate trl"
).split()


def machine(device: str) -> dict[str, Any]:
    """Return versions, and of the card its name and memory. Called in a process of its own, because it starts CUDA."""
    facts: dict[str, Any] = {"python": platform.python_version(), "has_cuda": torch.cuda.is_available()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    if device == "cpu" or not facts["has_cuda"]:
        return facts | {"card": f"none ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"}
    free, total = torch.cuda.mem_get_info()
    return facts | {
        "card": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
    }


def stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Yield what is known of the machine, and whether a product on the device and bfloat16 work."""
    facts = machine(device.type)
    yield from (Measurement("machine", {"what": name, "value": value}) for name, value in facts.items())
    yield judged("sum of 1 ... 4 on the device", torch.arange(1, 5, device=device).sum().item() == 10)
    if device.type != "cuda":
        yield skipped("bfloat16, cuDNN's attention off, memory free")
        return
    yield judged("bfloat16 is supported", torch.cuda.is_bf16_supported())
    yield judged("cuDNN's attention is off", not torch.backends.cuda.cudnn_sdp_enabled())
    yield judged("nobody else uses the card", facts["free_gib"] > 0.9 * facts["memory_gib"], f"{facts['free_gib']} GiB free")
