"""Write a page with the implicit reward and KL of every response token, for pairs of the data, with several runs side by side.

    python token_report.py run=[runs/dpo,runs/tdpo2] out=report.html

Every key is in config/token_report.yaml. A DPO policy is a token-level reward model (Rafailov et al. 2024, "From r to Q*",
arXiv 2404.12358): the reward of a response is the sum of beta (log pi - log pi_ref) over its tokens.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Optional, Union

import numpy as np
from omegaconf import DictConfig

from preference_datasets import load_split
from tdpo.analysis.pages import write_page
from tdpo.analysis.trained_models import Trained, find_inputs, load_compared
from tdpo.cli.check_config import check_tool_config
from tdpo.cli.command_line import run_command
from tdpo.cli.schema import TokenReport
from tdpo.data.split import EVAL_SEED, Example, TokenizedExample, TokenizedSplit
from tdpo.distributed.world import World
from tdpo.microbatches import Packing
from tdpo.scoring.token_statistics import token_statistics
from tdpo.utils import UserError, batched

ROLES = ("chosen", "rejected")
COLUMNS = {"logps": "logps", "reference": "reference_logps", "kl": "kl"}  # column of the page -> field of TokenStatistics
FULL = 98  # percentile of the tokens at which the colour and the bar reach their maximum
REPLACEMENT = "\ufffd"  # what a decoder writes for a part of a character
BETA = 0.1  # if the run's own is not known or does not exist; the papers' default


def run(config: DictConfig, overrides: Sequence[str] = ()) -> str:
    """Write the page and return its path.

    Args:
        config: see config/token_report.yaml.

    Raises:
        UserError: the config, a model or the data cannot be used, or the runs have different tokenizers.
    """
    check_tool_config(config, TokenReport)
    device = World().device
    models, data, lengths = find_inputs(config, [config.reference])
    shown, values, page = None, [], {"runs": [], "pairs": []}
    for trained in models:
        policy, reference, tokenizer, fast = load_compared(trained, config.reference, device, lengths[0])
        if reference is None:
            raise UserError(f"run={trained.name}: no reference is known to compare it with: give reference=<weights>")
        options = {"add_bos": trained.model.add_bos, "silent": True, "cache_dir": trained.cache_dir()}
        split = load_split(data, config.split, tokenizer, *lengths, **options)
        examples = next(split.epochs(EVAL_SEED))[: config.n_pairs]
        tokens = [split.example(example) for example in examples]
        if shown is not None and tokens != shown:
            raise UserError(f"run={trained.name} tokenizes the pairs differently from {models[0].name}: write a separate report for it")
        if shown is None:
            page["pairs"] = [described(split, example, tokenizer) for example in examples]
        shown = tokens
        values.append(by_pair(policy, reference, tokens, fast, config.batch_size))
        page["runs"].append({"name": trained.name, "beta": config.beta or beta_of(trained)})
    for pair, *columns in zip(page["pairs"], *values):
        pair["values"] = columns
    page["scale"] = scale_of(page)
    if not np.isfinite(list(page["scale"].values())).all():
        raise UserError("a model computes NaN or infinite log-probabilities, which cannot be shown: check its weights")
    write_page("token_report", config.out, data=page)
    print(f"{config.out}: {len(page['pairs'])} pairs, {os.path.getsize(config.out) / 1e6:.2f} MB")
    return config.out


def beta_of(trained: Trained) -> float:
    """Return beta of the run's reward; BETA if it is unknown or the reward does not compare with the reference."""
    objective = trained.objective()
    return BETA if objective is None or not objective.implicit_rewards else objective.reward_scale or BETA


def described(split: TokenizedSplit, example: Example, tokenizer) -> dict:
    """Return what all runs share of a pair: its id, the prompt, and per role the text of each token.

    Args:
        split: the tokenized data.
        example: one pair of it.
        tokenizer: decodes the tokens.
    """
    element, (prompt, responses, masks, _) = split.element(example), split.example(example)
    # In conversations only the turns of the segment are in the loss mask and shown.
    masks = masks or [[1] * len(ids) for ids in responses]
    tokens = {
        role: [piece for piece, scored in zip(pieces_of(tokenizer, prompt[-1], ids), mask) if scored]
        for role, ids, mask in zip(ROLES, responses, masks)
    }
    return {"id": element["example_id"], "prompt": tokenizer.decode(prompt), "tokens": tokens}


def pieces_of(tokenizer, before: int, ids: Sequence[int]) -> list[Optional[str]]:
    """Return the text that each token adds. They are decoded in context, because some tokenizers write spaces only between tokens.

    Args:
        tokenizer: decodes the tokens.
        before: the token that precedes them.
        ids: the tokens.

    Returns:
        one text per token. A character of several tokens is the text of the first of them; the others have None.
    """
    pieces: list[Optional[str]] = []
    text = longer = tokenizer.decode([before])
    waiting: list[int] = []  # tokens of which the last one may end within a character
    for i in range(len(ids)):
        last, longer = longer, tokenizer.decode([before, *ids[: i + 1]])
        if waiting and longer.startswith(last) and not longer.endswith(REPLACEMENT):  # the text has the replacement character itself
            pieces += _shared_piece(tokenizer, text, last, waiting)
            text, waiting = last, []
        waiting.append(ids[i])
        if not longer.endswith(REPLACEMENT) or i == len(ids) - 1:
            pieces += _shared_piece(tokenizer, text, longer, waiting)
            text, waiting = longer, []
    return pieces


def _shared_piece(tokenizer, text: str, longer: str, ids: Sequence[int]) -> list[Optional[str]]:
    """Return what the tokens add to a text, for the first of them, and None for the others."""
    piece = longer.removeprefix(text) if longer.startswith(text) else tokenizer.decode(list(ids))
    return [piece, *[None] * (len(ids) - 1)]


def by_pair(
    policy, reference, tokens: Sequence[TokenizedExample], fast: Union[bool, Packing], batch_size: int
) -> list[dict[str, dict[str, list[float]]]]:
    """Compute the numbers of the page for one model.

    Args:
        policy, reference: models on the same device.
        tokens: the pairs.
        fast: score both responses in one row, see `token_statistics`.
        batch_size: pairs at a time.

    Returns:
        for each pair role -> column -> one value per token, nats, rounded to 4 decimals.
    """
    pairs = []
    for _, some in batched(tokens, batch_size):
        statistics = token_statistics(policy, reference, some, fast)
        ends = np.cumsum([n for example in some for n in example.counts()])
        columns = {name: np.split(getattr(statistics, key).double().cpu().numpy().round(4), ends[:-1]) for name, key in COLUMNS.items()}
        responses = [{name: parts[i].tolist() for name, parts in columns.items()} for i in range(len(ends))]
        pairs += [dict(zip(ROLES, two)) for _, two in batched(responses, len(ROLES))]
    return pairs


def scale_of(page: Mapping) -> dict[str, float]:
    """Return the absolute reward and the KL (nats) at which the colour and the bar reach their maximum: percentile FULL over the page."""
    rewards, kls = [], []
    for pair in page["pairs"]:
        for run, values in zip(page["runs"], pair["values"]):
            for role in ROLES:
                rewards += [run["beta"] * abs(a - b) for a, b in zip(values[role]["logps"], values[role]["reference"])]
                kls += values[role]["kl"]
    return {"reward": max(float(np.percentile(rewards, FULL)), 1e-3), "kl": max(float(np.percentile(kls, FULL)), 1e-3)}


def main() -> None:
    """Run the command line."""
    run_command("token_report", run)


if __name__ == "__main__":
    main()
