"""Measure the chunked head and loss alone: time relative to its matrix products, and peak memory, by vocabulary and positions.

    python benchmarks/loss.py
    python benchmarks/loss.py --hidden 4096 --dtype bfloat16 --device cuda

The script runs tdpo2 with the gradients of hidden states and head weight, on pairs with 128 + 128 response tokens. The lower bound is the
time of four matrix products of size (positions, hidden) x (hidden, vocabulary): logits of policy and reference, and the two gradients. They
are timed in chunks of the same size, into preallocated memory. Memory is the peak above inputs, weights and their gradients (see step.py).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks.step import Memory, synchronize  # noqa: E402
from tdpo.gpu import prepare_gpu  # noqa: E402
from tdpo.losses import get_objective  # noqa: E402
from tdpo.scoring.chunked_loss import ReferenceStates, loss_of_rows  # noqa: E402
from tdpo.scoring.distributions import CHUNK  # noqa: E402
from tdpo.scoring.head import Head  # noqa: E402
from tdpo.scoring.prefix_sharing import shared_prefix_batch  # noqa: E402
from tdpo.utils import DTYPES  # noqa: E402

SIDE = 128  # response tokens of the chosen and of the rejected response


def seconds(function, device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call over some rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def floor(positions: int, hidden: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of the four matrix products."""
    size = min(CHUNK[device.type], positions)
    states, weight = (torch.randn(n, hidden, device=device, dtype=dtype) for n in (size, vocabulary))
    logits = torch.empty(size, vocabulary, device=device, dtype=dtype)
    gradients = torch.empty_like(states), torch.zeros_like(weight)

    def products() -> None:
        for _ in range(2):
            torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=gradients[0])
        gradients[1].addmm_(logits.t(), states)

    products()
    return seconds(products, device, 3) * positions / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 50_304, 128_256, 152_064])
    parser.add_argument("--positions", type=int, nargs="+", default=[1_024, 8_192, 65_536])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    chunks = f"chunks of {CHUNK[device.type]} positions"
    print(f"hidden {arguments.hidden}, {arguments.dtype}, {device.type}, {chunks}; torch {torch.__version__}\n")
    print("| vocabulary | positions | s | matrix products alone, s | ratio | peak MB | both models' float32 logits, MB |")
    print("|" + "---:|" * 7)
    for vocabulary in arguments.vocabularies:
        for positions in arguments.positions:
            print(row(arguments, vocabulary, positions, device, dtype), flush=True)


class Measured(NamedTuple):
    """Measurements of one case: seconds with gradients, seconds of the matrix products alone, and peak bytes."""

    seconds: float
    products: float
    peak: int


def measured(
    hidden: int, vocabulary: int, positions: int, device: torch.device, dtype: torch.dtype, compiled: bool, rounds: int, warm_up: bool
) -> Measured:
    """Measure one case. `warm_up`: run it once before."""
    prepare_gpu()
    torch.manual_seed(0)
    states = torch.randn(positions, hidden, device=device, dtype=dtype, requires_grad=True)
    weights = [(0.02 * torch.randn(vocabulary, hidden, device=device)).to(dtype) for _ in range(2)]
    weights[0].requires_grad_()
    rows = shared_prefix_batch([([1], [[2] * SIDE, [3] * SIDE])] * (positions // (2 * SIDE))).to(device)
    reference = ReferenceStates(states.detach() + 0.1, Head(weights[1], None, compiled=compiled))
    states.grad, weights[0].grad = torch.zeros_like(states), torch.zeros_like(weights[0])
    objective = get_objective("tdpo2", beta=0.1, alpha=0.5)

    def run() -> None:
        head = Head(weights[0], None, compiled=compiled)
        loss_of_rows(states, head, reference, rows, objective, len(rows.counts))[0].backward()

    if warm_up:
        run()
    with Memory(device) as memory:
        elapsed = seconds(run, device, rounds)
    return Measured(elapsed, floor(positions, hidden, vocabulary, device, dtype), memory.peak)


def row(arguments: argparse.Namespace, vocabulary: int, positions: int, device: torch.device, dtype: torch.dtype) -> str:
    """Measure one case. Returns its row of the Markdown table."""
    warm_up = positions == arguments.positions[0]
    given = arguments.hidden, vocabulary, positions, device, dtype, arguments.compile, arguments.rounds, warm_up
    elapsed, least, peak = measured(*given)
    whole = 2 * 4 * positions * vocabulary
    cells = f"{elapsed:.2f} | {least:.2f} | {elapsed / least:.2f} | {peak / 1e6:,.0f} | {whole / 1e6:,.0f}"
    return f"| {vocabulary:,} | {positions:,} | {cells} |"


if __name__ == "__main__":
    main()
