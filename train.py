"""Train a language model: SFT, or preference training with TDPO, DPO and their relatives (config/loss).

    python -u train.py exp_name=sft
    python -u train.py exp_name=tdpo loss=tdpo model.archive=<folder of the SFT run>/LATEST/policy.pt

config/config.yaml lists every key. Config, data and archive are checked before a model is loaded.
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
from tdpo.checkpointing.resume import Resumed, RunFolder, archive_of, check_same_data, choose_run_dir
from tdpo.cli.check_config import Checked, check_config, moves_reference
from tdpo.cli.command_line import override, run_command
from tdpo.cli.run_config import load_run_config
from tdpo.data.batching import BatchStream, batches_of
from tdpo.data.contract import Form
from tdpo.data.preview import preview
from tdpo.data.split import TokenizedSplit
from tdpo.distributed.launch import join_ranks, own_rank, processes_to_start, start_ranks
from tdpo.distributed.watchdog import Watch
from tdpo.distributed.world import World
from tdpo.losses import Objective
from tdpo.models.adapters import OwnReference, attach, named_base
from tdpo.models.archive import find_archive
from tdpo.models.build import Models, check_model, compute_dtype, empty_model, is_hugging_face, load_model_config
from tdpo.models.places import check_local, prepare_hub
from tdpo.models.positions import scaling_by_length
from tdpo.models.quantized import check_quantize, described, emptied
from tdpo.models.tokenizer import load_tokenizer
from tdpo.optimizers import complete_options
from tdpo.training.costs import costs
from tdpo.training.limits import check_limits
from tdpo.training.schedule import Schedule, change_of_schedule
from tdpo.training.sinks import Sink, open_sinks
from tdpo.utils import DTYPES, Stopped, UserError, get_local_dir, plural, rank0_print, silenced
from tdpo.weights import parameter_count


def run(config: DictConfig, overrides: Sequence[str] = (), world: Optional[World] = None) -> str:
    """Make one run, from a composed config to its last checkpoint.

    Args:
        config: the composed config, see config/config.yaml.
        overrides: the command line's overrides; ranks that are started here get them too.
        world: ranks that have joined already; None: start or join them as the config says.

    Returns:
        the path of the run's folder.

    Raises:
        UserError: the config, the data, the archive or the run's folder cannot be used.
        RunError: training failed, see utils.py.
        Stopped: a signal ended the run.
    """
    checked = check_config(config, overrides)
    check_limits(config, checked.objective)
    if config.dry_run:
        with silenced(own_rank() > 0):
            return dry_run(checked)
    if world is None and (n := processes_to_start(config)) > 1:
        run_dir = choose_run_dir(config)
        named = config.resume or config.local_run_dir
        start_ranks(n, os.path.abspath(__file__), [*overrides, *([] if named else [override("local_run_dir", run_dir)])], config)
        return run_dir
    with join_ranks(config) if world is None else nullcontext(world) as world, Watch(world), silenced(not world.is_first):
        return train(checked, world)


def dry_run(checked: Checked) -> str:
    """Check and read all that a run would before its model is loaded, print the counts and an example, and return '': nothing is written
    but the caches."""
    config, objective = checked.config, checked.objective
    rank0_print(described_run(checked))
    plan = prepare(config, objective, World(), "", None)
    rank0_print(schedule_of(config, batches_of(config, objective.stages, plan.data["train"])))
    rank0_print(preview(plan.data["train"], plan.tokenizer))
    rank0_print("dry run: nothing was trained")
    return ""


def described_run(checked: Checked) -> str:
    """Return the config, the resolved loss and optimizer, and what check_config notes, for the console."""
    config, objective, notes = checked
    options = complete_options(config.optimizer, OmegaConf.to_container(config.optimizer_options))
    lines = [f"loss: {objective.name} {objective.hyperparameters}", f"optimizer: {config.optimizer} {options}"]
    return "\n".join([OmegaConf.to_yaml(config), *lines, *notes])


def train(checked: Checked, world: World) -> str:
    """Make the run. Called on all ranks; returns the path of the run's folder."""
    config, objective = checked.config, checked.objective
    sinks: list[Sink] = []
    with RunFolder(world, config, objective) as folder, ExitStack() as at_end:
        resumed = folder.resumed
        rank0_print(described_run(checked))
        seed_everything(config)
        plan = world.from_first(lambda: prepare(config, objective, world, folder.path, resumed))
        data = shared_data(world, plan)
        given = plan.model, plan.model_config, plan.cache_dir, plan.weights, objective.needs_reference
        models = Models(*given, config.max_length, config.adapter, config.seed, moves_reference(config, objective))
        template = getattr(plan.tokenizer, "chat_template", None)
        if resumed is None:
            folder.begin(template)
        at_end.callback(lambda: [sink.close() for sink in sinks])
        trainer = build_trainer(config, objective, world, plan, data, models, sinks)
        if resumed is not None:
            fingerprints = {name: split.fingerprint for name, split in data.items()}
            world.from_first(lambda: check_same_data(resumed, fingerprints, trainer.reference_fingerprint))
            trainer.resume(resumed)
            for line in change_of_schedule(trainer.schedule, resumed.progress.config, trainer.batches, trainer.progress.updates):
                rank0_print(line)
            folder.begin(template)  # this changes the folder, so only when it is certain that the run can be resumed
            left = "" if trainer.progress.batches < len(trainer.batches) else "; no batch is left: set a larger n_epochs or n_examples"
            rank0_print(f"resumed from {resumed.folder}: {plural(trainer.progress.examples, 'example')} trained on so far{left}")
        trainer.archive = plan.model.archive  # LATEST may have moved since the weights were read
        if world.is_first:
            sinks += open_sinks(plan.run_dir, config, trainer.progress.wandb_id, trainer.progress.examples)
        try:
            trainer.train()
        except Stopped as stopped:
            if world.is_first:
                print(f"stopped by {signal.Signals(stopped.signum).name}; to continue: resume={plan.run_dir}", file=sys.stderr)
            raise
    rank0_print(f"done: {plan.run_dir}")
    return plan.run_dir


@dataclass
class Plan:
    """What rank 0 decides, loads and checks before models are built. `data` and `weights` are not sent to the other ranks."""

    run_dir: str
    cache_dir: str
    model: DictConfig  # config.model, with its archive resolved, see archive_of
    tokenizer: Any
    model_config: Any
    files: list[str]  # that hold the tokens; [] if the tokens are in memory
    data: Optional[Mapping[str, TokenizedSplit]]  # by split (train, eval)
    weights: Optional[Mapping[str, torch.Tensor]]  # of model.archive if that is a file; mapped into memory, not yet read

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "data": None, "weights": None}


def prepare(config: DictConfig, objective: Objective, world: World, run_dir: str, resumed: Optional[Resumed]) -> Plan:
    """Load and check all that is needed before models are built. Called on rank 0 only.

    Raises:
        UserError: the model, the archive or the data cannot be used.
    """
    cache_dir = get_local_dir(config.local_dirs)
    model = OmegaConf.merge(config.model, {"archive": archive_of(resumed, config.model.archive)})
    paths = [node.get(key) for node in config.datasets.values() for key in ("path", "eval_path")]
    if model.archive is not None and not is_hugging_face(model.archive):
        find_archive(model.archive)  # reports a file that is missing before anything is downloaded
    needed = [model.name_or_path, model.tokenizer_name_or_path, *paths]
    check_local(needed)
    prepare_hub(needed)
    if world.device.type == "cpu":
        check_cpu(config)
    if model.quantize is not None:
        check_quantize()
    tokenizer = load_tokenizer(model, cache_dir)
    model_config = load_model_config(model, tokenizer, cache_dir)
    weights = check_model(model, model_config, tokenizer, config.max_length)
    for line in [*other_settings(model), *held_scaling(model_config, config.max_length)]:
        rank0_print(line)
    empty = empty_model(model_config)
    trainer_of(config).strategy_class.check_model(empty, config, world)
    if model.quantize is not None:
        rank0_print(described(emptied(empty, model.quantize, compute_dtype(model)), model.quantize))
    if config.adapter.rank is not None:
        rank0_print(attach(empty, config.adapter, DTYPES[config.model.policy_dtype], config.seed, moves_reference(config, objective)))
    data = {name: load_data(config, split, tokenizer, objective, cache_dir) for name, split in (("train", "train"), ("eval", "test"))}
    ranks = max(world.size, processes_to_start(config) if config.dry_run else 1)
    own_base = config.adapter.rank is not None and named_base(model, model.archive) is None
    for line in costs(config, objective, empty, data["train"], ranks, world.device, own_base):
        rank0_print(line)
    files = [file for split in data.values() for file in split.files]
    return Plan(run_dir, cache_dir, model, tokenizer, model_config, files, data, weights)


def other_settings(model: DictConfig) -> list[str]:
    """Return a warning if the archive's run was given another chat template, tokenizer or beginning of sequence; else an empty list."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(model.archive or "")))
    if model.archive is None or not os.path.isfile(os.path.join(folder, "config.yaml")):
        return []
    before = load_run_config(os.path.join(folder, "config.yaml")).model
    keys = ("tokenizer_name_or_path", "chat_template", "chat_template_kwargs", "add_bos")
    different = [f"model.{key}={before[key]}" for key in keys if before[key] != model.get(key)]
    return [f"warning: the run of model.archive had {', '.join(different)}; here it is otherwise"] if different else []


def held_scaling(model_config, max_length: int) -> list[str]:
    """Return a line if the model's rotary positions are scaled by the length of the text; else an empty list."""
    kind = scaling_by_length(model_config, max_length)
    return [f"positions: {kind} scaling as for max_length={max_length} tokens, whatever the length of a text"] if kind else []


def shared_data(world: World, plan: Plan) -> Mapping[str, TokenizedSplit]:
    """Return the data on every rank: mapped from the token files, or, if a rank does not see the files, sent by rank 0."""
    seen = all(world.gather(all(map(os.path.exists, plan.files))))
    return world.from_first(lambda: plan.data if seen else {name: split.in_memory() for name, split in plan.data.items()})


def trainer_of(config: DictConfig) -> type[trainers.BasicTrainer]:
    """Return the class that config.trainer names; the schema has checked that it exists."""
    return getattr(trainers, config.trainer)


def check_cpu(config: DictConfig) -> None:
    """Raise UserError if the config asks for something that PyTorch cannot do on a CPU."""
    if config.model.attn_implementation == "flex_attention":
        raise UserError("model.attn_implementation=flex_attention: PyTorch has no backward pass for it on CPUs; use sdpa")
    half = {"bfloat16", "float16"} & {config.model.policy_dtype, config.model.fsdp_policy_mp}
    if config.compile and half:
        raise UserError(f"compile=true: PyTorch's compiler for CPUs fails on {half.pop()}; use compile=false or float32")


def build_trainer(
    config: DictConfig,
    objective: Objective,
    world: World,
    plan: Plan,
    data: Mapping[str, TokenizedSplit],
    models: Models,
    sinks: list[Sink],
) -> trainers.BasicTrainer:
    """Build the config's trainer with its models. Sharded models start empty and are filled in place: only rank 0 builds whole ones."""
    trainer_class = trainer_of(config)
    sharded = trainer_class.strategy_class.sharded
    policy, reference = models.empty() if sharded else (models.policy(), models.reference())
    if config.adapter.rank is not None and objective.needs_reference:
        reference = OwnReference(policy)
    rank0_print(f"model: {plural(parameter_count(policy), 'parameter')}, {config.model.policy_dtype}")
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
    rank0_print(schedule_of(config, trainer.batches))
    return trainer


def schedule_of(config: DictConfig, batches: BatchStream) -> str:
    """Return lines about the steps of a run and their learning rate, and a warning if its warm-up does not end."""
    steps = len(batches)
    schedule = Schedule.of(config, steps)
    lines = [f"{plural(steps, 'step')}; {plural(batches.dropped, 'example')} dropped at the end of each epoch; {schedule.describe()}"]
    if steps <= schedule.warmup_steps:
        lines.append(
            f"warning: warmup_steps={config.warmup_steps}, but the run has {plural(steps, 'step')}: the learning rate only reaches "
            f"{schedule(steps - 1):.2g} of lr={config.lr:.2g}; set a smaller warmup_steps"
        )
    return "\n".join(lines)


def load_data(config: DictConfig, split: str, tokenizer, objective: Objective, cache_dir: str) -> TokenizedSplit:
    """Load a split of the config's datasets, tokenized, and print its counts.

    Args:
        config: a checked config.
        split: train or test.
        tokenizer: of Transformers.
        objective: determines the form of the examples.
        cache_dir: folder for downloaded and tokenized data.

    Raises:
        UserError: the data are invalid, or too few.
    """
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
    if split == "train" and config.drop_last and data.epoch_size < config.batch_size:
        raise UserError(
            f"{plural(data.epoch_size, 'train example')}, fewer than batch_size={config.batch_size}: set a smaller batch_size, or "
            "drop_last=false"
        )
    if objective.needs_kl_baseline and len(data.prompts) < 2:
        raise UserError(f"the {split} split has only one prompt, but loss.z0=batch needs several: use more data, or loss.z0=0")
    if objective.needs_kl_baseline and data.is_mixed and data.epoch_size <= data.examples_per_prompt.max():
        raise UserError(
            f"an epoch takes {plural(data.epoch_size, 'train example')}, which may be of one prompt, but loss.z0=batch needs several: "
            "take more (share, n_examples of the datasets), or set loss.z0=0"
        )
    if split == "train" and data.epoch_size // objective.stages < (config.batch_size if config.drop_last else 1):
        raise UserError(
            f"{plural(data.epoch_size, 'train example')} in loss.parts={objective.stages} stages: a stage has fewer than "
            f"{'batch_size=' + str(config.batch_size) if config.drop_last else 'one'}; set a smaller loss.parts or batch_size"
        )
    rank0_print(f"{split}: {data.describe()}")
    return data


def seed_everything(config: DictConfig) -> None:
    """Seed PyTorch and set its determinism. Called before the model is built, which may have random weights."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # no result depends on it, and it writes gigabytes in every microbatch


def main() -> None:
    """Run the command line."""
    run_command("config", run)


if __name__ == "__main__":
    main()
