"""Print the results of the demo: accuracy on held-out pairs, gold reward of samples before and after training, and three samples.

    python experiments/demo/report.py RUN_FOLDER_OF_TDPO

`reference` samples are from the SFT model, `policy` samples from the trained one; both continue the same held-out prompts.
"""

import json
import os
import statistics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from tdpo.data.reviews import gold_reward  # noqa: E402


def read_lines(path: str) -> list[dict]:
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    run_dir = sys.argv[1]
    evals = [log for log in read_lines(os.path.join(run_dir, "metrics.jsonl")) if log["split"] == "eval"]
    samples = read_lines(os.path.join(run_dir, "samples.jsonl"))
    last = [row for row in samples if row["counters/examples"] == samples[-1]["counters/examples"]]
    rewards = {name: [gold_reward(row[name]) for row in last] for name in ("reference", "policy")}
    accuracy = evals[-1]["rewards_eval/accuracies"]
    print(f"\nreward accuracy on held-out pairs: {accuracy:.3f}; SeqKL of chosen {evals[-1]['kl_eval/chosen']:.2f} nats")
    for name, label in (("reference", "before (SFT)"), ("policy", "after (TDPO2)")):
        mean, error = statistics.mean(rewards[name]), statistics.stdev(rewards[name]) / len(last) ** 0.5
        print(f"gold reward of {len(last)} samples {label}: {mean:.3f} +- {error:.3f} (mean and standard error)")
    for row in last[:3]:
        print(f"\nprompt: {row['prompt']}")
        for name, label in (("reference", "before"), ("policy", "after ")):
            print(f"  {label} {gold_reward(row[name]):.2f}  ...{row[name][len(row['prompt']) :]}")
    print(f"\nrun folder: {run_dir}\ncurves:     {os.path.join(run_dir, 'curves.png')}")


if __name__ == "__main__":
    main()
