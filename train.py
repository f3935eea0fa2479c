"""Train a language model: SFT, or preference training with TDPO, DPO or IPO.

    python -u train.py exp_name=sft
    python -u train.py exp_name=tdpo loss=tdpo model.archive=<folder of the SFT run>/LATEST/policy.pt

Every key is in config/config.yaml. The config and the data are checked before a model is loaded.
"""

import os
import socket
import sys
from datetime import datetime
from typing import Optional

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config")


def run(config: DictConfig, overrides: Optional[list[str]] = None) -> str:
    """One run, from a composed config to its last checkpoint.

    Args:
        config: see config/config.yaml.
        overrides: the command line's.

    Returns:
        the run's folder.

    Raises:
        UserError, RunError: see utils.py.
    """
    from config_schema import check_config

    notes = check_config(config, overrides or [])
    # After the check, so that a mistyped key is answered at once: these take seconds to import.
    import transformers

    from losses import get_objective
    from metrics import open_sinks
    from models import build_model, check_model, go_offline_if_unreachable, load_model_config, load_tokenizer
    from preference_datasets import load_split
    from trainers import BasicTrainer
    from utils import DTYPES, get_local_dir, plural

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run_dir = choose_run_dir(config)
    hyperparameters = OmegaConf.to_container(config.loss)
    objective = get_objective(hyperparameters.pop("name"), **hyperparameters)
    print("\n".join([*notes, OmegaConf.to_yaml(config), f"loss: {objective.name} {objective.hyperparameters}"]))

    seed_everything(config)
    cache_dir = get_local_dir(config.local_dirs)
    go_offline_if_unreachable([name for name in hub_names(config) if name])
    tokenizer = load_tokenizer(config.model, cache_dir)
    model_config = load_model_config(config.model, tokenizer, cache_dir)
    archive = check_model(config.model, model_config, tokenizer, config.max_length)
    options = OmegaConf.to_container(config.datasets)
    lengths = (config.max_length, config.max_prompt_length, objective.roles == ("chosen",), config.model.add_bos)
    train_data, eval_data = (load_split(options, split, tokenizer, *lengths, cache_dir=cache_dir) for split in ("train", "test"))
    print(f"train: {train_data.describe()}\neval: {eval_data.describe()}")

    compute_dtype = config.model.fsdp_policy_mp or config.model.policy_dtype
    policy = build_model(config.model, model_config, DTYPES[config.model.policy_dtype], cache_dir, archive)
    reference = None
    if objective.needs_reference:
        if archive is None and config.model.from_config is not None and config.model.archive is None:
            archive = policy.state_dict()  # random weights: the reference is the same random model
        dtype = DTYPES[config.model.reference_dtype or compute_dtype]
        reference = build_model(config.model, model_config, dtype, cache_dir, archive)
    print(f"model: {plural(sum(p.numel() for p in policy.parameters()), 'parameter')}, {config.model.policy_dtype}, compute {compute_dtype}")

    start_run_dir(run_dir, config)
    sinks = open_sinks(run_dir, config.exp_name, dict(config.wandb, enabled=config.wandb.enabled and not config.debug), as_dict(config))
    trainer = BasicTrainer(
        policy, config, config.seed, run_dir, reference, train_data=train_data, eval_data=eval_data, tokenizer=tokenizer, sinks=sinks
    )
    steps = len(trainer.batches)
    print(f"{plural(steps, 'step')} of {plural(config.batch_size, 'example')}, {trainer.batches.dropped} left out at the end of each epoch")
    try:
        trainer.train()
    finally:
        for sink in sinks:
            sink.close()
    print(f"done: {run_dir}")
    return run_dir


def as_dict(config: DictConfig) -> dict:
    return OmegaConf.to_container(config, resolve=True)


def hub_names(config: DictConfig) -> list[Optional[str]]:
    """What may have to come from the hub."""
    model = config.model
    names = [model.name_or_path, None if model.tokenizer_name_or_path == "reviews" else model.tokenizer_name_or_path]
    return names + [node.get("path") for node in config.datasets.values()]


def choose_run_dir(config: DictConfig) -> str:
    """The run's folder, which is not made yet.

    Raises:
        UserError: it holds a run already.
    """
    from checkpoints import holds_a_run
    from utils import UserError, get_local_dir

    if config.local_run_dir is None:
        timestamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        return os.path.join(get_local_dir(config.local_dirs), f"{config.exp_name}_{timestamp}")
    if holds_a_run(config.local_run_dir):
        raise UserError(f"local_run_dir={config.local_run_dir} already holds a run; choose another folder, nothing was changed")
    return config.local_run_dir


def start_run_dir(run_dir: str, config: DictConfig) -> None:
    from utils import UserError

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
        torch.use_deterministic_algorithms(True)


@hydra.main(version_base=None, config_path="config", config_name="config")
def hydra_main(config: DictConfig) -> None:
    run(config, list(HydraConfig.get().overrides.task))


def main() -> None:
    """The command line. A mistake is answered in a line or two with exit code 2, a run that cannot go on with 1, without a traceback."""
    from utils import RunError, UserError

    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors itself and exits with 1
    try:
        hydra_main()
    except UserError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error), 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def explain(error: Exception) -> str:
    """What was wrong with a command line that does not compose."""
    from hydra import compose, initialize_config_dir

    from config_schema import explain_composition_error, flat_keys

    hydra.core.global_hydra.GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        known = compose("config", overrides=[x for x in sys.argv[1:] if x.split("=")[0] in ("model", "loss", "datasets")][:0])
    return explain_composition_error(str(error), flat_keys(OmegaConf.to_container(known)))


def fail(message: str, code: int) -> None:
    sys.stdout.flush()
    print("\n".join(f"error: {line}" if not line.startswith(" ") else line for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
