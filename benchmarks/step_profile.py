"""Where the time of a step of fast scoring goes on a CPU, part by part, and what its matrix products alone would take.

    python benchmarks/step_profile.py                      # tdpo2, the model and the pairs of step.py
    python benchmarks/step_profile.py --dtype bfloat16 --pairs 64 --microbatch 32

The parts are sums of PyTorch's profiler over one step, its own time apart; the step is also timed without the profiler. Every matrix
product and attention of the step, in the shapes in which the step calls it, is then timed alone: `products` is their sum, the least that
the step could take with these shapes. Steps and products take turns in each round, because a machine drifts.
"""

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

from benchmarks import step  # noqa: E402
from benchmarks.step import LOSSES, MODELS, OwnStep, Setting, hh_pairs, policy_and_reference  # noqa: E402
from tdpo.losses import get_objective  # noqa: E402
from tdpo.optimizers import make_optimizer  # noqa: E402
from tdpo.scoring.scorer import Scorer  # noqa: E402
from tdpo.utils import DTYPES  # noqa: E402

CPU = torch.device("cpu")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = ATTENTION + "_backward"
PARTS = ("head: products", "head: element-wise", "body: products", "attention", "body: element-wise", "optimizer", "data", "other")


def make_step(loss: str, dtype: torch.dtype, pairs: int, microbatch: int, vocabulary: int, way: str = "fast") -> OwnStep:
    """Return a step as step.py times it, of its small model."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=vocabulary, max_position_embeddings=2048, **MODELS["small"])
    policy, reference = policy_and_reference(config, dtype, CPU)
    optimizer = make_optimizer("RMSprop", [list(policy.parameters())], 0.0, {}, device=CPU)
    objective = get_objective(loss, **LOSSES[loss])
    scorer = Scorer(policy, reference if objective.needs_reference else None, objective)
    return OwnStep(way, Setting(scorer, loss, hh_pairs(pairs, vocabulary), microbatch, CPU), optimizer, dtype)


def profile(run: Callable[[], float]) -> tuple[list, float]:
    """Return the events of PyTorch's profiler for one step, and its seconds."""
    making = step.shared_prefix_batch

    def recorded(*arguments):
        with torch.profiler.record_function("data"):
            return making(*arguments)

    step.shared_prefix_batch = recorded
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
            took = seconds(run)
    finally:
        step.shared_prefix_batch = making
    return profiler.events(), took


def part_of(event, vocabulary: int) -> str:
    """Return the part of a step to which an event's own time belongs."""
    parents, parent = [], event
    while parent is not None:
        parents.append(parent.name)
        parent = parent.cpu_parent
    if "data" in parents:
        return "data"
    if any(name.startswith("Optimizer.") or "linalg_vector_norm" in name or "clip_grad" in name for name in parents):
        return "optimizer"
    of_head = any(isinstance(shape, list) and vocabulary in shape for shape in event.input_shapes)
    if event.name in PRODUCTS:
        return "head: products" if of_head else "body: products"
    if event.name in (ATTENTION, BACKWARD):
        return "attention"
    if not event.name.startswith("aten::"):
        return "other"
    if any("AccumulateGrad" in name or "Embedding" in name for name in parents):
        return "other"
    return "head: element-wise" if of_head or "_LossOfRows" in parents else "body: element-wise"


def parts_of(events: list, took: float, vocabulary: int) -> dict[str, float]:
    """Return the seconds of each part of a step that took so many; what is of no operation belongs to "other"."""
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        parts[part_of(event, vocabulary)] += event.self_cpu_time_total / 1e6
    parts["other"] += max(0.0, took - sum(parts.values()))
    return parts


def products_of(events: list) -> Counter:
    """Return how often a step computes each product or attention: (name, shapes of its inputs) to number."""
    return Counter(
        (event.name, tuple(map(tuple, (shape for shape in event.input_shapes if isinstance(shape, list)))))
        for event in events
        if event.name in (*PRODUCTS, ATTENTION, BACKWARD)
    )


def bare(name: str, shapes: tuple, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that computes a product, or attention, of random numbers in these shapes."""
    if name in PRODUCTS:
        matrices = [shape for shape in shapes if len(shape) >= 2]  # with `out` last, and first what addmm_ adds to
        first = 1 if name.startswith("aten::addmm") and len(shapes[0]) == 2 else 0
        a, b = (torch.randn(shape, dtype=dtype) for shape in matrices[first : first + 2])
        out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=dtype)
        return lambda: torch.matmul(a, b, out=out)
    four = [shape for shape in shapes if len(shape) == 4]
    query, key, value = (torch.randn(shape, dtype=dtype) for shape in (four[:3] if name == ATTENTION else four[1:4]))
    mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=dtype)
    if name == ATTENTION:
        return lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def seconds(function: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def time_products(products: Counter, dtype: torch.dtype) -> float:
    """Return the seconds of all products of a step, each timed alone in its shapes: the better of two calls after one to warm up."""
    total = 0.0
    for (name, shapes), number in products.items():
        function = bare(name, shapes, dtype)
        function()
        total += number * min(seconds(function), seconds(function))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="tdpo2")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype in which policy and reference compute")
    parser.add_argument("--way", choices=["fast", "unpacked"], default="fast", help="several pairs in a row, or one")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    dtype = DTYPES[arguments.dtype]
    run = make_step(arguments.loss, dtype, arguments.pairs, arguments.microbatch, arguments.vocabulary, arguments.way)
    run()
    products = products_of(profile(run)[0])
    rounds = [(seconds(run), time_products(products, dtype)) for _ in range(arguments.rounds)]
    parts = parts_of(*profile(run), arguments.vocabulary)
    whole, alone = (statistics.median(some) for some in zip(*rounds))
    sizes = f"{arguments.pairs} pairs in microbatches of {arguments.microbatch}"
    print(f"{arguments.loss}, {arguments.way}, {arguments.dtype}, {sizes}, torch {torch.__version__}\n")
    print("| part | s | share |\n|---|---:|---:|")
    total = sum(parts.values())
    for part in PARTS:
        print(f"| {part} | {parts[part]:.2f} | {parts[part] / total:.0%} |")
    ratio = statistics.median(a / b for a, b in rounds)
    print(f"\nstep {whole:.2f} s, products and attention alone {alone:.2f} s, ratio {ratio:.2f}; with the profiler {total:.2f} s")


if __name__ == "__main__":
    main()
