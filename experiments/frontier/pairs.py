"""Make preference pairs from sampled completions: for each prompt, the one with the highest reward against the one with the lowest.

    python experiments/frontier/pairs.py FOLDER --margin 0.1

Reads completions-{train,test}.jsonl in the folder, written by sample.py. Writes pairs/{train,test}.jsonl for datasets=[jsonl], with rows
{prompt, chosen, rejected, chosen_score, rejected_score}. Chat prompts and their replies stay messages, which training renders by the chat
template. A completion is then left out if training would see other tokens than those sampled: if it did not end within its maximum of
tokens, since a reply in training has an end, or if its text is tokenized otherwise.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from preference_datasets import default_options, load_split  # noqa: E402
from tdpo.analysis.rewards import GOLD, Reward, gold_reward_of, reward_model  # noqa: E402
from tdpo.analysis.trained_models import find_trained  # noqa: E402
from tdpo.data.contract import SFT  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.models.tokenizer import load_tokenizer  # noqa: E402
from tdpo.utils import UserError, get_local_dir  # noqa: E402

ANY_LENGTH = 10**6  # tokens; nothing is cut


def main() -> None:
    parser = argparse.ArgumentParser(description="Make preference pairs from sampled completions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--margin", type=float, default=0.0, help="minimum difference between the two rewards (default: %(default)s)")
    parser.add_argument("--reward", default="gold:reviews", help="as reward= of eval.py, or gold:<dataset> (default: %(default)s)")
    parser.add_argument("--prompts", nargs=2, metavar=("TRAIN", "TEST"), help="files of the prompts that were completed, if they are chat")
    parser.add_argument("--model", help="the model that completed them, a run or a folder; its chat template renders chat prompts")
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
        for split, prompts in zip(("train", "test"), arguments.prompts or (None, None)):
            write_pairs(arguments.folder, split, reward, arguments.margin, prompts, arguments.model)
    except UserError as error:
        sys.exit(f"error: {error}")


def write_pairs(folder: Path, split: str, reward: Reward, margin: float, prompts: Optional[str], model: Optional[str]) -> None:
    """Write the pairs of a split.

    Args:
        folder: has the completions.
        split: train or test.
        reward: ranks the completions.
        margin: minimum difference between the two rewards.
        prompts: file of the prompts; None: they are plain text.
        model: that completed chat prompts.

    Raises:
        UserError: there is no completion with text, or none that can be trained on.
    """
    with open(folder / f"completions-{split}.jsonl") as file:
        rows = [row for row in map(json.loads, file) if row["completion"].strip()]
    if not rows:
        raise UserError(f"completions-{split}.jsonl has no completion with text")
    messages = None if prompts is None else chat_prompts(prompts)
    sampled, mean = len(rows), sum(scores := reward_of_rows(reward, rows, messages)) / len(rows)
    (folder / "pairs").mkdir(exist_ok=True)
    left_out = ""
    if messages is not None:
        rows = [{**row, "prompt": messages[row["index"]], "completion": [reply(row)], "score": score} for row, score in zip(rows, scores)]
        rows = trained_as_sampled(rows, folder / "pairs" / f"candidates-{split}.jsonl", model)
        scores = [row["score"] for row in rows]
        left_out = f"; {sampled - len(rows):,} left out, of which training would see other tokens or another end"
    pairs = list(best_and_worst(rows, scores, margin))
    with replaced_whole(str(folder / "pairs" / f"{split}.jsonl")) as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    print(f"{split}: {len(pairs):,} pairs from {sampled:,} completions with a mean reward of {mean:.3f}{left_out}")


def chat_prompts(path: str) -> Optional[list[list[dict]]]:
    """Return the messages of each prompt of a file; None if the prompts are plain text."""
    with open(path) as file:
        prompts = [json.loads(line)["prompt"] for line in file if line.strip()]
    return None if isinstance(prompts[0], str) else prompts


def reward_of_rows(reward: Reward, rows: Sequence[dict], messages: Optional[Sequence]) -> list[float]:
    """Return the reward of each row of sample.py. It does not see chat prompts, since a request is no part of the text."""
    return (reward if messages is None else reward._replace(of_completion=True)).of(rows)


def reply(row: dict) -> dict:
    """Return a row's completion as a message."""
    return {"role": "assistant", "content": row["completion"]}


def trained_as_sampled(rows: Sequence[dict], file: Path, model: str) -> list[dict]:
    """Return the rows whose tokens, of prompt and of completion, training would see as they were sampled.

    Args:
        rows: of sample.py, with prompt and completion as messages.
        file: for the rows as training reads them.
        model: whose tokenizer and chat template are used.

    Raises:
        UserError: no row is left.
    """
    trained = find_trained(model)
    tokenizer = load_tokenizer(trained.model, trained.cache_dir())
    with replaced_whole(str(file)) as handle:
        handle.writelines(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in rows)
    options = {**default_options("jsonl"), "path": str(file), "eval_path": str(file), "invalid_rows": "skip"}
    lengths = ANY_LENGTH, ANY_LENGTH - 1
    table = load_split({"jsonl": options}, "train", tokenizer, *lengths, SFT, trained.model.add_bos, silent=True).prompts
    seen = {(*row["prompt_ids"], None, *response) for row in table for response in row["response_ids"]}
    kept = [row for row in rows if (*row["prompt_ids"], None, *row["completion_ids"]) in seen]
    if not kept:
        raise UserError(f"'{file}': training would see other tokens than those sampled in every completion: raise max_new_tokens")
    return kept


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
