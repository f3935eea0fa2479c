"""Train a language model: SFT, or preference training with TDPO, DPO and their relatives (config/loss).

    python -u train.py exp_name=sft
    python -u train.py exp_name=tdpo loss=tdpo model.archive=<folder of the SFT run>/LATEST/policy.pt

Every key is in config/config.yaml. Config, data and archive are checked before a model is loaded.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import torch
from omegaconf import DictConfig, OmegaConf

import trainers
from preference_datasets import load_split
from tdpo.checkpointing.resume import Resumed, RunFolder, archive_of, check_same_data, choose_run_dir, find_checkpoint
from tdpo.cli.check_config import Checked, check_config
from tdpo.cli.command_line import run_command
from tdpo.data.contract import Form
from tdpo.data.split import TokenizedSplit
from tdpo.distributed.launch import join_ranks, processes_to_start, start_ranks
from tdpo.distributed.watchdog import Watch
from tdpo.distributed.world import World
from tdpo.losses import Objective
from tdpo.models.build import Models, check_model, empty_model, load_model_config, load_tokenizer, prepare_hub
from tdpo.training.metrics import Sink, open_sinks
from tdpo.utils import Stopped, UserError, get_local_dir, plural, rank0_print, silenced


def run(config: DictConfig, overrides: Sequence[str] = (), world: Optional[World] = None) -> str:
    """Make one run, from a composed config to its last checkpoint.

    Args:
        config: see config/config.yaml.
        overrides: the command line's.
        world: processes that have met already; None: they are started or joined as the config asks for.

    Returns:
        the run's folder.

    Raises:
        UserError, RunError: see utils.py.
    """
    checked = check_config(config, overrides)
    if world is None and (n := processes_to_start(config)) > 1:
        run_dir = choose_run_dir(config)
        named = config.resume or config.local_run_dir
        start_ranks(n, os.path.abspath(__file__), [*overrides, *([] if named else [f"local_run_dir='{run_dir}'"])], config)
        return run_dir
    with join_ranks(config) if world is None else nullcontext(world) as world, Watch(world), silenced(not world.is_first):
        return train(checked, world)


def train(checked: Checked, world: World) -> str:
    """Make the run, in each of its processes."""
    config, objective, notes = checked
    resumed = find_checkpoint(world, config, objective)
    rank0_print("\n".join([*notes, OmegaConf.to_yaml(config), f"loss: {objective.name} {objective.hyperparameters}"]))
    seed_everything(config)
    plan = world.from_first(lambda: prepare(config, objective, world, resumed))
    data = shared_data(world, plan)
    models = Models(plan.model, plan.model_config, plan.cache_dir, plan.weights, objective.needs_reference)

    sinks: list[Sink] = []
    with ExitStack() as at_end:
        at_end.callback(lambda: [sink.close() for sink in sinks])
        folder = RunFolder(world, plan.run_dir, config, resumed)
        if resumed is None:
            at_end.enter_context(folder)
        trainer = build_trainer(config, objective, world, plan, data, models, sinks)
        if resumed is not None:
            fingerprints = {name: split.fingerprint for name, split in data.items()}
            world.from_first(lambda: check_same_data(resumed, fingerprints, trainer.reference_fingerprint))
            trainer.resume(resumed)
            at_end.enter_context(folder)  # not before it is certain that the run can be resumed
            left = "" if trainer.progress.batches < len(trainer.batches) else "; none is left: a larger n_epochs or n_examples would go on"
            rank0_print(f"resumed from {resumed.folder}: {plural(trainer.progress.examples, 'example')} were trained on{left}")
        if world.is_first:
            sinks += open_sinks(plan.run_dir, config, trainer.progress.wandb_id)
        try:
            trainer.train()
        except Stopped as stopped:
            if world.is_first:
                print(f"stopped by {signal.Signals(stopped.signum).name}; resume={plan.run_dir} goes on from here", file=sys.stderr)
            raise
    rank0_print(f"done: {plan.run_dir}")
    return plan.run_dir


@dataclass
class Plan:
    """What rank 0 alone decides and reads, checked, before models are built. Its last two fields are not sent to the others."""

    run_dir: str
    cache_dir: str
    model: DictConfig  # the config's, with the archive that is meant
    tokenizer: Any
    model_config: Any
    files: list[str]  # that hold the tokens; none where they are in memory
    data: Optional[Mapping[str, TokenizedSplit]]  # train, eval
    weights: Optional[Mapping[str, torch.Tensor]]  # of model.archive, where that is a file; still on its disk

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "data": None, "weights": None}


def prepare(config: DictConfig, objective: Objective, world: World, resumed: Optional[Resumed]) -> Plan:
    """Read and check all that is needed before models are built. Called by rank 0.

    Raises:
        UserError: the run folder, the model, the archive or the data cannot be used.
    """
    run_dir = choose_run_dir(config)
    cache_dir = get_local_dir(config.local_dirs)
    model = OmegaConf.merge(config.model, {"archive": archive_of(resumed, config.model.archive)})
    paths = [node.get(key) for node in config.datasets.values() for key in ("path", "eval_path")]
    prepare_hub([model.name_or_path, model.tokenizer_name_or_path, *paths])
    if world.device.type == "cpu":
        check_cpu(config)
    tokenizer = load_tokenizer(model, cache_dir)
    model_config = load_model_config(model, tokenizer, cache_dir)
    weights = check_model(model, model_config, tokenizer, config.max_length)
    trainer_of(config).strategy_class.check_model(empty_model(model_config), config, world)
    data = {name: load_data(config, split, tokenizer, objective, cache_dir) for name, split in (("train", "train"), ("eval", "test"))}
    files = [file for split in data.values() for file in split.files]
    return Plan(run_dir, cache_dir, model, tokenizer, model_config, files, data, weights)


def shared_data(world: World, plan: Plan) -> Mapping[str, TokenizedSplit]:
    """Return the data on every rank: all map the same files into memory, or, if one does not see these, are sent the tokens."""
    seen = all(world.gather(all(map(os.path.exists, plan.files))))
    return world.from_first(lambda: plan.data if seen else {name: split.in_memory() for name, split in plan.data.items()})


def trainer_of(config: DictConfig) -> type[trainers.BasicTrainer]:
    """Return the class that the config's trainer names; the schema knows which there are."""
    return getattr(trainers, config.trainer)


def check_cpu(config: DictConfig) -> None:
    """Raise UserError for what PyTorch cannot do on a CPU."""
    if config.model.attn_implementation == "flex_attention":
        raise UserError("model.attn_implementation=flex_attention: PyTorch has no backward pass of it for CPUs; use sdpa")
    half = {"bfloat16", "float16"} & {config.model.policy_dtype, config.model.fsdp_policy_mp}
    if config.compile and half:
        raise UserError(f"compile=true: PyTorch's compiler for CPUs fails on {half.pop()}; compile=false, or float32")


def build_trainer(
    config: DictConfig,
    objective: Objective,
    world: World,
    plan: Plan,
    data: Mapping[str, TokenizedSplit],
    models: Models,
    sinks: list[Sink],
) -> trainers.BasicTrainer:
    """Build the config's trainer with its models: sharded ones are filled in place, so that none is built as often as there are ranks."""
    trainer_class = trainer_of(config)
    sharded = trainer_class.strategy_class.sharded
    policy, reference = models.empty() if sharded else (models.policy(), models.reference())
    rank0_print(f"model: {plural(sum(p.numel() for p in policy.parameters()), 'parameter')}, {config.model.policy_dtype}")
    trainer = trainer_class(
        policy,
        config,
        config.seed,
        plan.run_dir,
        reference,
        objective=objective,
        train_data=data["train"],
        eval_data=data["eval"],
        tokenizer=plan.tokenizer,
        sinks=sinks,
        world=world,
        weights={"policy": models.policy, "reference": models.reference},
    )
    rank0_print(f"{config.trainer}: {trainer.ranks()}")
    rank0_print(f"{plural(len(trainer.batches), 'step')}; {plural(trainer.batches.dropped, 'example')} left out at the end of each epoch")
    return trainer


def load_data(config: DictConfig, split: str, tokenizer, objective: Objective, cache_dir: str) -> TokenizedSplit:
    """Load a split of the config's datasets, tokenized; its counts are printed."""
    data = load_split(
        OmegaConf.to_container(config.datasets),
        split,
        tokenizer,
        config.max_length,
        config.max_prompt_length,
        Form(objective.roles, objective.needs_ratings, objective.needs_segments),
        add_bos=config.model.add_bos,
        cache_dir=cache_dir,
    )
    if split == "train" and config.drop_last and len(data) < config.batch_size:
        raise UserError(
            f"{plural(len(data), 'train example')}, fewer than batch_size={config.batch_size}: lower it, or set drop_last=false"
        )
    if objective.needs_kl_baseline and len(data.prompts) < 2:
        raise UserError(f"the {split} split has one prompt alone: loss.z0=batch needs responses to other ones; more data, or loss.z0=0")
    if split == "train" and len(data) // objective.stages < (config.batch_size if config.drop_last else 1):
        raise UserError(
            f"{plural(len(data), 'train example')} in loss.parts={objective.stages}: fewer than batch_size={config.batch_size} each"
        )
    rank0_print(f"{split}: {data.describe()}")
    return data


def seed_everything(config: DictConfig) -> None:
    """Seed before the model is built, because it may have random weights."""
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True  # as published: float32 matrix products in TF32 on a GPU
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses
        torch.use_deterministic_algorithms(True)


def main() -> None:
    """The command line."""
    run_command("config", run)


if __name__ == "__main__":
    main()
