"""Compare sharded models of every family with the unsharded model, in float64. Run by the ranks of a test run."""

from collections.abc import Sequence

import torch
from helpers import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from tdpo.distributed.sharding import load_weights, shard_scorer
from tdpo.distributed.tensor_parallel import split_matrices, tensor_parallel_plan
from tdpo.distributed.world import World
from tdpo.losses import get_objective
from tdpo.models.build import empty_model
from tdpo.scoring.prefix_sharing import SharedPrefixBatch, shared_prefix_batch
from tdpo.scoring.scorer import Scorer
from tdpo.utils import IGNORED, UserError, disable_dropout, full_tensor


def build(family: str, seed: int, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in model.parameters():  # including those that start at 0 or 1, so that a bias added twice is noticed
        torch.nn.init.normal_(parameter, std=0.2)
    disable_dropout(model)
    return model


def batch_of(pairs: int) -> dict[str, torch.Tensor]:
    """Return pairs with prompts of three tokens and responses of three to six; Gemma 2 needs less padding than its window."""
    generator = torch.Generator().manual_seed(0)
    batch, prompts = {}, torch.randint(3, 31, (pairs, 3), generator=generator)
    for role, lengths in (("chosen", [6, 9, 7, 8]), ("rejected", [7, 6, 8, 9])):
        ids = torch.randint(3, 31, (pairs, 9), generator=generator)
        ids[:, :3] = prompts
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        labels = torch.where((mask == 1) & (torch.arange(9) >= 3), ids, IGNORED)
        batch |= {f"{role}_input_ids": ids * mask, f"{role}_attention_mask": mask, f"{role}_labels": labels}
    return batch


def rows_of(batch: dict[str, torch.Tensor]) -> SharedPrefixBatch:
    """Return the same pairs for fast scoring."""
    rows = []
    for i in range(len(batch["chosen_labels"])):
        prompt = batch["chosen_input_ids"][i, :3].tolist()
        rows.append((prompt, [[x for x in batch[f"{role}_labels"][i].tolist() if x != IGNORED] for role in ("chosen", "rejected")]))
    return shared_prefix_batch(rows)


def gradients(scorer: Scorer, batch, total: int) -> dict[str, torch.Tensor]:
    scorer.zero_grad()
    (scorer(batch).loss / total).backward()
    return {name: full_tensor(parameter.grad).clone() for name, parameter in scorer.policy.named_parameters()}


def check(style: str, family: str, world: World, **changes) -> None:
    objective = get_objective("tdpo2", beta=0.5, alpha=0.5)
    policy, reference = (lambda seed=seed: build(family, seed, **changes) for seed in (0, 1))
    batch = batch_of(4)
    expected = gradients(Scorer(policy(), reference(), objective), batch, 4)
    scorer = Scorer(*(empty_model(policy().config, torch.float64) for _ in range(2)), objective)
    mesh = world.mesh(2 if style == "hybrid" else 1)
    if style == "tensor":
        partial = split_matrices(scorer.policy, mesh)
        split_matrices(scorer.reference, mesh)
    else:
        shard_scorer(scorer, mesh, None, None, torch.float64)
        batch = {name: tensor[world.rank :: world.size] for name, tensor in batch.items()}
        partial = []
    load_weights(world, scorer.policy, policy)
    load_weights(world, scorer.reference, reference)
    for scoring, inputs in (("plain", batch), ("fast", rows_of(batch))):
        actual = gradients(scorer, inputs, 4)
        for name in partial:
            world.sum(actual[name])
        for name, gradient in expected.items():
            # Some families compute norms or rotations in float32 whatever the model's dtype, which leaves differences of 1e-7.
            difference = (actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-3)
            assert difference < 1e-6, f"{style} {scoring} {family} {name}: {difference}"


def check_all(world: World, styles: Sequence[str]) -> list[str]:
    """Check every family in each style, and return a line for each: 'equal <style> <family>' or 'refused <family> <why>'."""
    lines = []
    for style in styles:
        for family in FAMILIES:
            changes = {} if family in ("gpt2", "gptj", "gpt_neox") else {"num_key_value_heads": 2}
            if style == "tensor":
                try:
                    tensor_parallel_plan(build(family, 0, **changes), world.size)
                except UserError as error:
                    lines.append(f"refused {family} {error}")
                    continue
            check(style, family, world, **changes)
            lines.append(f"equal {style} {family}")
    return lines
