"""Check the config of a run or a tool as a whole: every key on its own (schema.py), and which values go together."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from tdpo.cli.schema import Config, Node, Sample, loss_problems, resolved, schema_problems
from tdpo.losses import Objective, objective_of
from tdpo.optimizers import EIGHT_BIT, WHOLE, option_problems
from tdpo.utils import UserError


class Checked(NamedTuple):
    """A checked config, and what follows from it."""

    config: DictConfig
    objective: Objective
    notes: list[str]  # lines to print: values that were adjusted or have no effect


def check_config(config: DictConfig, overrides: Iterable[str] = ()) -> Checked:
    """Check a run's config, and adjust it in place.

    References are resolved, values get their types (4.0 becomes 4), and eval_every and save_every are rounded down to multiples of
    batch_size.

    Args:
        config: as Hydra composed it.
        overrides: the command line's, to tell given values from defaults.

    Raises:
        UserError: names all problems found.
    """
    values = resolved(config)
    problems = schema_problems(values, config, Config) + loss_problems(values.get("loss"), config)
    if problems:
        raise UserError("\n".join(problems))
    objective = objective_of(OmegaConf.to_container(config.loss), config.log_kl)
    problems = _joint_problems(config) + _objective_problems(config, objective)
    notes = _round_down(config, problems)
    if problems:
        raise UserError("\n".join(problems))
    return Checked(config, objective, notes + _notes(config, objective, list(overrides)))


def _joint_problems(config: DictConfig) -> list[str]:
    """Return a line for each combination of values that are valid separately but not together."""
    problems = []
    if config.trainer == "BasicTrainer" and (config.nproc_per_node or 1) > 1:
        problems.append(f"nproc_per_node={config.nproc_per_node}: trainer=BasicTrainer runs in one process; use trainer=FSDPTrainer")
    if config.trainer != "FSDPTrainer" and config.parallel.replicas > 1:
        problems.append(f"parallel.replicas={config.parallel.replicas} needs trainer=FSDPTrainer")
    if config.adapter.rank is not None and config.trainer == "TensorParallelTrainer":
        problems.append(f"adapter.rank={config.adapter.rank}: trainer=TensorParallelTrainer does not split adapters; use FSDPTrainer")
    if config.adapter.rank is not None and config.model.reference_dtype is not None:
        problems.append(
            f"model.reference_dtype={config.model.reference_dtype}: with adapters the reference is the policy's own weights; use null"
        )
    if config.model.quantize is not None:
        what = f"model.quantize={config.model.quantize}"
        if config.adapter.rank is None:
            problems.append(f"{what}: quantised weights cannot be trained, only adapters on them; set adapter.rank, for example 16")
        if config.trainer != "BasicTrainer":
            problems.append(f"{what}: trainer={config.trainer} does not split quantised weights; use trainer=BasicTrainer")
    for name, node in config.datasets.items():
        if node.get("share") is not None and node.get("n_examples") is not None:
            problems.append(f"datasets.{name}.share and datasets.{name}.n_examples exclude each other: set one of them to null")
    problems += option_problems(config.optimizer, OmegaConf.to_container(config.optimizer_options))
    if config.optimizer in (*EIGHT_BIT, *WHOLE) and config.trainer != "BasicTrainer":
        problems.append(f"optimizer={config.optimizer}: trainer={config.trainer} does not split its state; use trainer=BasicTrainer")
    if config.min_lr > config.lr:
        problems.append(f"min_lr={config.min_lr} is more than lr={config.lr}")
    if config.exp_name.strip(".") == "" or ".." in config.exp_name:
        problems.append(f"exp_name={config.exp_name!r}: must not contain '..' or consist of dots, because it names a folder")
    if config.tokens_per_microbatch is None and config.batch_size % config.gradient_accumulation_steps:
        problems.append(
            f"batch_size={config.batch_size} is not divisible by gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    if config.max_prompt_length >= config.max_length:
        problems.append(
            f"max_prompt_length={config.max_prompt_length} leaves no room for a response: it must be below max_length={config.max_length}"
        )
    if config.n_epochs is None and config.n_examples is None:
        problems.append("n_epochs and n_examples are both null: give one of them")
    if config.model.name_or_path is None and config.model.from_config is None:
        problems.append("model.name_or_path is null: give a model on the Hugging Face hub or a local folder")
    if config.model.name_or_path is not None and config.model.from_config is not None:
        problems.append(
            f"model.name_or_path={config.model.name_or_path} and model.from_config exclude each other: "
            "for a model from the hub or a folder use model=blank_model model.name_or_path=..."
        )
    if config.model.from_config is not None and not config.model.tokenizer_name_or_path:
        problems.append("model.from_config needs a tokenizer: set model.tokenizer_name_or_path")
    return problems


def _objective_problems(config: DictConfig, objective: Objective) -> list[str]:
    """Return a line for each conflict between the config and what the loss needs."""
    problems = []
    if config.reference_cache and config.scoring == "plain":
        problems.append("reference_cache=true needs fast scoring; use scoring=auto, or reference_cache=false")
    loss = f"loss={objective.name}"
    if config.reference_cache and objective.needs_kl_baseline:
        problems.append(
            f"reference_cache=true: {loss} needs the reference for mismatched responses too; use reference_cache=false, or loss.z0=0"
        )
    if objective.needs_kl_baseline and config.batch_size < 2:
        problems.append(f"batch_size=1: {loss} computes z0 from the batch's other examples; use batch_size=2 or more, or loss.z0=0")
    updated = config.reference.update_every is not None
    if updated and not objective.needs_reference:
        problems.append(f"reference.update_every={config.reference.update_every}: {loss} has no reference; use reference.update_every=null")
    if config.adapter.rank is not None and updated and config.reference.mixup != 1:
        problems.append(
            f"reference.mixup={config.reference.mixup}: with adapters the reference can only be replaced, because a mixture of A and of B "
            "gives no mixture of B A; use reference.mixup=1"
        )
    if config.reference_cache and moves_reference(config, objective):
        problems.append("reference_cache=true needs a fixed reference, but this run updates it: use reference_cache=false")
    if objective.stages > 1 and (updated or config.n_epochs is None):
        problems.append(f"{loss} replaces the reference after n_epochs of each stage: set n_epochs, and reference.update_every=null")
    return problems


def moves_reference(config: DictConfig, objective: Objective) -> bool:
    """Whether a run replaces or updates its reference (TR-DPO, sDPO)."""
    return objective.stages > 1 or OmegaConf.select(config, "reference.update_every") is not None


def _round_down(config: DictConfig, problems: list[str]) -> list[str]:
    """Round eval_every and save_every down to multiples of batch_size in place; return notes, and add values that are too small to
    `problems`."""
    notes = []
    for key in ("eval_every", "save_every"):
        value = config[key]
        if value is None or value % config.batch_size == 0:
            continue
        if value < config.batch_size:
            problems.append(f"{key}={value} is less than batch_size={config.batch_size}; use a multiple of it")
            continue
        config[key] = value - value % config.batch_size
        notes.append(f"{key}={value} rounded down to {config[key]}, a multiple of batch_size={config.batch_size}")
    return notes


def _notes(config: DictConfig, objective: Objective, overrides: list[str]) -> list[str]:
    """Return lines about values that have no effect, or an unexpected one."""
    notes, name = [], objective.name
    for key in objective.ignored:
        if any(re.match(rf"\+*loss\.{key}=", override) for override in overrides):
            notes.append(f"warning: {name.upper()} has no {key}; loss.{key} is ignored")
    for key, default in (("min_lr", 0), ("decay_steps", 0.1)):
        if config[key] != default and config.lr_schedule not in {"min_lr": ("linear", "cosine", "wsd"), "decay_steps": ("wsd",)}[key]:
            notes.append(f"lr_schedule={config.lr_schedule}: {key} has no effect")
    if config.tokens_per_microbatch is not None and config.gradient_accumulation_steps > 1:
        notes.append("tokens_per_microbatch is set; gradient_accumulation_steps is ignored")
    if config.reference_cache and not objective.needs_reference:
        notes.append(f"warning: {name} has no reference; reference_cache is ignored")
    notes += objective.notes
    if objective.needs_reference and config.model.archive is None:
        notes.append(f"warning: {name} without model.archive: policy and reference start from the base model, without SFT")
    return notes


def check_tool_config(config: DictConfig, schema: type[Node]) -> None:
    """Check a tool's config against its schema. In place, references are resolved and values get their types.

    Args:
        config: as Hydra composed it.
        schema: Sample, TokenReport, Evaluation or Export.

    Raises:
        UserError: names all problems found.
    """
    problems = schema_problems(resolved(config), config, schema)
    if not problems and schema is Sample:
        problems = _problems_of_sampling(config)
    if problems:
        raise UserError("\n".join(problems))


def _problems_of_sampling(config: DictConfig) -> list[str]:
    """Return a line for each key of sample.py that does not go with another one."""
    problems = []
    if 1 < config.num_beams < config.n:
        problems.append(
            f"n={config.n} is more than num_beams={config.num_beams}, the number of texts of a beam search; use a larger num_beams"
        )
    if config.num_beams == 1 and config.temperature == 0 and config.n > 1:
        problems.append(f"temperature=0 takes the most likely token each time, so all n={config.n} texts would be equal: give n=1")
    if config.engine == "vllm" and config.num_beams > 1:
        problems.append(f"engine=vllm has no beam search here: leave num_beams=1, or num_beams={config.num_beams} with engine=transformers")
    if config.form is None:
        return problems
    if config.prompts is None:
        problems.append(f"form={config.form} needs prompts=<the benchmark's file of questions>")
    if config.max_new_tokens is None:
        problems.append(
            f"form={config.form} needs max_new_tokens=<tokens of an answer>, so that every question is sure to have room for it"
        )
    if config.n > 1:
        problems.append(f"form={config.form} holds one answer to each question: give n=1")
    return problems
