"""Measure trained models: accuracy and SeqKL on pairs; reward, KL, entropy and diversity of their samples.

    python eval.py run=runs/tdpo2
    python eval.py run=[runs/dpo,runs/tdpo2] n_prompts=128 out=eval.json

Every key is in config/eval.yaml. The table has one column per model; each value is a mean with its 95% bootstrap interval over prompts.
"""

import json
from collections.abc import Sequence
from typing import Optional

import torch
from omegaconf import DictConfig, OmegaConf

from preference_datasets import load_prompts, load_split
from tdpo.analysis.evaluation import (
    MEASURES,
    Estimate,
    by_prompt,
    estimate,
    measure_diversity,
    measure_pairs,
    measure_samples,
    measure_whole_texts,
    score_samples,
    table_of,
)
from tdpo.analysis.rewards import VADER, Reward, gold_reward_of, reward_model
from tdpo.analysis.trained_models import Inputs, Trained, find_inputs, load_compared
from tdpo.cli.check_config import check_tool_config
from tdpo.cli.command_line import run_command
from tdpo.cli.schema import Evaluation
from tdpo.data.split import EVAL_SEED
from tdpo.distributed.world import World
from tdpo.files import replaced_whole
from tdpo.models.sampling import own_distribution, sample_batch
from tdpo.utils import batched


def run(config: DictConfig, overrides: Sequence[str] = ()) -> dict[str, dict[str, Estimate]]:
    """Measure every model, print the table and write `out`, if given.

    Args:
        config: see config/eval.yaml.

    Returns:
        model name -> measure -> estimate.

    Raises:
        UserError: the config, a model, the reward or the data cannot be used.
    """
    check_tool_config(config, Evaluation)
    device = World().device
    downloaded = None if config.reward in (None, VADER) else config.reward.removeprefix("logistic:")
    inputs = find_inputs(config, [config.reference, downloaded])
    reward = reward_model(config.reward, device, inputs.models[0].cache_dir()) if config.reward else gold_reward_of(list(inputs.data))
    results = {trained.name: measure(trained, inputs, config, reward, device) for trained in inputs.models}
    print(table_of(results))
    if config.out:
        content = {name: {key: value.as_json() for key, value in values.items()} for name, values in results.items()}
        with replaced_whole(config.out) as file:
            json.dump({"config": OmegaConf.to_container(config), "measures": MEASURES, "results": content}, file, indent=1)
    return results


def measure(trained: Trained, inputs: Inputs, config: DictConfig, reward: Optional[Reward], device: torch.device) -> dict[str, Estimate]:
    """Measure one model.

    Args:
        trained: the model.
        inputs: data and lengths that all models share.
        config: see config/eval.yaml.
        reward: of a response; None: samples/reward is left out.
        device: where the model runs.

    Returns:
        measure -> estimate, in the order of MEASURES. Measures that need a reference are left out if none is known.
    """
    policy, reference, tokenizer, fast = load_compared(trained, config.reference, device, inputs.lengths[0])
    if reference is None:
        print(f"{trained.name}: no reference is known, so accuracies and divergences are left out: give reference=<weights>")
    size, add_bos, cache_dir = config.batch_size, trained.model.add_bos, trained.cache_dir()
    measures = {}
    if reference is not None and config.n_pairs != 0:
        options = {"add_bos": add_bos, "silent": trained is not inputs.models[0], "cache_dir": cache_dir}
        split = load_split(inputs.data, config.split, tokenizer, *inputs.lengths, **options)
        examples = next(split.epochs(EVAL_SEED))[: config.n_pairs]
        pairs = measure_pairs(policy, reference, trained.objective(), split, examples, fast, size)
        measures |= {name: by_prompt(values, [example.prompt for example in examples]) for name, values in pairs.items()}
    if config.n_prompts:
        prompts = load_prompts(inputs.data, config.split, tokenizer, inputs.lengths[1], add_bos, cache_dir)[: config.n_prompts]
        settings = own_distribution(tokenizer, inputs.lengths[0])
        rows = []
        for first, some in batched(prompts, size):
            rows += sample_batch(policy, tokenizer, some, first, config.n, settings, config.seed)
        table = score_samples(policy, reference, rows, fast, size)
        measures |= measure_samples(table, None if reward is None else reward.of(rows))
        measures |= measure_whole_texts(policy, rows, table, fast, size) | measure_diversity(rows)
    return {name: estimate(*measures[name], seed=config.seed) for name in MEASURES if name in measures}


def main() -> None:
    """Run the command line."""
    run_command("eval", run)


if __name__ == "__main__":
    main()
