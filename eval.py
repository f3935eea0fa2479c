"""Measure trained models: accuracy and SeqKL on pairs; reward, KL, entropy and diversity of what they write.

    python eval.py run=runs/tdpo2
    python eval.py run=[runs/dpo,runs/tdpo2] n_prompts=128 out=eval.json

Every key is in config/eval.yaml. A table has a column a model; each value is a mean with its 95% bootstrap interval over examples.
"""

import json
import os
from collections.abc import Sequence
from typing import Optional

import torch
from omegaconf import DictConfig, OmegaConf

from batching import EVAL_SEED
from command_line import run_command
from config_schema import Evaluation, check_tool_config
from evaluation import MEASURES, Estimate, estimate, measure_diversity, measure_pairs, measure_samples, measure_whole_texts, table_of
from losses import Objective, get_objective
from models import prepare_hub
from preference_datasets import load_prompts, load_split
from rewards import gold_reward_of, reward_model
from runs import Trained, find_all, load_trained
from sampling import own_distribution, sample_batch
from scoring import Scorer, fast_scoring_problem
from utils import batched


def run(config: DictConfig, overrides: Sequence[str] = ()) -> dict[str, dict[str, Estimate]]:
    """Measures of every model, printed as a table.

    Args:
        config: see config/eval.yaml.

    Raises:
        UserError: see utils.py.
    """
    check_tool_config(config, Evaluation)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = find_all(config.run)
    prepare_hub([name for trained in models for name in (trained.model.name_or_path, trained.model.tokenizer_name_or_path)])
    data = models[0].datasets(config.get("datasets"))
    reward = reward_model(config.reward, device, models[0].cache_dir()) if config.reward else gold_reward_of(list(data))
    lengths = [models[0].length(key, config[key]) for key in ("max_length", "max_prompt_length")]
    results = {}
    for trained in models:
        policy, tokenizer = load_trained(trained, device, max_length=lengths[0])
        archive = config.reference or trained.reference
        reference = None if archive is None else load_trained(trained, device, archive, lengths[0])[0]
        objective = objective_of(trained)
        fast = fast_scoring_problem(Scorer(policy, None, get_objective("sft")), lengths[0]) is None
        inputs = data, config.split, tokenizer
        measures = {}
        if reference is not None:
            split = load_split(*inputs, *lengths, False, trained.model.add_bos, silent=bool(results), cache_dir=trained.cache_dir())
            examples = next(split.epochs(EVAL_SEED))[: config.n_pairs]
            pairs = measure_pairs(policy, reference, objective, split, examples, fast, config.batch_size)
            measures |= {name: (values, None) for name, values in pairs.items()}
        if config.n_prompts:
            prompts = load_prompts(*inputs, lengths[1], trained.model.add_bos, trained.cache_dir())[: config.n_prompts]
            settings = own_distribution(tokenizer, lengths[0])
            rows = []
            for first, some in batched(prompts, config.batch_size):
                rows += sample_batch(policy, tokenizer, some, first, config.n, settings, config.seed)
            measures |= measure_samples(policy, reference, rows, reward, fast, config.batch_size)
            measures |= measure_whole_texts(policy, rows, fast, config.batch_size) | measure_diversity(rows)
        results[trained.name] = {name: estimate(*measures[name], seed=config.seed) for name in MEASURES if name in measures}
        if reference is None:
            print(f"{trained.name}: no reference is known, so nothing is compared with one: reference=<weights>")
    print(table_of(results))
    if config.out:
        os.makedirs(os.path.dirname(os.path.abspath(config.out)), exist_ok=True)
        with open(config.out, "w") as file:
            content = {name: {key: value._asdict() for key, value in values.items()} for name, values in results.items()}
            json.dump({"config": OmegaConf.to_container(config), "measures": MEASURES, "results": content}, file, indent=1)
    return results


def objective_of(trained: Trained) -> Optional[Objective]:
    """Of pairs, with which the model was trained; None where there was none, or it is not known."""
    if trained.config is None:
        return None
    loss = OmegaConf.to_container(trained.config.loss)
    objective = get_objective(loss.pop("name"), **loss)
    return objective if "rejected" in objective.roles else None


def main() -> None:
    """The command line."""
    run_command("eval", run)


if __name__ == "__main__":
    main()
