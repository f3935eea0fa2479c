"""A model of the time of one optimizer step, and the tables of docs/scaling.md: python benchmarks/step_time.py

step_work.py counts what fast scoring does on one GPU: FLOPs, bytes of element-wise passes, kernels started, bytes gathered and reduced
over links. tests/test_step_time.py compares these counts with what a small run does. `step_time` divides them by the rates of a card and of
its links. The rates are assumptions (`Card`, `Link`); no time here is measured.

What it assumes:

- Matrix products, attention and element-wise passes run one after another, each at its rate whatever its size (a roofline).
- Every rank has the work of the one with most tokens; ranks that wait for each other are not modelled beyond that.
- FSDP gathers a block while the block before it computes, so that a phase (forward, reference, backward) takes the longer of computing and
  communicating. Not hidden are the gather of embeddings and head and of a phase's first block, and the last reduction, that of embeddings
  and head. Communication does not slow down kernels beside it.
- The host runs ahead of the device; where starting kernels and collectives takes longer than the device's work, the step takes that long.
- bfloat16 compute, float32 trained weights and RMSprop; with LoRA the frozen weights are in bfloat16. No torch.compile.

Left out: building the masks and reading them within attention, rotary tables, metrics, logs, loading data, evaluation, checkpoints, and the
second pass over a row whose responses have more tokens than a chunk of the head.

Units: FLOP (a multiplication and an addition are two), bytes, seconds, tokens. H: hidden size, V: vocabulary entries.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks.step_work import Batch, Card, Collective, Link, Model, Options, Work, step_work  # noqa: E402
from tdpo.microbatches import cut_into_rows  # noqa: E402
from tdpo.models.memory import device_memory  # noqa: E402
from tdpo.scoring.probes import packing_of  # noqa: E402

MAX_LENGTH = 512  # tokens of prompt and response, the default, on which the width of rows depends


@dataclass(frozen=True)
class Times:
    """Seconds of a step.

    Args:
        parts: by what takes them: products, attention, passes (element-wise), head, weights (gradients and optimizer), link (communication
            that no computing hides), host (what the device waits for the host).
        compute, link, host: what the device's kernels, all collectives, and the host would take alone.
    """

    parts: dict[str, float]
    compute: float
    link: float
    host: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """Which of compute, link and host takes longest by itself."""
        return max(("compute", "link", "host"), key=lambda name: getattr(self, name))


def step_time(work: Work, card: Card, link: Link) -> Times:
    """Return the seconds of a step."""
    body = work.parts["forward"] + work.parts["reference"] + work.parts["backward"]
    parts = {
        "products": body.matmul / card.matmul,
        "attention": body.attention / card.attention,
        "passes": body.bytes / card.bandwidth,
        "head": work.parts["head"].seconds(card),
        "weights": (work.parts["gradients"] + work.parts["optimizer"]).seconds(card),
    }
    compute = sum(parts.values())
    parts["link"] = _exposed(work, card, link)
    total_link = sum(each.count * _seconds(each, work, link) for each in work.collectives)
    host = card.launch * work.total.kernels + link.host * sum(each.count for each in work.collectives)
    parts["host"] = max(0.0, host - sum(parts.values()))
    return Times(parts, compute, total_link, host)


def _seconds(collective: Collective, work: Work, link: Link) -> float:
    """Return the seconds of one collective."""
    if collective.kind == "all-reduce":
        return link.replicated(collective.bytes, work.replicas)
    return link.sharded(collective.bytes, work.shards)


def _exposed(work: Work, card: Card, link: Link) -> float:
    """Return the seconds of communication that are not hidden behind computing (see the assumptions above)."""
    exposed = 0.0
    for phase in ("forward", "reference", "backward"):
        own = [each for each in work.collectives if each.phase == phase]
        seconds = {(each.kind, each.unit): _seconds(each, work, link) for each in own}
        counts = {(each.kind, each.unit): each.count for each in own}
        total = {kind: sum(counts[key] * seconds[key] for key in counts if key[0] == kind) for kind in ("gather", "reduce", "all-reduce")}
        compute = work.parts[phase].seconds(card)
        if phase != "backward":
            first = sum(work.microbatches * seconds[key] for key in seconds)  # one root and one block per microbatch
            exposed += first + max(0.0, total["gather"] - first - compute)
            continue
        reducing = 1 if work.reduces_once else work.microbatches  # backward passes that reduce
        last = reducing * sum(value for key, value in seconds.items() if key in (("reduce", "root"), ("all-reduce", "root")))
        share, others = reducing / work.microbatches, 1 - reducing / work.microbatches
        exposed += others * max(0.0, total["gather"] - compute) + last
        # Gathers and reductions share the links between shards; replicas are reduced over the network at the same time.
        busy = max(share * total["gather"] + total["reduce"], total["all-reduce"])
        exposed += max(0.0, busy - last - share * compute)
    return exposed


# --- tables ---

GPUS = (1, 2, 4, 8, 16, 32, 64, 512)
PAIRS = 64  # per step up to 8 GPUs, as published; then 8 per GPU
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)


@functools.cache
def hh_lengths() -> list[tuple[int, int, int]]:
    """Return the tokens of (prompt, chosen, rejected) of 256 HH pairs."""
    lines = (ROOT / "benchmarks" / "hh_lengths.txt").read_text().splitlines()
    return [tuple(map(int, part.split("-"))) for line in lines if line[0] != "#" for part in line.split()]


@functools.cache
def hh_batch(pairs: int, gpus: int, microbatches: int, hidden: int) -> Batch:
    """Cut a batch of HH pairs into packed rows as the trainer does, and return what the GPU with most tokens computes.

    Args:
        pairs: per step; the 256 known lengths are repeated.
        gpus: GPUs that share the pairs.
        microbatches: of each GPU.
        hidden: width of the model, on which the width of the rows depends.
    """
    lengths = [hh_lengths()[i % len(hh_lengths())] for i in range(pairs)]
    computed = [sum(each) - 2 for each in lengths]  # a response's last token is no input
    rounds = cut_into_rows(computed, gpus, microbatches, packing_of(hidden, MAX_LENGTH))

    def cut(rows: list[list[int]]) -> tuple[int, int, int]:
        """Return (rows, tokens of the longest one, response positions)."""
        return len(rows), max(sum(computed[i] for i in row) for row in rows), sum(sum(lengths[i][1:]) for row in rows for i in row)

    assert all(rows for round in rounds for rows in round), "a GPU has no pairs"
    ranks = [[cut(round[rank]) for round in rounds] for rank in range(gpus)]
    slowest = max(ranks, key=lambda parts: sum(n * width for n, width, _ in parts))
    n, width, positions = max(slowest, key=lambda part: part[0] * part[1])
    return Batch(
        sum(n * width for n, width, _ in slowest),
        sum(n * width**2 for n, width, _ in slowest),
        sum(positions for _, _, positions in slowest),
        len(rounds),
        (n * width, positions),
        sum(map(sum, lengths)),
    )


class Plan(NamedTuple):
    """How a model is trained on a number of GPUs, and what the models of memory and time say of it."""

    batch: Batch
    replicas: int
    options: Options
    memory: float  # bytes per GPU
    times: Times


def fastest(model: Model, gpus: int, pairs: int, card: Card, link: Link) -> Optional[Plan]:
    """Return the fastest plan among those whose memory fits, None if none does.

    Tried are numbers of microbatches, replicas of one or more nodes, activation_checkpointing and parallel.reduce_once_a_step.
    """
    found = []
    for microbatches in (n for n in MICROBATCHES if n <= pairs // gpus):
        batch = hh_batch(pairs, gpus, microbatches, model.shape.hidden)
        replicas = [n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or gpus // n >= link.gpus]
        several = gpus > 1 and microbatches > 1
        for replica, again, once in ((r, a, o) for r in replicas for a in (False, True) for o in ((True, False) if several else (True,))):
            options = Options(activation_checkpointing=again, reduce_once=once)
            memory = device_memory(
                model.shape,
                tokens=batch.largest[0],
                response_tokens=batch.largest[1],
                shards=gpus // replica,
                activation_checkpointing=again,
                accumulates_whole=several and once,
            )
            if sum(memory.values()) <= card.memory:
                times = step_time(step_work(model, batch, gpus, replica, options), card, link)
                found.append(Plan(batch, replica, options, sum(memory.values()), times))
    return min(found, key=lambda plan: plan.times.seconds, default=None)


def tables() -> str:
    """Return Markdown tables of the time of a TDPO2 step: each of memory_tables.MODELS on each number of GPUS, and the parts of some."""
    from benchmarks.memory_tables import MODELS  # here, because it needs what reads configs

    card, link = Card(), Link()
    lines, parts = [], []
    for name, config in MODELS.items():
        model = Model.of(config)
        header = ("GPUs", "replicas", "pairs", "microbatches", "GB", "s per step", "tokens/s", "tokens/s per GPU", "of the matmul rate")
        lines += [f"**{name}**", "", f"| {' | '.join(header)} | limit |", "|" + "---:|" * len(header) + "---|"]
        for gpus in GPUS:
            pairs = max(PAIRS, 8 * gpus)
            plan = fastest(model, gpus, pairs, card, link)
            if plan is None:
                lines.append(f"| {gpus} | | {pairs} | | | does not fit |{' |' * 4}")
                continue
            seconds, unique = plan.times.seconds, plan.batch.unique
            rate = 8 * model.useful * unique / seconds / gpus / card.matmul
            again = " *" if plan.options.activation_checkpointing else ""
            cells = (f"{gpus}", f"{plan.replicas}", f"{pairs}", f"{plan.batch.microbatches}{again}", f"{plan.memory / 1e9:.0f}")
            cells += (f"{seconds:.2f}", f"{_rounded(unique / seconds):,}", f"{_rounded(unique / seconds / gpus):,}", f"{rate:.0%}")
            lines.append(f"| {' | '.join(cells)} | {plan.times.limit} |")
            if gpus in (1, 8, 64, 512):
                values = [f"{1000 * value:.0f}" for value in plan.times.parts.values()]
                parts.append(f"| {name} | {gpus} | {' | '.join(values)} |")
        lines.append("")
    columns = list(plan.times.parts)
    return "\n".join([*lines, f"| ms per step | GPUs | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 1), *parts]) + "\n"


def _rounded(value: float) -> int:
    """Round to two digits: the assumptions carry no more."""
    return int(float(f"{value:.2g}"))


def assumptions() -> str:
    """Return a Markdown table of the rates that the tables assume."""
    card, link = Card(), Link()
    rows = [
        (f"{card.matmul / 1e12:.0f} TFLOP/s", "matrix products in bfloat16", "two thirds of the H100's peak of 989"),
        (f"{card.attention / 1e12:.0f} TFLOP/s", "attention over all pairs of positions", "PyTorch's memory-efficient kernel with a mask"),
        (f"{card.bandwidth / 1e12:.1f} TB/s", "element-wise passes, optimizer", "copying on an H100, peak 3.35"),
        (f"{card.launch * 1e6:.0f} µs", "host time per kernel", "eager PyTorch with autograd; `compile=true` starts fewer kernels"),
        (f"{link.host * 1e3:.1f} ms", "host time per collective", "hooks and copies of FSDP"),
        (f"{link.bus / 1e9:.0f} GB/s", "all-gather and reduce-scatter, each GPU of a node", "NVLink 4 of an H100, peak 450"),
        (f"{link.network / 1e9:.0f} GB/s", "network, each GPU", f"400 Gbit/s; the {link.gpus} cards of a node share what enters it"),
        (
            f"{link.start * 1e6:.1f} + {link.hop * 1e6:.1f} + {link.network_hop * 1e6:.0f} µs",
            "a collective, a step of its ring in a node, between nodes",
            "NCCL's own model of its protocol Simple",
        ),
        (f"{card.memory / 1e9:.0f} GB", "memory of a GPU", "the estimate above, without CUDA's own memory"),
    ]
    return "\n".join(["| assumed | of what | why this number |", "|---:|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    print(assumptions())
    print(tables())
