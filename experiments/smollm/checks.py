"""Check by what the final policies of an experiment gain their reward: by better responses, by longer ones, or by addressing the reader.

    python experiments/smollm/checks.py runs/smollm/results --out checks.json

Reads final_samples.jsonl of the runs with the task's `shown` setting, and the reference's completions of the same held-out prompts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from experiments.frontier.pairs import reward_of_rows  # noqa: E402
from experiments.frontier.report import by_measure, differences, read_runs, runs_shown  # noqa: E402
from tdpo.analysis.rewards import Reward, reward_model  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.utils import UserError, get_local_dir  # noqa: E402

FIRST = 8  # words of a response to which it is cut
READER = {"you", "your", "you're", "you've", "you'll", "thank", "thanks", "congratulations"}  # words that address the reader


def main() -> None:
    parser = argparse.ArgumentParser(description="Check by what the final policies of an experiment gain their reward.")
    parser.add_argument("folder", type=Path, help="of the experiment")
    parser.add_argument("--out", type=Path, help="file for the numbers (default: they are printed)")
    arguments = parser.parse_args()
    try:
        text = json.dumps(checks_of(arguments.folder), indent=1)
    except (UserError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if arguments.out is None:
        print(text)
        return
    with replaced_whole(str(arguments.out)) as file:
        file.write(text + "\n")


def checks_of(folder: Path) -> dict[str, dict[str, dict]]:
    """Return end, method -> measure -> output of `over_seeds`, the reference among the methods, and minus_dpo, the same of differences.

    Raises:
        FileNotFoundError: the experiment or its completions are missing.
        UserError: the reward cannot be loaded, or is the data's own.
    """
    task = OmegaConf.load(folder / "task.yaml")
    if task.reward is None:
        raise UserError(
            f"'{folder}' has the gold reward of its data, which is no word list or classifier that could be misled: nothing to check"
        )
    reward = reward_model(task.reward, World().device, get_local_dir([".cache"]))
    files = {"reference": {task.seeds[0]: folder / f"seed{task.seeds[0]}" / "completions-test.jsonl"}}
    runs = read_runs(folder, list(task.methods))
    for method in task.methods:
        if own := {run.seed: run.folder / "final_samples.jsonl" for run in runs_shown(runs, method, task.shown)}:
            files[method] = own
    found = {
        name: {seed: measures_of([row for row in lines_of(file) if row["index"] < task.n_prompts], reward) for seed, file in some.items()}
        for name, some in files.items()
    }
    others = [name for name in found if name not in ("reference", "DPO")] if "DPO" in found else []
    ends = {name: by_measure(some) for name, some in found.items()}
    return {"end": ends, "minus_dpo": {name: differences(found[name], found["DPO"]) for name in others}}


def lines_of(file: Path) -> list[dict]:
    """Return the rows of a file of samples."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def measures_of(rows: Sequence[dict], reward: Reward) -> dict[str, float]:
    """Return the mean reward; that of the responses cut to their first words; the mean number of words; the correlation of a response's
    reward with its number of words; and the share of responses that address the reader."""
    words = [row["completion"].split() for row in rows]
    cut = [{**row, "completion": " ".join(some[:FIRST])} for row, some in zip(rows, words)]
    rewards = np.array(reward_of_rows(reward, rows, []))
    lengths = np.array([len(some) for some in words])
    addressed = [any(word.lower().replace("’", "'").strip(".,!?\"'") in READER for word in some) for some in words]
    return {
        "reward": float(rewards.mean()),
        f"reward_of_first_{FIRST}_words": float(np.mean(reward_of_rows(reward, cut, []))),
        "words": float(lengths.mean()),
        "correlation_with_words": float(np.corrcoef(rewards, lengths)[0, 1]),
        "addressed": float(np.mean(addressed)),
    }


if __name__ == "__main__":
    main()
