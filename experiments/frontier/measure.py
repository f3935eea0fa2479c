"""Measure reward, KL and SeqKL at every checkpoint of the runs in a folder; write measured.json into each run.

    python experiments/frontier/measure.py RUNS

The reference is the SFT model that a run started from. The prompts are the SFT run's test prompts, the pairs are the run's test split.
"""

import argparse
import json
import os
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from preference_datasets import load_prompts, load_split  # noqa: E402
from tdpo.analysis.evaluation import measure_pairs, measure_samples  # noqa: E402
from tdpo.analysis.rewards import gold_reward_of, reward_model  # noqa: E402
from tdpo.analysis.trained_models import Trained, find_trained, load_compared, load_trained  # noqa: E402
from tdpo.checkpointing.checkpoints import list_checkpoints  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402
from tdpo.models.sampling import own_distribution, sample_batch  # noqa: E402
from tdpo.utils import UserError, batched  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every checkpoint of the runs in a folder.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--n_prompts", type=int, default=128, help="number of test prompts, and of pairs (default: %(default)s)")
    parser.add_argument("--n", type=int, default=4, help="continuations per prompt (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts or pairs at a time (default: %(default)s)")
    parser.add_argument("--reward", default=None, help="as reward= of eval.py (default: the gold reward of the data)")
    arguments = parser.parse_args()
    runs = [path.parent for path in sorted(arguments.runs.glob("*/LATEST")) if (path / "hf").exists()]
    runs = [run for run in runs if not is_measured(run, sizes_of(arguments))]
    try:
        for _, same in groupby(sorted(runs, key=started_from), key=started_from):
            some = list(same)
            Measures(arguments, find_trained(str(some[0])).config).measure(some)
    except UserError as error:
        sys.exit(f"error: {error}")


def started_from(run: Path) -> str:
    """Return the path of the SFT weights that a run started from."""
    return find_trained(str(run)).config.model.archive


def sizes_of(arguments: argparse.Namespace) -> dict:
    """Return the arguments that results depend on; runs measured with other values are measured again."""
    return {"n_prompts": arguments.n_prompts, "n": arguments.n, "reward": arguments.reward}


def is_measured(run: Path, sizes: dict) -> bool:
    """Whether a run has been measured with the same arguments."""
    file = run / "measured.json"
    return file.exists() and json.loads(file.read_text())["sizes"] == sizes


class Measures:
    """Measures runs that started from the same SFT model, and so share the reference, the prompts and the pairs.

    Args:
        arguments: of the command line.
        config: the config of one of the runs.
    """

    def __init__(self, arguments: argparse.Namespace, config: DictConfig):
        self.arguments = arguments
        self.device = World().device
        self.sft = find_trained(os.path.dirname(config.model.archive))
        data, cache_dir, add_bos = self.sft.datasets(None), self.sft.cache_dir(), config.model.add_bos
        self.reward = gold_reward_of(list(data)) if arguments.reward is None else reward_model(arguments.reward, self.device, cache_dir)
        self.lengths = config.max_length, config.max_prompt_length
        self.reference, _, self.tokenizer, self.fast = load_compared(self.sft, None, self.device, config.max_length)
        pairs = OmegaConf.to_container(config.datasets)
        self.split = load_split(pairs, "test", self.tokenizer, *self.lengths, add_bos=add_bos, silent=True)
        self.seed = config.seed
        self.prompts = load_prompts(data, "test", self.tokenizer, self.lengths[1], add_bos, cache_dir)[: arguments.n_prompts]

    def measure(self, runs: list[Path]) -> None:
        """Measure all checkpoints of the runs and write measured.json into each."""
        start = {"examples": 0, **self.of(self.sft)}
        for run in runs:
            checkpoints = [(int(os.path.basename(folder).removeprefix("step-")), folder) for folder in reversed(list_checkpoints(str(run)))]
            points = [start, *({"examples": examples, **self.of(find_trained(folder))} for examples, folder in checkpoints)]
            config = find_trained(str(run)).config
            settings = {"beta": config.loss.beta, "lr": config.lr, "seed": config.seed, "sizes": sizes_of(self.arguments)}
            with replaced_whole(str(run / "measured.json")) as file:
                json.dump({**settings, "points": points}, file, indent=1)
            print(run, *(f"{p['examples']}: {p['samples/reward']:.3f} at {p['samples/kl']:.2f}" for p in points), flush=True)

    def of(self, trained: Trained) -> dict[str, float]:
        """Return the mean of each measure over prompts or pairs. Every model is sampled with the same seed."""
        size, n = self.arguments.batch_size, self.arguments.n
        policy, _ = load_trained(trained, self.device, max_length=self.lengths[0])
        settings = own_distribution(self.tokenizer, self.lengths[0])
        rows = []
        for first, some in batched(self.prompts, size):
            rows += sample_batch(policy, self.tokenizer, some, first, n, settings, self.seed)
        measures = measure_samples(policy, self.reference, rows, self.reward, self.fast, size)
        examples = next(self.split.epochs(0, shuffle=False))[: self.arguments.n_prompts]
        pairs = measure_pairs(policy, self.reference, None, self.split, examples, self.fast, size)
        measures |= {name: (values, None) for name, values in pairs.items()}
        return {name: float(np.average(values, weights=weights)) for name, (values, weights) in measures.items()}


if __name__ == "__main__":
    main()
