"""Train a language model: SFT, or preference training with TDPO, DPO or IPO.

    python -u train.py exp_name=sft
    python -u train.py exp_name=tdpo loss=tdpo model.archive=<folder of the SFT run>/LATEST/policy.pt

Every key is in config/config.yaml. Config, data and archive are checked before a model is loaded.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NoReturn

import hydra
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from batching import TokenizedSplit
from checkpoints import holds_a_run
from config_schema import check_config, explain_composition_error, flat_keys
from losses import Objective, get_objective
from metrics import open_sinks
from models import build_policy_and_reference, check_model, load_model_config, load_tokenizer, prepare_hub
from preference_datasets import load_split
from trainers import BasicTrainer
from utils import RunError, UserError, get_local_dir, plural

CONFIG_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config")


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
    run_dir = choose_run_dir(config)
    hyperparameters = OmegaConf.to_container(config.loss)
    objective = get_objective(hyperparameters.pop("name"), **hyperparameters)
    print("\n".join([*notes, OmegaConf.to_yaml(config), f"loss: {objective.name} {objective.hyperparameters}"]))

    seed_everything(config)
    cache_dir = get_local_dir(config.local_dirs)
    paths = [node.get(key) for node in config.datasets.values() for key in ("path", "eval_path")]
    prepare_hub([config.model.name_or_path, config.model.tokenizer_name_or_path, *paths])
    tokenizer = load_tokenizer(config.model, cache_dir)
    model_config = load_model_config(config.model, tokenizer, cache_dir)
    archive = check_model(config.model, model_config, tokenizer, config.max_length)
    train_data, eval_data = (load_data(config, split, tokenizer, objective, cache_dir) for split in ("train", "test"))
    policy, reference = build_policy_and_reference(config.model, model_config, cache_dir, archive, objective.needs_reference)
    print(f"model: {plural(sum(p.numel() for p in policy.parameters()), 'parameter')}, {config.model.policy_dtype}")

    start_run_dir(run_dir, config)
    sinks = open_sinks(run_dir, config)
    trainer = BasicTrainer(
        policy, config, config.seed, run_dir, reference, train_data=train_data, eval_data=eval_data, tokenizer=tokenizer, sinks=sinks
    )
    print(f"{plural(len(trainer.batches), 'step')}; {plural(trainer.batches.dropped, 'example')} left out at the end of each epoch")
    try:
        trainer.train()
    finally:
        for sink in sinks:
            sink.close()
    print(f"done: {run_dir}")
    return run_dir


def load_data(config: DictConfig, split: str, tokenizer, objective: Objective, cache_dir: str) -> TokenizedSplit:
    """A split of the config's datasets, tokenized; its counts are printed."""
    data = load_split(
        OmegaConf.to_container(config.datasets),
        split,
        tokenizer,
        config.max_length,
        config.max_prompt_length,
        sft_mode="rejected" not in objective.roles,
        add_bos=config.model.add_bos,
        cache_dir=cache_dir,
    )
    if split == "train" and config.drop_last and len(data) < config.batch_size:
        raise UserError(
            f"{plural(len(data), 'train example')}, fewer than batch_size={config.batch_size}: lower it, or set drop_last=false"
        )
    print(f"{split}: {data.describe()}")
    return data


def choose_run_dir(config: DictConfig) -> str:
    """The run's folder, which is not made yet.

    Raises:
        UserError: it holds a run already.
    """
    if config.local_run_dir is None:
        timestamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        return os.path.join(get_local_dir(config.local_dirs), f"{config.exp_name}_{timestamp}")
    if holds_a_run(config.local_run_dir):
        raise UserError(f"local_run_dir={config.local_run_dir} already holds a run; choose another folder, nothing was changed")
    return config.local_run_dir


def start_run_dir(run_dir: str, config: DictConfig) -> None:
    try:
        os.makedirs(run_dir, exist_ok=True)
        OmegaConf.save(config, os.path.join(run_dir, "config.yaml"))
    except OSError as error:
        raise UserError(f"local_run_dir={run_dir} cannot be written: {error}") from None
    print("=" * 80 + f"\nWriting to {socket.gethostname()}:{run_dir}\n" + "=" * 80)


def seed_everything(config: DictConfig) -> None:
    """Before the model is built, because it may have random weights."""
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True  # as published: float32 matrix products in TF32 on a GPU
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses
        torch.use_deterministic_algorithms(True)


@contextmanager
def reported_errors() -> Iterator[None]:
    """A mistake is answered in a line or two with exit code 2, a run that cannot go on with 1, without a traceback."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain_composition_error(error, CONFIG_DIR, known_keys()), 2)
    except UserError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory: {str(error).splitlines()[0]}", 1)
    except KeyboardInterrupt:
        fail("interrupted; what was saved is kept", 130)


@hydra.main(version_base=None, config_path=CONFIG_DIR, config_name="config")
def hydra_main(config: DictConfig) -> None:
    with reported_errors():  # within the job too: Hydra would add lines of its own to an error that it sees
        run(config, list(HydraConfig.get().overrides.task))


def main() -> None:
    """The command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors itself and exits with 1
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with reported_errors():
        try:
            hydra_main()
        except ValueError as error:  # what Hydra raises for loss=null; one of the job's own is no user's mistake
            if HydraConfig.initialized():
                raise
            raise UserError(str(error)) from None


def known_keys() -> list[str]:
    """The keys of the config that the command line's groups make, or of the default one where they make none."""
    groups = [argument for argument in sys.argv[1:] if re.match(r"(model|loss|datasets)=", argument)]
    for overrides in (groups, []):
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(CONFIG_DIR, version_base=None):
                return ["model", "datasets", "loss", *flat_keys(OmegaConf.to_container(hydra.compose("config", overrides)))]
        except (HydraException, OmegaConfBaseException):
            continue
    return []


def fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print("\n".join(line if line.startswith(" ") else f"error: {line}" for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
