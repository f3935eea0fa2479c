"""Measure reward, KL and SeqKL at every checkpoint of the runs in a folder; write measured.json into each run.

    python experiments/frontier/measure.py RUNS

The reference is the model that a run started from: an SFT run, or a pretrained model. The prompts are the SFT run's test prompts, or those
of a file; the pairs are the run's test split. The responses of the last checkpoint are kept, with their rewards, in final_samples.jsonl.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from experiments.frontier.pairs import chat_prompts, reward_of_rows  # noqa: E402
from preference_datasets import load_prompts, load_split  # noqa: E402
from tdpo.analysis.evaluation import distinct, measure_diversity, measure_pairs, measure_samples, score_samples  # noqa: E402
from tdpo.analysis.rewards import gold_reward_of, reward_model  # noqa: E402
from tdpo.analysis.trained_models import Trained, find_trained, load_compared, load_trained  # noqa: E402
from tdpo.checkpointing.checkpoints import list_checkpoints  # noqa: E402
from tdpo.distributed.sharding import fingerprint  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.models.sampling import own_distribution, sample_batch  # noqa: E402
from tdpo.utils import UserError, batched  # noqa: E402

SAMPLE = ("index", "sample", "prompt", "completion")  # what is kept of a response


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every checkpoint of the runs in a folder.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--n_prompts", type=int, default=128, help="number of test prompts, and of pairs (default: %(default)s)")
    parser.add_argument("--n", type=int, default=4, help="continuations per prompt (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts or pairs at a time (default: %(default)s)")
    parser.add_argument("--reward", default=None, help="as reward= of eval.py (default: the gold reward of the data)")
    parser.add_argument("--prompts", default=None, help="file of test prompts (default: those of the SFT run's data)")
    parser.add_argument("--max_new_tokens", type=int, default=None, help="maximum tokens of a continuation (default: max_length limits it)")
    arguments = parser.parse_args()
    runs = [path.parent for path in sorted(arguments.runs.glob("*/LATEST")) if (path / "hf").exists()]
    runs = [run for run in runs if not is_measured(run, sizes_of(arguments))]
    try:
        for _, same in groupby(sorted(runs, key=shared_by), key=shared_by):
            some = list(same)
            Measures(arguments, find_trained(str(some[0])).config).measure(some)
    except UserError as error:
        sys.exit(f"error: {error}")


def shared_by(run: Path) -> tuple[str, int]:
    """Return what runs with the same reference measurements share: the model that they started from, and their seed."""
    config = find_trained(str(run)).config
    return start_of(config), config.seed


def start_of(config: DictConfig) -> str:
    """Return the SFT run that a run started from, or the pretrained model."""
    return config.model.name_or_path if config.model.archive is None else os.path.dirname(config.model.archive)


def sizes_of(arguments: argparse.Namespace) -> dict:
    """Return the arguments that results depend on; runs measured with other values are measured again."""
    optional = {name: getattr(arguments, name) for name in ("prompts", "max_new_tokens") if getattr(arguments, name) is not None}
    return {"n_prompts": arguments.n_prompts, "n": arguments.n, "reward": arguments.reward, **optional}


def is_measured(run: Path, sizes: dict) -> bool:
    """Whether a run has been measured with the same arguments."""
    file = run / "measured.json"
    return file.exists() and json.loads(file.read_text())["sizes"] == sizes


class Measures:
    """Measures runs that started from the same model with the same seed, and so share the reference, the prompts and the pairs.

    Args:
        arguments: of the command line.
        config: the config of one of the runs.

    Raises:
        UserError: there are neither prompts nor data that have some; or the reward or the reference cannot be loaded.
    """

    def __init__(self, arguments: argparse.Namespace, config: DictConfig):
        self.arguments = arguments
        self.device = World().device
        self.start = find_trained(start_of(config))
        data = self.start.datasets(None) if arguments.prompts is None else {}
        cache_dir, add_bos = self.start.cache_dir(), config.model.add_bos
        self.reward = gold_reward_of(list(data)) if arguments.reward is None else reward_model(arguments.reward, self.device, cache_dir)
        self.chat = None if arguments.prompts is None else chat_prompts(arguments.prompts)
        self.lengths = config.max_length, config.max_prompt_length
        self.reference, _, self.tokenizer, self.fast = load_compared(self.start, None, self.device, config.max_length)
        pairs = OmegaConf.to_container(config.datasets)
        self.split = load_split(pairs, "test", self.tokenizer, *self.lengths, add_bos=add_bos, silent=True)
        self.seed = config.seed
        found = load_prompts(data, "test", self.tokenizer, self.lengths[1], add_bos, cache_dir, arguments.prompts)
        self.prompts = found[: arguments.n_prompts]

    def measure(self, runs: list[Path]) -> None:
        """Measure all checkpoints of the runs and write measured.json into each."""
        start = {"examples": 0, **self.measured_start()}
        for run in runs:
            points, rows = [start], []
            for examples, folder in planned_checkpoints(run):
                measures, rows = self.of(find_trained(folder))
                points.append({"examples": examples, **measures})
            with replaced_whole(str(run / "final_samples.jsonl")) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            config = find_trained(str(run)).config
            settings = {"beta": config.loss.beta, "lr": config.lr, "seed": config.seed, "sizes": sizes_of(self.arguments)}
            with replaced_whole(str(run / "measured.json")) as file:
                json.dump({**settings, "points": points}, file, indent=1)
            print(run, *(f"{p['examples']}: {p['samples/reward']:.3f} at {p['samples/kl']:.2f}" for p in points), flush=True)

    def measured_start(self) -> dict[str, float]:
        """Return the measures of the reference itself, which the runs of all methods share, and which are kept on disk."""
        file = self.arguments.runs.parent / "start" / f"seed{self.seed}.json"
        pairs = {"pairs": self.split.fingerprint, "weights": fingerprint(self.reference)}
        identity = {**sizes_of(self.arguments), **pairs, "batch_size": self.arguments.batch_size}
        if file.exists() and (known := json.loads(file.read_text()))["identity"] == identity:
            return known["measures"]
        measures, _ = self.of(self.start)
        file.parent.mkdir(exist_ok=True)
        with replaced_whole(str(file)) as handle:
            json.dump({"identity": identity, "measures": measures}, handle, indent=1)
        return measures

    def of(self, trained: Trained) -> tuple[dict[str, float], list[dict]]:
        """Return the mean of each measure over prompts or pairs, and the responses with their rewards. Every model is sampled with the same
        seed."""
        size, n = self.arguments.batch_size, self.arguments.n
        policy, _ = load_trained(trained, self.device, max_length=self.lengths[0])
        settings = own_distribution(self.tokenizer, self.lengths[0])
        rows = []
        for first, some in batched(self.prompts, size):
            rows += sample_batch(policy, self.tokenizer, some, first, n, settings, self.seed, self.arguments.max_new_tokens)
        rewards = reward_of_rows(self.reward, rows, self.chat)
        measures = measure_samples(score_samples(policy, self.reference, rows, self.fast, size), rewards) | measure_diversity(rows)
        examples = next(self.split.epochs(0, shuffle=False))[: self.arguments.n_prompts]
        pairs = measure_pairs(policy, self.reference, None, self.split, examples, self.fast, size)
        measures |= {name: (values, None) for name, values in pairs.items()}
        kept = [{**{key: row[key] for key in SAMPLE}, "reward": reward} for row, reward in zip(rows, rewards)]
        means = {name: float(np.average(values, weights=weights)) for name, (values, weights) in measures.items()}
        return means | repetition([row["completion"] for row in rows]), kept


def planned_checkpoints(run: Path) -> list[tuple[int, str]]:
    """Return (train examples, folder) of a run's checkpoints in order, without those that interruptions added: an interrupted run would
    have another envelope than an undisturbed one."""
    every = find_trained(str(run)).config.save_every
    found = [(int(os.path.basename(folder).removeprefix("step-")), folder) for folder in reversed(list_checkpoints(str(run)))]
    return [(examples, folder) for examples, folder in found if examples % every == 0 or examples == found[-1][0]]


def repetition(texts: Sequence[str]) -> dict[str, float]:
    """Measure what distinct-n of a prompt's few texts does not see: sentences that return for other prompts, and words within a text.

    Returns:
        texts/distinct_2: distinct pairs of consecutive words of all texts / all pairs, which depends on the number of texts;
        texts/repeated_words: share of a text's words that it has before, mean over texts.
    """
    words = [text.lower().split() for text in texts]
    repeated = np.mean([1 - distinct([own], 1) for own in words])
    return {"texts/distinct_2": distinct(words, 2), "texts/repeated_words": float(repeated)}


if __name__ == "__main__":
    main()
