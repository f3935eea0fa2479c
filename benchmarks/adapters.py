"""Full training, LoRA and QLoRA beside each other: SFT, then TDPO2, of a chat model on Anthropic HH as messages.

    python benchmarks/adapters.py --model SmolLM2-135M-Instruct --hh hh-rlhf

Each run is a process of its own, as a user would start it. The table has the median seconds of a TDPO2 step, the most memory that its
process held (interpreter and libraries included), and the metrics of the last eval. Linux only.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tdpo.data.sources import Place, read_rows  # noqa: E402

# Name in the table, options, and learning rates of SFT and TDPO2: with adapters about ten times those of full training.
WAYS = {
    "full": ("all weights", [], "1e-5", "1e-6"),
    "lora": ("LoRA, rank 16", ["adapter.rank=16"], "1e-4", "1e-5"),
    "nf4": ("QLoRA, rank 16, nf4", ["adapter.rank=16", "model.quantize=nf4"], "1e-4", "1e-5"),
}


def messages_of(text: str) -> list[dict]:
    """Return the turns of an HH dialogue."""
    turns = []
    for part in text.split("\n\nHuman: ")[1:]:
        asked, _, answered = part.partition("\n\nAssistant: ")
        turns += [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": answered.strip()}]
    return turns


def write_pairs(hh: str, split: str, count: int, file: Path) -> None:
    """Write the first pairs of HH whose dialogues are well formed as JSON lines of messages."""
    written = 0
    with open(file, "w", encoding="utf-8") as out:
        for row in read_rows(Place(hh), split):
            chosen, rejected = (messages_of(row.fields[key]) for key in ("chosen", "rejected"))
            whole = all(turn["content"] and "\n\nAssistant:" not in turn["content"] for turn in chosen + rejected)
            if chosen[:-1] == rejected[:-1] and chosen != rejected and whole and written < count:
                out.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
                written += 1
    if written < count:
        sys.exit(f"{hh} has only {written} pairs for {split}")


def trained(options: list[str], run_dir: Path) -> tuple[list[dict], list[dict], float]:
    """Run train.py; return its train logs, eval logs, and the most GB that it held."""
    command = [sys.executable, str(ROOT / "train.py"), *options, f"local_run_dir={run_dir}"]
    pid = os.posix_spawn(sys.executable, command, {**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train, evals = ([row for row in rows if any(key.endswith(f"/{split}") for key in row)] for split in ("train", "eval"))
    return train, evals, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare full training, LoRA and QLoRA.")
    parser.add_argument("--model", required=True, help="a chat model: a folder, a GGUF file, or a name on the hub")
    parser.add_argument("--hh", required=True, help="Anthropic HH: a folder, or a name on the hub")
    parser.add_argument("--pairs", type=int, default=300, help="train pairs (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=255, help="eval pairs (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    arguments = parser.parse_args()
    lines = ["| | s per step | peak GB | accuracy | margin | SeqKL of chosen, nats | loss |", "|---|---:|---:|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_pairs(arguments.hh, "train", arguments.pairs, data / "train.jsonl")
        write_pairs(arguments.hh, "test", arguments.held_out, data / "test.jsonl")
        common = ["model=blank_model", f"model.name_or_path={arguments.model}", "max_length=128", "max_prompt_length=64"]
        common += ["datasets=[jsonl]", f"datasets.jsonl.path={data}/train.jsonl", f"datasets.jsonl.eval_path={data}/test.jsonl"]
        common += ["batch_size=10", "gradient_accumulation_steps=2", f"n_eval_examples={arguments.held_out}", "eval_batch_size=8"]
        common += [f"n_examples={arguments.pairs}", f"eval_every={10 * arguments.pairs}", "warmup_steps=5", "do_first_eval=false"]
        common += ["sample_during_eval=false", "wandb.enabled=false", "minimum_log_interval_secs=0", f"local_dirs=[{data}]"]
        common += ["exp_name=adapters"]
        for way in arguments.ways:
            name, options, sft_lr, lr = WAYS[way]
            sft = data / f"{way}-sft"
            trained([*common, *options, "loss=sft", f"lr={sft_lr}"], sft)
            done = trained([*common, *options, "loss=tdpo2", f"lr={lr}", f"model.archive={sft}"], data / f"{way}-tdpo2")
            train, evals, peak = done
            last = evals[-1]
            seconds = statistics.median(10 / row["examples_per_second"] for row in train)
            found = (last["rewards_eval/accuracies"], last["rewards_eval/margins"], last["kl_eval/chosen"], last["loss/eval"])
            lines.append(f"| {name} | {seconds:.1f} | {peak:.2f} | " + " | ".join(f"{value:.3g}" for value in found) + " |")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
