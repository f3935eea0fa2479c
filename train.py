"""Train a language model: SFT, or preference training with TDPO, DPO and their relatives (config/loss).

    python -u train.py exp_name=sft
    python -u train.py exp_name=tdpo loss=tdpo model.archive=<folder of the SFT run>/LATEST/policy.pt

Every key is in config/config.yaml. Config, data and archive are checked before a model is loaded.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from omegaconf import DictConfig, OmegaConf

from preference_datasets import load_split
from tdpo.checkpointing.resume import (
    FolderLock,
    Resumed,
    archive_of,
    check_same_data,
    check_seen_by_all,
    choose_run_dir,
    find_checkpoint,
    prepare_run_dir,
)
from tdpo.cli.command_line import run_command, silence_unless
from tdpo.cli.schema import check_config
from tdpo.data.batching import TokenizedSplit
from tdpo.data.token_cache import Form
from tdpo.distributed.launch import joined, processes_to_start, start_ranks
from tdpo.distributed.watchdog import Watch
from tdpo.distributed.world import World
from tdpo.losses import Objective, objective_of
from tdpo.models.build import Models, check_model, load_model_config, load_tokenizer, prepare_hub
from tdpo.training.metrics import Sink, open_sinks
from tdpo.utils import Stopped, UserError, get_local_dir, plural
from trainers import BasicTrainer, FSDPTrainer, TensorParallelTrainer

TRAINERS = {trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)}


def run(config: DictConfig, overrides: Sequence[str] = ()) -> str:
    """One run, from a composed config to its last checkpoint.

    Args:
        config: see config/config.yaml.
        overrides: the command line's.

    Returns:
        the run's folder.

    Raises:
        UserError, RunError: see utils.py.
    """
    notes = check_config(config, overrides)
    if (n := processes_to_start(config)) > 1:
        run_dir = choose_run_dir(config)
        named = config.resume or config.local_run_dir
        start_ranks(n, os.path.abspath(__file__), [*overrides, *([] if named else [f"local_run_dir='{run_dir}'"])], config)
        return run_dir
    with joined(config) as world, Watch(world), silence_unless(world.is_first):
        return train(config, world, notes)


def train(config: DictConfig, world: World, notes: Sequence[str]) -> str:
    """The run, in each of its processes. What rank 0 reads or makes for all, it sends to the others."""
    run_dir = world.from_first(lambda: choose_run_dir(config))
    resumed = find_checkpoint(world, run_dir, config)
    objective = objective_of(OmegaConf.to_container(config.loss), config.log_kl)
    print("\n".join([*notes, OmegaConf.to_yaml(config), f"loss: {objective.name} {objective.hyperparameters}"]))
    seed_everything(config)
    inputs = read_inputs(config, world, objective, archive_of(resumed, config.model.archive))

    sinks: list[Sink] = []
    with ExitStack() as at_end:
        at_end.callback(lambda: [sink.close() for sink in sinks])
        if resumed is None:
            at_end.enter_context(started_run_dir(world, run_dir, config, None))
        trainer = build_trainer(config, world, run_dir, inputs, sinks)
        if resumed is not None:
            world.from_first(lambda: check_same_data(resumed, trainer.data_identity(), trainer.reference_identity))
            trainer.resume(resumed)
            at_end.enter_context(started_run_dir(world, run_dir, config, resumed))  # not before it is certain that the run goes on
            left = "" if trainer.batches_given < len(trainer.batches) else "; none is left: a larger n_epochs or n_examples would go on"
            print(f"resumed from {resumed.folder}: {plural(trainer.example_counter, 'example')} were trained on{left}")
        if world.is_first:
            sinks += open_sinks(run_dir, config, trainer.wandb_id)
        try:
            trainer.train()
        except Stopped as stopped:
            if world.is_first:
                print(f"stopped by {signal.Signals(stopped.signum).name}; resume={run_dir} goes on from here", file=sys.stderr)
            raise
    print(f"done: {run_dir}")
    return run_dir


class Inputs(NamedTuple):
    """What a run reads before it trains."""

    tokenizer: Any
    data: dict[str, TokenizedSplit]  # train, eval
    models: Models


def read_inputs(config: DictConfig, world: World, objective: Objective, archive: Optional[str]) -> Inputs:
    """Read by rank 0, checked, and sent to the others, but for weights: those stay on its disk. `archive`: what model.archive means."""
    model = OmegaConf.merge(config.model, {"archive": archive})
    weights = data = None

    def read() -> tuple:
        nonlocal weights, data
        cache_dir = get_local_dir(config.local_dirs)
        paths = [node.get(key) for node in config.datasets.values() for key in ("path", "eval_path")]
        prepare_hub([config.model.name_or_path, config.model.tokenizer_name_or_path, *paths])
        if model.attn_implementation == "flex_attention" and world.device.type == "cpu":
            raise UserError("model.attn_implementation=flex_attention: PyTorch has no backward pass of it for CPUs; use sdpa")
        half = {"bfloat16", "float16"} & {model.policy_dtype, model.fsdp_policy_mp}
        if config.compile and half and world.device.type == "cpu":
            raise UserError(f"compile=true: PyTorch's compiler for CPUs fails on {half.pop()}; compile=false, or float32")
        tokenizer = load_tokenizer(model, cache_dir)
        model_config = load_model_config(model, tokenizer, cache_dir)
        weights = check_model(model, model_config, tokenizer, config.max_length)
        data = {name: load_data(config, split, tokenizer, objective, cache_dir) for name, split in (("train", "train"), ("eval", "test"))}
        return cache_dir, tokenizer, model_config, [file for split in data.values() for file in split.files]

    cache_dir, tokenizer, model_config, files = world.from_first(read)
    # Ranks map the same files into memory, or, where one of them is on a machine that does not see these, are sent the tokens.
    seen = all(world.gather(all(map(os.path.exists, files))))
    data = world.from_first(lambda: data if seen else {name: split.in_memory() for name, split in data.items()})
    models = Models(model, model_config, cache_dir, weights, objective.needs_reference)
    world.from_first(lambda: TRAINERS[config.trainer].check_model(models.empty()[0], config, world))
    return Inputs(tokenizer, data, models)


def build_trainer(config: DictConfig, world: World, run_dir: str, inputs: Inputs, sinks: list[Sink]) -> BasicTrainer:
    """The config's trainer, with its models: sharded ones are filled in place, so that none is built as often as there are ranks."""
    models, trainer_class = inputs.models, TRAINERS[config.trainer]
    policy, reference = models.empty() if trainer_class.sharded else (models.policy(), models.reference())
    print(f"model: {plural(sum(p.numel() for p in policy.parameters()), 'parameter')}, {config.model.policy_dtype}")
    trainer = trainer_class(
        policy,
        config,
        config.seed,
        run_dir,
        reference,
        train_data=inputs.data["train"],
        eval_data=inputs.data["eval"],
        tokenizer=inputs.tokenizer,
        sinks=sinks,
        world=world,
        weights={"policy": models.policy, "reference": models.reference},
    )
    print(f"{config.trainer}: {trainer.ranks()}")
    print(f"{plural(len(trainer.batches), 'step')}; {plural(trainer.batches.dropped, 'example')} left out at the end of each epoch")
    return trainer


def load_data(config: DictConfig, split: str, tokenizer, objective: Objective, cache_dir: str) -> TokenizedSplit:
    """A split of the config's datasets, tokenized; its counts are printed."""
    data = load_split(
        OmegaConf.to_container(config.datasets),
        split,
        tokenizer,
        config.max_length,
        config.max_prompt_length,
        Form(objective.roles, objective.needs_scores, objective.needs_segments),
        add_bos=config.model.add_bos,
        cache_dir=cache_dir,
    )
    if split == "train" and config.drop_last and len(data) < config.batch_size:
        raise UserError(
            f"{plural(len(data), 'train example')}, fewer than batch_size={config.batch_size}: lower it, or set drop_last=false"
        )
    if objective.needs_baseline and len(data.prompts) < 2:
        raise UserError(f"the {split} split has one prompt alone: loss.z0=batch needs responses to other ones; more data, or loss.z0=0")
    parts = objective.hyperparameters.get("parts", 1)
    if split == "train" and len(data) // parts < (config.batch_size if config.drop_last else 1):
        raise UserError(f"{plural(len(data), 'train example')} in loss.parts={parts}: fewer than batch_size={config.batch_size} each")
    print(f"{split}: {data.describe()}")
    return data


@contextmanager
def started_run_dir(world: World, run_dir: str, config: DictConfig, resumed: Optional[Resumed]) -> Iterator[None]:
    """Before anything is written into it: make it, or what a run left in it ready to go on, and keep other runs out."""
    lock = nullcontext()
    with world.agreed():
        try:
            if world.is_first:
                os.makedirs(run_dir, exist_ok=True)
                lock = FolderLock(run_dir)
                prepare_run_dir(run_dir, resumed)
                OmegaConf.save(config, os.path.join(run_dir, "config.yaml"))
        except OSError as error:
            raise UserError(f"local_run_dir={run_dir} cannot be written: {error}") from None
    check_seen_by_all(world, run_dir)
    print("=" * 80 + f"\nWriting to {socket.gethostname()}:{run_dir}\n" + "=" * 80)
    with lock:
        try:
            yield
        except UserError:
            # Nothing was done that the corrected command would go on with.
            if world.is_first and not {"metrics.jsonl", "LATEST"} & set(os.listdir(run_dir)):
                os.remove(os.path.join(run_dir, "config.yaml"))
            raise


def seed_everything(config: DictConfig) -> None:
    """Before the model is built, because it may have random weights."""
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
