"""Measure time and peak memory of one optimizer step (forward, backward, optimizer) with the published computation, plain scoring, fast
scoring, and TRL's DPOTrainer if it is installed.

    python benchmarks/step.py                                     # tdpo2 on a CPU or a GPU, a small GPT-NeoX
    python benchmarks/step.py --loss dpo --ways fast trl          # against TRL
    python benchmarks/step.py --loss tdpo2 dpo --ways fast        # what SeqKL costs
    python benchmarks/step.py --model pythia28 --dtype bfloat16 --pairs 64 --device cuda

All ways use the same weights and the same pairs: random tokens with the lengths of hh_lengths.txt. They take turns in each round, so that
drift of the machine affects all of them. The learning rate is 0, so all must print the same loss. The reference is the policy plus noise.
The script prints medians over the rounds, and medians of each round's speed-up over the first way. Memory is measured in a round of its
own, after those that are timed, because it begins with giving freed memory back: the peak above what the process holds before the step,
models and optimizer included: resident memory on a CPU (Linux), memory allocated by PyTorch on a GPU.

TRL's head is chunked too. On a GPU it computes response positions alone; on a CPU prompts and padding as well, so that the ratio to TRL on
a CPU says little about a GPU.

Model-FLOP utilisation, on a GPU only: (6 N t + 2 N t_reference) / seconds / measured rate of a large matrix product. N is the number of
parameters without input embeddings, t the number of unique tokens (a prompt once, no padding), whatever a way computes in addition.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

from tdpo.gpu import prepare_gpu  # noqa: E402
from tdpo.losses import get_objective, tdpo_loss  # noqa: E402
from tdpo.microbatches import cut_into_microbatches, cut_into_rows  # noqa: E402
from tdpo.optimizers import make_optimizer  # noqa: E402
from tdpo.scoring.logps import concatenated_inputs  # noqa: E402
from tdpo.scoring.mixed_precision import cast_parameters  # noqa: E402
from tdpo.scoring.prefix_sharing import row_multiple, shared_prefix_batch  # noqa: E402
from tdpo.scoring.probes import packing_of  # noqa: E402
from tdpo.scoring.scorer import Scorer  # noqa: E402
from tdpo.utils import DTYPES, IGNORED, disable_dropout  # noqa: E402

MODELS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "pythia28": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
}
MAX_LENGTH = 512  # tokens of prompt and response, the default, on which the width of rows depends
LOSSES = {"tdpo2": {"beta": 0.1, "alpha": 0.5}, "dpo": {"beta": 0.1}, "sft": {}}
# In TRL 1.16 padding_free falls back with a warning, and use_liger_kernel does not reach the DPO loss: both are this one mode.
TRL_MODES = {"": {}, ", reference computed before": {"precompute_ref_log_probs": True}}
Pair = tuple[list[int], list[list[int]]]  # prompt, (chosen, rejected)


def hh_pairs(n: int, vocabulary: int) -> list[Pair]:
    """Return n pairs of random tokens with the lengths of HH pairs; responses end with token 0, end-of-sequence."""
    lines = (Path(__file__).parent / "hh_lengths.txt").read_text().splitlines()
    lengths = [tuple(map(int, part.split("-"))) for line in lines if line[0] != "#" for part in line.split()]
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    return [(tokens(a), [tokens(b - 1) + [0], tokens(c - 1) + [0]]) for a, b, c in (lengths[i % len(lengths)] for i in range(n))]


def collated(pairs: list[Pair], width: int) -> dict[str, torch.Tensor]:
    """Return chosen and rejected padded to `width` tokens, as collate_fn does."""
    batch = {}
    for i, role in enumerate(("chosen", "rejected")):
        shape = len(pairs), width
        ids, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for row, (prompt, responses) in enumerate(pairs):
            end = len(prompt) + len(responses[i])
            ids[row, :end], mask[row, :end] = torch.tensor(prompt + responses[i]), 1
            labels[row, len(prompt) : end] = torch.tensor(responses[i])
        batch |= {f"{role}_input_ids": ids, f"{role}_attention_mask": mask, f"{role}_labels": labels}
    return batch


def width_of(pairs: list[Pair]) -> int:
    """Return the tokens of the longest prompt with a response."""
    return max(len(prompt) + max(map(len, responses)) for prompt, responses in pairs)


class Setting(NamedTuple):
    """The inputs of a way of computing a step."""

    scorer: Scorer
    loss: str
    pairs: list[Pair]
    microbatch: int  # pairs
    device: torch.device


def published(setting: Setting) -> list[Callable[[], torch.Tensor]]:
    """Return one function per microbatch, which computes its summed loss with the arithmetic of the published trainer.

    That is: float32 logits, softmax and log-softmax at all positions, masks by multiplication, padding to the longest of the global batch.
    """
    policy, reference = setting.scorer.policy, setting.scorer.reference

    def loss(pairs: list[Pair]) -> torch.Tensor:
        batch = {k: v.to(setting.device) for k, v in concatenated_inputs(collated(pairs, width_of(setting.pairs))).items()}
        inputs = {"input_ids": batch["concatenated_input_ids"], "attention_mask": batch["concatenated_attention_mask"], "use_cache": False}
        logits = policy(**inputs).logits.to(torch.float32)[:, :-1]
        labels = batch["concatenated_labels"][:, 1:].clone()
        mask = labels != IGNORED
        labels[~mask] = 0
        if setting.loss == "sft":
            return -(logits[: len(pairs)].log_softmax(-1).gather(2, labels[: len(pairs), :, None])[..., 0] * mask[: len(pairs)]).sum()
        with torch.no_grad():
            reference_logits = reference(**inputs).logits.to(torch.float32)[:, :-1]
        n = len(pairs)
        if setting.loss == "dpo":
            logps = (logits.log_softmax(-1).gather(2, labels[..., None])[..., 0] * mask).sum(-1)
            reference_logps = (reference_logits.log_softmax(-1).gather(2, labels[..., None])[..., 0] * mask).sum(-1)
            return -F.logsigmoid(0.1 * (logps[:n] - logps[n:] - (reference_logps[:n] - reference_logps[n:]))).sum()
        logps = logits.log_softmax(-1)
        reference_probabilities = reference_logits.softmax(-1)
        reference_logps = reference_probabilities.log()
        kl = (reference_probabilities * (reference_logps - logps)).sum(-1)
        margin = (logps.gather(2, labels[..., None]) - reference_logps.gather(2, labels[..., None]))[..., 0]
        margins, kls = (margin * mask).sum(-1), (kl * mask).sum(-1)
        return tdpo_loss(margins[:n], margins[n:], kls[:n], kls[n:], beta=0.1, alpha=0.5)[0].sum()

    return [lambda part=part: loss(part) for part in in_order(setting)]


def in_order(setting: Setting) -> list[list[Pair]]:
    """Return the microbatches in the given order of pairs."""
    return [setting.pairs[i : i + setting.microbatch] for i in range(0, len(setting.pairs), setting.microbatch)]


def plain(setting: Setting, to_global: bool) -> list[Callable[[], torch.Tensor]]:
    """Return one function per microbatch: plain scoring, padded to the longest of the global batch or of the microbatch."""

    def loss(pairs: list[Pair]) -> torch.Tensor:
        batch = collated(pairs, width_of(setting.pairs if to_global else pairs))
        return setting.scorer({k: v if k.endswith("_labels") else v.to(setting.device) for k, v in batch.items()}).loss

    return [lambda part=part: loss(part) for part in in_order(setting)]


def by_length(setting: Setting) -> list[list[Pair]]:
    """Return the microbatches of fast scoring: as many as in the given order, with about equal tokens, and the objective's roles."""
    roles = len(setting.scorer.objective.roles)
    pairs = [(prompt, responses[:roles]) for prompt, responses in setting.pairs]
    lengths = [len(prompt) + sum(map(len, responses)) for prompt, responses in pairs]
    rounds = cut_into_microbatches(lengths, 1, -(-len(pairs) // setting.microbatch))
    return [[pairs[i] for i in part] for (part,) in rounds]


def in_rows(setting: Setting) -> list[tuple[list[Pair], list[int]]]:
    """Return the same number of microbatches as the trainer makes them: pairs, and how many of them are in each row."""
    roles = len(setting.scorer.objective.roles)
    pairs = [(prompt, responses[:roles]) for prompt, responses in setting.pairs]
    lengths = [len(prompt) + sum(len(response) - 1 for response in responses) for prompt, responses in pairs]
    hidden = setting.scorer.policy.get_input_embeddings().weight.shape[-1]
    rounds = cut_into_rows(lengths, 1, -(-len(pairs) // setting.microbatch), packing_of(hidden, MAX_LENGTH))
    return [([pairs[i] for row in rows for i in row], list(map(len, rows))) for (rows,) in rounds]


def fast(setting: Setting, packed: bool = True) -> list[Callable[[], torch.Tensor]]:
    """Return one function per microbatch: fast scoring, with several pairs in a row or one."""
    parts = in_rows(setting) if packed else [(part, None) for part in by_length(setting)]

    def loss(pairs: list[Pair], per_row: Optional[list[int]]) -> torch.Tensor:
        rows = shared_prefix_batch(pairs, row_multiple(setting.device), per_row)
        return setting.scorer(rows.to(setting.device)).loss

    return [lambda part=part: loss(*part) for part in parts]


WAYS = {
    "published": published,
    "plain-global": lambda setting: plain(setting, to_global=True),
    "plain": lambda setting: plain(setting, to_global=False),
    "unpacked": lambda setting: fast(setting, packed=False),
    "fast": fast,
}


class OwnStep:
    """One optimizer step, as in this project's trainer. After a call, `norm` is the norm of its gradient, a scalar on the device."""

    def __init__(self, way: str, setting: Setting, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        self.losses, self.setting, self.optimizer, self.dtype = WAYS[way](setting), setting, optimizer, dtype

    def __call__(self) -> float:
        total = 0.0
        policy = self.setting.scorer.policy
        with cast_parameters(policy, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext():
            for loss in self.losses:
                value = loss() / len(self.setting.pairs)
                value.backward()
                total = total + value.detach()
        self.norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


def policy_and_reference(
    config: transformers.PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Draw a policy in float32 and a reference in `dtype`, the policy plus noise, on the device. Neither has dropout."""
    prepare_gpu()
    with device:
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    disable_dropout(policy)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return policy, reference.to(dtype).requires_grad_(False).eval()


class Memory:
    """A context that measures `peak`: the bytes held at the peak of the block above those held at its beginning."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Memory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # return memory freed earlier to the system
            Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self.resident("VmHWM")
        self.peak = peak - self.before

    @staticmethod
    def resident(field: str) -> int:
        """Return a field of /proc/self/status in bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 8192) -> float:
    """Return the FLOP/s of a large matrix product."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize(device)
    return 20 * 2 * n**3 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=["tdpo2"])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "trl"], default=list(WAYS))
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=8, help="pairs; for fast, pairs on average")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype in which policy and reference compute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=arguments.vocabulary, max_position_embeddings=2048, **MODELS[arguments.model])
    policy, reference = policy_and_reference(config, dtype, device)
    optimizer = make_optimizer("RMSprop", [list(policy.parameters())], 0.0, {}, device=device)
    pairs = hh_pairs(arguments.pairs, arguments.vocabulary)
    steps: dict[str, Callable[[], float]] = {}
    for loss in arguments.loss:
        objective = get_objective(loss, **LOSSES[loss])
        scorer = Scorer(policy, reference if objective.needs_reference else None, objective)
        setting = Setting(scorer, loss, pairs, arguments.microbatch, device)
        for way in arguments.ways:
            if way != "trl":
                steps[f"{loss}: {way}"] = OwnStep(way, setting, optimizer, dtype)
            elif loss == "dpo":
                from benchmarks.trl_step import TrlStep  # here, because it is optional

                for name, mode in TRL_MODES.items():
                    steps[f"dpo: TRL{name}"] = TrlStep(setting, copy.deepcopy(policy), reference, dtype, **mode)

    rate = matmul_rate(device, dtype) if device.type == "cuda" else None
    measured = measure(steps, arguments.rounds, device)
    unique = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in pairs)
    print(f"{arguments.model}, {arguments.dtype}, {device.type}, {arguments.pairs} pairs of {unique:,} unique tokens")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"microbatches of {arguments.microbatch} pairs, {arguments.rounds} rounds; {versions}\n")
    blocks = sum(p.numel() for p in policy.parameters()) - policy.get_input_embeddings().weight.numel()
    print_table(measured, len(pairs), unique, blocks, rate)


class Measured(NamedTuple):
    """Measurements of one way: seconds of each round, peak bytes of the last, and all distinct printed losses."""

    seconds: list[float]
    peaks: list[int]
    losses: set[str]


def measure(steps: dict[str, Callable[[], float]], rounds: int, device: torch.device) -> dict[str, Measured]:
    """Run every way's step in each round: a warm-up, which creates the optimizer states, `rounds` that are timed, one for memory."""
    measured = {name: Measured([], [], set()) for name in steps}
    for round in range(rounds + 2):
        for name, step in steps.items():
            is_last = round == rounds + 1
            with Memory(device) if is_last else contextlib.nullcontext() as memory:
                started = time.perf_counter()
                value = step()
                synchronize(device)
                elapsed = getattr(step, "seconds", time.perf_counter() - started)
            measured[name].losses.add(f"{value:.5f}")
            if is_last:
                measured[name].peaks.append(memory.peak)
            elif round > 0:
                measured[name].seconds.append(elapsed)
            when = "memory" if is_last else f"round {round}" if round else "warm-up"
            peak = f", {memory.peak / 2**30:.2f} GiB" if is_last else ""
            print(f"{when} {name}: {elapsed:.2f} s{peak}, loss {value:.6f}", file=sys.stderr)
    return measured


def print_table(measured: dict[str, Measured], pairs: int, unique: int, parameters: int, rate: Optional[float]) -> None:
    """Print medians over the rounds, and medians of each round's speed-up over the first way.

    Args:
        measured: by way.
        pairs, unique: pairs per step, and their unique tokens.
        parameters: number of the model's parameters without input embeddings.
        rate: FLOP/s of a large matrix product; None on a CPU.
    """
    mfu = "" if rate is None else " model-FLOP utilisation |"
    print(f"| | s per step | times faster | pairs/s | unique tokens/s | peak GiB | peak / first | loss |{mfu}")
    print("|---|" + "---:|" * (8 if rate else 7))
    first = next(iter(measured.values()))
    for name, way in measured.items():
        median, peak = statistics.median(way.seconds), statistics.median(way.peaks)
        ratio = statistics.median(a / b for a, b in zip(first.seconds, way.seconds))
        cells = [f"{median:.2f}", f"{ratio:.2f}", f"{pairs / median:.2f}", f"{unique / median:,.0f}", f"{peak / 2**30:.2f}"]
        cells += [f"{peak / statistics.median(first.peaks):.3f}", ", ".join(sorted(way.losses))]
        if rate is not None:
            flop = (6 + (0 if name.startswith("sft") else 2)) * parameters * unique
            cells.append(f"{flop / median / rate:.1%}")
        print(f"| {name} | {' | '.join(cells)} |")
    if rate is not None:
        print(f"\nmatrix product: {rate / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
