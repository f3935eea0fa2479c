"""How fast a run is, how much memory it takes, and when it will end."""

import resource
import sys
import time
from typing import Optional

import torch


class Pace:
    """The speed of the last step, and the time that is left.

    Args:
        device: of this process.
        total: train examples of the whole run.
    """

    def __init__(self, device: torch.device, total: int):
        self.device, self.total = device, total
        self.begun: Optional[tuple[float, int]] = None  # time and train examples at the end of this process's first step

    def after_step(self, examples: int, tokens: int, seconds: float, so_far: int) -> dict[str, float]:
        """Return the metrics of a step; evals, samples and checkpoints since the first step of this process count in the time that is left.

        Args:
            examples: of the step, on all ranks.
            tokens: of these examples, each prompt counted once, without padding.
            seconds: that the step took.
            so_far: train examples of the run, this step included.
        """
        now = time.perf_counter()
        if self.begun is None:
            self.begun = now, so_far
        since = so_far - self.begun[1]
        each = (now - self.begun[0]) / since if since else seconds / examples
        return {
            "examples_per_second": examples / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
            "seconds_left": max(0, self.total - so_far) * each,
        }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that PyTorch has held on a GPU, or this process on the CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
