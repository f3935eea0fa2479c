"""Measure on a CPU how fast matrix products are in bfloat16 and float16, and train steps in bfloat16, compared with float32.

    python benchmarks/dtypes.py
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/dtypes.py     # as if the processor had no newer instructions

The step is TDPO2's on 8 pairs with the lengths of HH, of a model of SmolLM2-135M's shape with random weights in float32, which computes in
both dtypes in turn. Ratios are taken within each round, because a machine drifts; their least and greatest are printed.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

from benchmarks.step import LOSSES, OwnStep, Setting, hh_pairs, policy_and_reference  # noqa: E402
from tdpo.losses import get_objective  # noqa: E402
from tdpo.optimizers import make_optimizer  # noqa: E402
from tdpo.scoring.scorer import Scorer  # noqa: E402

CPU = torch.device("cpu")
PRODUCT = 1546, 576, 1536  # tokens of 8 pairs, SmolLM2-135M's hidden size, that of its MLP
ROUNDS = 3  # after one to warm up


def product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return a function that computes a product of SmolLM2-135M's size."""
    tokens, hidden, inner = PRODUCT
    states, weights = torch.randn(tokens, hidden).to(dtype), torch.randn(inner, hidden).to(dtype)
    return lambda: F.linear(states, weights)


def step(dtype: torch.dtype) -> OwnStep:
    """Return a train step whose policy computes in a dtype, with weights in float32; the reference has the dtype."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)
    policy, reference = policy_and_reference(config, torch.float32, CPU)
    scorer = Scorer(policy, reference.to(dtype), get_objective("tdpo2", **LOSSES["tdpo2"]))
    optimizer = make_optimizer("RMSprop", [list(policy.parameters())], 0.0, {}, device=CPU)
    return OwnStep("fast", Setting(scorer, "tdpo2", hh_pairs(8, 49152), 8, CPU), optimizer, dtype)


def ratios(functions: dict[torch.dtype, Callable], calls: int) -> dict[torch.dtype, list[float]]:
    """Return the speed in each dtype, relative to float32, of each round."""
    found: dict[torch.dtype, list[float]] = {dtype: [] for dtype in functions}
    for i in range(ROUNDS + 1):
        took = {}
        for dtype, function in functions.items():
            started = time.perf_counter()
            for _ in range(calls):
                function()
            took[dtype] = time.perf_counter() - started
        for dtype in functions if i else ():
            found[dtype].append(took[torch.float32] / took[dtype])
    return found


def main() -> None:
    transformers.logging.set_verbosity_error()
    print(
        f"speed relative to float32, least and greatest of {ROUNDS} rounds; torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| | dtype | speed |\n|---|---|---:|")
    for name, make, dtypes, calls in (
        ("matrix product", product, (torch.bfloat16, torch.float16), 20),
        ("train step", step, (torch.bfloat16,), 1),  # of float16 takes minutes without instructions for it
    ):
        found = ratios({dtype: make(dtype) for dtype in (torch.float32, *dtypes)}, calls)
        for dtype in dtypes:
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {min(found[dtype]):.2f} to {max(found[dtype]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
