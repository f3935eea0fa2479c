"""Write a trained model as a Hugging Face folder that Transformers, vLLM, llama.cpp's converter and other programs load.

    python export.py run=runs/tdpo2 out=exported dtype=bfloat16

Every key is in config/export.yaml. The last checkpoint of a run has such a folder already, hf/; this command makes one of any checkpoint.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import huggingface_hub
from omegaconf import DictConfig

from tdpo.analysis.trained_models import find_trained
from tdpo.checkpointing.resume import command_of
from tdpo.checkpointing.training_state import Progress, read_progress
from tdpo.cli.check_config import check_tool_config
from tdpo.cli.command_line import run_command
from tdpo.cli.schema import Export
from tdpo.files import usual_modes
from tdpo.models.build import build_model, check_model, load_model_config
from tdpo.models.export import export_policy, model_card
from tdpo.models.places import prepare_hub
from tdpo.models.tokenizer import load_tokenizer
from tdpo.utils import DTYPES, RunError, UserError, reason_of


def run(config: DictConfig, overrides: Sequence[str] = ()) -> str:
    """Write the folder and return its path.

    Args:
        config: see config/export.yaml.

    Raises:
        UserError: the config or the run cannot be used, or the folder exists.
        RunError: the upload failed; the folder is kept.
    """
    check_tool_config(config, Export)
    if os.path.lexists(config.out):
        raise UserError(f"out={config.out} exists: give the path of a new folder")
    trained = find_trained(config.run)
    if trained.config is None:
        raise UserError(f"run={config.run} is a pretrained model, not a run")
    prepare_hub(trained.on_hub())
    cache_dir = trained.cache_dir()
    tokenizer = load_tokenizer(trained.model, cache_dir)
    model_config = load_model_config(trained.model, tokenizer, cache_dir)
    weights = check_model(trained.model, model_config, tokenizer, 1)
    dtype = DTYPES[config.dtype or trained.model.policy_dtype]
    model = build_model(trained.model, model_config, dtype, cache_dir, weights)
    command = command_of(os.path.dirname(trained.checkpoint))
    card = model_card(trained.config, progress_of(trained.checkpoint), command, cache_dir)
    temporary = config.out.rstrip("/") + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    try:
        export_policy(model, tokenizer, temporary, model.state_dict(), trained.config.model, cache_dir, card)
        usual_modes(temporary)
        os.rename(temporary, config.out)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # Transformers refuses to save some configs and settings
        raise RunError(f"out={config.out}: Transformers cannot write this model: {reason_of(error)}; nothing was written") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(os.path.getsize(os.path.join(config.out, file)) for file in os.listdir(config.out))
    print(f"{config.out}: {trained.checkpoint} in {str(dtype).removeprefix('torch.')}, {size / 1e9:.2f} GB")
    if config.push is not None:
        push(config.out, config.push)
    return config.out


def progress_of(checkpoint: str) -> Mapping:
    """Return what a checkpoint's progress.json holds; that of no training if it has none, as one of the published code."""
    try:
        return asdict(read_progress(checkpoint))
    except (OSError, ValueError):
        return asdict(Progress())


def push(folder: str, repository: str) -> None:
    """Upload a folder to the Hugging Face hub.

    Raises:
        RunError: it failed.
    """
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        print(hub.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # the hub's client raises a dozen types: no access, no network, no such owner
        raise RunError(f"push={repository}: {' '.join(str(error).split())[:200]}; the model is in {folder}") from None


def main() -> None:
    """Run the command line."""
    run_command("export", run)


if __name__ == "__main__":
    main()
