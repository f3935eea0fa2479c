"""Stage "reads": how often a step waits for the device, and where."""

import collections
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from benchmarks.gpu_stages.rows import Check, Measurement, Row, Sizes, Skip, attempted, judged, skipped
from benchmarks.gpu_stages.training import MIXED, Runs
from benchmarks.step import OwnStep, Setting, hh_pairs, policy_and_reference
from tdpo.losses import get_objective
from tdpo.optimizers import make_optimizer
from tdpo.scoring.scorer import Scorer

# Events of the profiler: numbers read by Python, calls that wait for the GPU, and copies from it.
EVENTS = {
    "numbers read": ("aten::_local_scalar_dense",),
    "cudaStreamSynchronize": ("cudaStreamSynchronize",),  # not cudaDeviceSynchronize, with which the profiler ends
    "copies to the host": ("Memcpy DtoH",),
}
SYNCHRONIZING = "called a synchronizing"  # in the warning of such a call; turning the warnings on gives another one
ALLOWED = 1  # a step: whether loss and norm are finite


def waits_of(function: Callable[[], object]) -> collections.Counter[str]:
    """Return the lines at which a function waits for the GPU, with counts."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found if SYNCHRONIZING in str(w.message))


def events_of(function: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Return how often each of EVENTS happens in a function."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        function()
    counts = {event.key: event.count for event in profile.key_averages()}
    return {what: sum(n for key, n in counts.items() if key.startswith(keys)) for what, keys in EVENTS.items()}


def report(what: str, step: Callable[[], object], device: torch.device) -> Iterator[Row]:
    """Count the waits of a step, which has been run before."""
    yield Measurement("waits of a step", {"step": what, **events_of(step, device)})
    yield waits_check(what, waits_of(step)) if device.type == "cuda" else skipped(f"{what}: waits for the device")


def waits_check(what: str, waits: collections.Counter[str]) -> Check:
    """Return a check that there are not more than ALLOWED waits."""
    lines = ", ".join(f"{line} x {n}" for line, n in waits.most_common(8))
    return judged(f"{what}: waits for the device", sum(waits.values()) <= ALLOWED, lines or "none")


def own_step(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Count the waits of a step as step.py computes it, which reads its loss at the end."""
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.GPTNeoXConfig(vocab_size=512, max_position_embeddings=1024, **fields)
    policy, reference = policy_and_reference(config, torch.bfloat16, device)
    optimizer = make_optimizer("RMSprop", [list(policy.parameters())], 0.0, {}, device=device)
    scorer = Scorer(policy, reference, get_objective("tdpo2", beta=0.1, alpha=0.5))
    step = OwnStep("fast", Setting(scorer, "tdpo2", hh_pairs(4, 512), 2, device), optimizer, torch.bfloat16)
    step()  # makes the optimizer's state
    yield from report("a step of step.py", step, device)


def trained_step(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Count the waits of `train_step` in a run of train.py: of the third step by the profiler, of the fourth by line."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        runs = Runs(folder, sizes)
        import trainers  # here, because its packages may be missing

        found, whole = {}, trainers.BasicTrainer.train_step
        measures = {3: lambda step: events_of(step, device), 4: waits_of if device.type == "cuda" else lambda step: step()}
        calls = iter(range(1, 100))

        def counted(trainer, *given):
            results = []

            def step() -> None:
                results.append(whole(trainer, *given))

            call = next(calls)
            found[call] = measures[call](step) if call in measures else step()
            return results[0]

        trainers.BasicTrainer.train_step = counted
        try:
            runs.run("reads", "loss=tdpo2", MIXED, runs.few(4), "gradient_accumulation_steps=2", "debug=true")
        finally:
            trainers.BasicTrainer.train_step = whole
    yield Measurement("waits of a step", {"step": "train_step", **found[3]})
    yield waits_check("train_step", found[4]) if device.type == "cuda" else skipped("train_step: waits for the device")


def stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Count the waits of step.py's step, and of the trainer's if its packages are installed."""
    yield from attempted("a step of step.py", lambda: own_step(sizes, device))
    try:
        yield from trained_step(sizes, device)
    except Skip as reason:
        yield skipped("train_step: waits for the device", str(reason))
