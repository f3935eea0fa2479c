"""Make preference pairs from sampled completions: for each prompt, the one with the highest reward against the one with the lowest.

    python experiments/frontier/pairs.py FOLDER --margin 0.1

Reads completions-{train,test}.jsonl in the folder, written by sample.py. Writes pairs/{train,test}.jsonl for datasets=[jsonl], with rows
{prompt, chosen, rejected, chosen_score, rejected_score}.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from tdpo.analysis.rewards import GOLD, gold_reward_of, reward_model  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.utils import UserError, get_local_dir  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Make preference pairs from sampled completions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--margin", type=float, default=0.0, help="minimum difference between the two rewards (default: %(default)s)")
    parser.add_argument("--reward", default="gold:reviews", help="as reward= of eval.py, or gold:<dataset> (default: %(default)s)")
    arguments = parser.parse_args()
    device = World().device
    kind, _, name = arguments.reward.partition(":")
    missing = [file for split in ("train", "test") if not (file := arguments.folder / f"completions-{split}.jsonl").exists()]
    if missing:
        sys.exit(f"error: '{missing[0]}' does not exist: write it with sample.py")
    try:
        reward = (
            gold_reward_of([name]) if kind == "gold" and name in GOLD else reward_model(arguments.reward, device, get_local_dir([".cache"]))
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    for split in ("train", "test"):
        with open(arguments.folder / f"completions-{split}.jsonl") as file:
            rows = [row for row in map(json.loads, file) if row["completion"].strip()]
        if not rows:
            sys.exit(f"error: completions-{split}.jsonl has no completion with text")
        scores = reward([row["prompt"] + row["completion"] for row in rows])
        pairs = list(best_and_worst(rows, scores, arguments.margin))
        target = arguments.folder / "pairs" / f"{split}.jsonl"
        target.parent.mkdir(exist_ok=True)
        with replaced_whole(str(target)) as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        print(f"{split}: {len(pairs):,} pairs from {len(rows):,} completions with a mean reward of {sum(scores) / len(rows):.3f}")


def best_and_worst(rows: list[dict], scores: list[float], margin: float) -> Iterator[dict]:
    """Yield one pair per prompt; prompts whose best and worst reward are equal or differ by less than the margin are skipped.

    Args:
        rows: rows of sample.py, those of one prompt next to each other.
        scores: reward of each row.
        margin: minimum difference between the two rewards.
    """
    for _, some in groupby(zip(rows, scores), key=lambda pair: pair[0]["index"]):
        ranked = sorted(some, key=lambda pair: pair[1])
        (rejected, low), (chosen, high) = ranked[0], ranked[-1]
        if high > low and high - low >= margin:
            texts = {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
            yield {**texts, "chosen_score": high, "rejected_score": low}


if __name__ == "__main__":
    main()
