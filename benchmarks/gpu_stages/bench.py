"""One model whose steps are measured: on batches of new shapes, with the rate of the machine and the memory beside what was estimated."""

import gc
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
import transformers
from torch import nn

from benchmarks.gpu_stages.rows import Measurement, Row, Sizes
from benchmarks.step import (
    LOSSES,
    OwnStep,
    Pair,
    Setting,
    by_length,
    hh_pairs,
    in_rows,
    matmul_rate,
    measure,
    policy_and_reference,
    synchronize,
)
from tdpo.losses import get_objective
from tdpo.models.memory import ModelShape, device_memory
from tdpo.optimizers import copies_in_step, make_optimizer
from tdpo.scoring.distributions import chunk_size
from tdpo.scoring.prefix_sharing import row_multiple, shared_prefix_batch
from tdpo.scoring.scorer import Scorer

# Kinds of kernels by parts of their names; the first that fits.
KINDS = {
    "attention": ("fmha", "flash", "attention", "sdpa", "flex"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "matmul", "wgmma"),
    "optimizer": ("multi_tensor_apply", "foreach", "fused_adam"),
    "copies": ("memcpy", "memset", "copy_kernel", "copy_device"),
}
OTHER = "element-wise and rest"


def drawn(config: transformers.PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Draw a policy in float32 and a reference in `dtype` on the device; always the same."""
    torch.manual_seed(0)
    return policy_and_reference(config, dtype, device)


class Result(NamedTuple):
    """What a step computes."""

    loss: float
    norm: float  # of the gradient, before it is clipped


class Rotation:
    """A step that takes the next batch at each call, so that its shapes are new, as in training.

    Args:
        steps: one per batch.

    Raises:
        RuntimeError: when called: the loss, or the norm of the gradient, is not finite.
    """

    def __init__(self, steps: list[OwnStep]):
        self.steps, self.results = steps, []

    def __call__(self) -> float:
        step = self.steps[len(self.results) % len(self.steps)]
        result = Result(step(), float(step.norm))
        for what, value in zip(("loss", "gradient norm"), result):
            if not math.isfinite(value):
                raise RuntimeError(f"{what} is not finite")
        self.results.append(result)
        return result.loss


class Measured(NamedTuple):
    """Measurements of a step."""

    seconds: float  # median
    results: list[Result]  # of each call
    columns: dict[str, Any]  # of the table
    estimate_ratio: Optional[float]  # measured over estimated peak memory; None on a CPU


class Bench:
    """A model with its batches.

    Args:
        policy, reference: on the device. The reference may be the policy with its adapters off.
        dtype: in which they compute.
        device: where they are.
        sizes: pairs of a batch, and rounds.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, dtype: torch.dtype, device: torch.device, sizes: Sizes):
        self.policy, self.reference, self.dtype, self.device, self.rounds = policy, reference, dtype, device, sizes.rounds
        self.compiled = False  # whether the operations on logits are
        self.packed = True  # whether a row holds several pairs
        pairs = hh_pairs(sizes.pairs * (sizes.rounds + 1), policy.config.vocab_size)
        self.batches = [pairs[i : i + sizes.pairs] for i in range(0, len(pairs), sizes.pairs)]
        self.rate = matmul_rate(device, torch.bfloat16, sizes.product)
        self.shape = ModelShape.of_model(policy)
        self.trained = [p for p in policy.parameters() if p.requires_grad]

    def free(self) -> None:
        """Give the memory of the models back."""
        self.policy = self.reference = self.trained = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def setting(self, pairs: list[Pair], microbatch: int, loss: str = "tdpo2") -> Setting:
        """Return step.py's inputs for pairs."""
        scorer = Scorer(self.policy, self.reference, get_objective(loss, **LOSSES[loss]), self.compiled)
        return Setting(scorer, loss, pairs, microbatch, self.device)

    def optimizer(self, options: dict[str, Any]) -> torch.optim.Optimizer:
        """Return an optimizer that changes nothing, with a learning rate of 0. Its name is among the options; RMSprop if it is not."""
        name = options.pop("name", "RMSprop")
        return make_optimizer(name, [self.trained], 0.0, options, device=self.device)

    def step(self, way: str, pairs: list[Pair], microbatch: int, loss: str = "tdpo2") -> OwnStep:
        """Return a step of one of step.py's ways."""
        return OwnStep(way, self.setting(pairs, microbatch, loss), self.optimizer({}), self.dtype)

    def measured(self, microbatch: int, options: dict[str, Any], compiles: bool = False) -> Measured:
        """Measure fast steps with TDPO2.

        Args:
            microbatch: pairs.
            options: of the optimizer.
            compiles: whether new shapes may be compiled, so that every batch must have been seen before times are taken.
        """
        states = 2 if options.get("name") == "AdamW" else 1
        copies = copies_in_step(options.get("name", "RMSprop"), options, sharded=False, on_gpu=self.device.type == "cuda")
        settings = [self.setting(pairs, microbatch) for pairs in self.batches]
        optimizer = self.optimizer(options)
        step = Rotation([OwnStep("fast" if self.packed else "unpacked", setting, optimizer, self.dtype) for setting in settings])
        for _ in self.batches if compiles else ():
            step()
        times, peaks, _ = measure({"fast": step}, self.rounds, self.device)["fast"]
        timed = self.batches[1 : 1 + self.rounds]
        tokens = [sum(len(prompt) + sum(map(len, responses)) for prompt, responses in pairs) for pairs in timed]
        rate = statistics.median(n / elapsed for n, elapsed in zip(tokens, times))
        columns = {"s": round(statistics.median(times), 4), "spread": round(max(times) - min(times), 4), "tokens/s": round(rate)}
        columns["of product rate"] = f"{self.flop_per_token() * rate / self.rate:.1%}"
        if self.device.type != "cuda":
            return Measured(statistics.median(times), step.results, {**columns, "peak GiB": round(peaks[0] / 2**30, 2)}, None)
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()  # since the round for memory began
        estimate = self.estimate(settings, states, copies)
        sizes = {"peak GiB": allocated, "reserved": reserved, "estimate": estimate}
        columns |= {name: round(value / 2**30, 1) for name, value in sizes.items()}
        return Measured(statistics.median(times), step.results, columns, allocated / estimate)

    def flop_per_token(self) -> float:
        """Return the FLOP of the model for a unique token: forward and backward pass of the policy, forward pass of the reference."""
        every = sum(p.numel() for p in self.policy.parameters()) - self.policy.get_input_embeddings().weight.numel()
        return (6 if hasattr(self.reference, "is_policy") else 8) * every  # frozen weights have no gradient

    def estimate(self, settings: list[Setting], states: int, copies: int) -> int:
        """Return the peak that memory.py estimates for these batches; the optimizer keeps `states` numbers per weight, and computes in
        `copies`."""
        alone = [(part, None) for setting in settings for part in by_length(setting)]
        parts = [part for setting in settings for part in in_rows(setting)] if self.packed else alone
        tokens = max(shared_prefix_batch(part, row_multiple(self.device), per_row).input_ids.numel() for part, per_row in parts)
        responses = max(sum(len(r) for _, responses in part for r in responses) for part, _ in parts)
        sizes = {"weight_bytes": self.trained[0].dtype.itemsize, "compute_bytes": self.dtype.itemsize}
        sizes |= {"optimizer_states": states, "optimizer_copies": copies}
        given = {"tokens": tokens, "response_tokens": responses, "activation_checkpointing": False, "chunk": chunk_size(self.device)}
        return sum(device_memory(self.shape, **sizes, **given).values())

    def profiled(self, microbatch: int) -> Iterator[Row]:
        """Yield the milliseconds of a step's kernels by kind, and those in which the GPU was idle."""
        step = self.step("fast", self.batches[0], microbatch)
        step()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            synchronize(self.device)
        times, whole = by_kind([event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA])
        for kind, value in {**times, "idle": max(0.0, whole - sum(times.values()))}.items():
            share = f"{value / whole:.0%}" if whole else ""
            yield Measurement("kernels of a step", {"kind": kind, "ms": round(value, 1), "share": share})


def by_kind(events: list) -> tuple[dict[str, float], float]:
    """Return the milliseconds of kernels by kind, and those from the first one to the last. Kernels that an optimizer's step has started
    are its own, whatever their names.

    Args:
        events: of the profiler, on the GPU: kernels, and ranges of annotations, of which a step of an optimizer is one.
    """

    def is_mark(event) -> bool:
        return getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep"))

    updates = [event.time_range for event in events if event.name.startswith("Optimizer.step")]
    times, ends = dict.fromkeys([*KINDS, OTHER], 0.0), []
    for event in events:
        if is_mark(event):
            continue
        name, own = event.name.lower(), event.time_range
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)
        if any(update.start <= own.start and own.end <= update.end for update in updates):
            kind = "optimizer"
        times[kind] += own.elapsed_us() / 1e3
        ends += [own.start, own.end]
    return times, (max(ends) - min(ends)) / 1e3 if ends else 0.0
