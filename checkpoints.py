"""Checkpoints on disk: written whole or not at all, read without running what they hold.

<run_dir>/step-<examples>/policy.pt   {'step_idx', 'state', 'metrics'}, as published
<run_dir>/step-<examples>/hf/         in the last one, a folder for AutoModelForCausalLM.from_pretrained
<run_dir>/LATEST -> step-<examples>   a relative link to the newest whole checkpoint
"""

import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from typing import Optional

import torch

from utils import RunError, UserError, some_of

# Buffers that checkpoints of 2023 carry and models no longer have.
LEGACY_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def save_checkpoint(
    run_dir: str,
    examples: int,
    state: Mapping[str, torch.Tensor],
    metrics: Mapping[str, float],
    export: Optional[Callable[[str], None]] = None,
) -> str:
    """Write step-<examples>/ under a temporary name, rename it, and point LATEST to it.

    Args:
        run_dir: the run's folder.
        examples: train examples seen, policy.pt's step_idx.
        state: the policy's state dict.
        metrics: plain floats (weights_only refuses NumPy's).
        export: writes a Hugging Face model into the folder it is given.

    Returns:
        the checkpoint's folder.

    Raises:
        RunError: it could not be written. What was there before is untouched.
    """
    name = f"step-{examples}"
    target, temporary = os.path.join(run_dir, name), os.path.join(run_dir, name + ".tmp")
    if os.path.exists(target):
        raise RunError(f"{target} exists already; a checkpoint is never overwritten")
    _check_latest(run_dir)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) * (2 if export else 1)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise RunError(f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room; the last checkpoint is untouched")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that died while it wrote
    try:
        os.makedirs(temporary)
        torch.save(
            {"step_idx": examples, "state": dict(state), "metrics": {k: float(v) for k, v in metrics.items()}},
            os.path.join(temporary, "policy.pt"),
        )
        if export is not None:
            _try_export(export, os.path.join(temporary, "hf"))
        _sync(temporary)
        os.rename(temporary, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{target} could not be written ({error}); the last checkpoint is untouched") from error
    _point_latest(run_dir, name)
    return target


def _try_export(export: Callable[[str], None], folder: str) -> None:
    """Transformers refuses to write some models, for the generation settings they came with: the weights in policy.pt matter more."""
    try:
        export(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"warning: no Hugging Face folder was written ({' '.join(str(error).split())[:200]}); policy.pt has the weights")


def _sync(folder: str) -> None:
    """Force the folder's files to the disk before it gets its final name."""
    for place, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(place, file), "rb") as handle:
                os.fsync(handle.fileno())


def _check_latest(run_dir: str) -> None:
    latest = os.path.join(run_dir, "LATEST")
    if os.path.exists(latest) and not os.path.islink(latest):
        raise RunError(f"{latest} is a folder, of a run of the published code: move it away, or use another local_run_dir")


def _point_latest(run_dir: str, name: str) -> None:
    """LATEST always names a whole checkpoint: a new link replaces the old one in one step."""
    temporary = os.path.join(run_dir, "LATEST.tmp")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, "LATEST"))


def holds_a_run(run_dir: str) -> bool:
    """Whether a run has written into this folder."""
    if not os.path.isdir(run_dir):
        return False
    return any(name in ("config.yaml", "metrics.jsonl", "LATEST") or name.startswith("step-") for name in os.listdir(run_dir))


def read_archive(path: str) -> dict[str, torch.Tensor]:
    """The state dict of a policy.pt, also of one that the published code wrote; tensors stay on disk until they are copied.

    Raises:
        UserError: no such file, or it is no policy.pt.
    """
    if not os.path.isfile(path):
        raise UserError(f"model.archive={path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"model.archive={path} is no policy.pt: torch.save did not write it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in content["state"].items()}
    except Exception as error:  # zip, pickle and key errors: whatever it is, it is no policy.pt
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"model.archive={path} is no policy.pt, a file with {{step_idx, state, metrics}} ({reason})") from None
    return {name: tensor for name, tensor in state.items() if not name.endswith(LEGACY_BUFFERS)}


def check_archive(path: str, state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Compare an archive with a model, which may be on the meta device.

    Raises:
        UserError: keys are missing or too many, or shapes differ; it names them.
    """
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(expected) - set(state) - tied)
    unexpected = sorted(set(state) - set(expected))
    shapes = [
        f"{name} {tuple(state[name].shape)} (model: {tuple(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [("missing", missing), ("not in the model", unexpected), ("other shape", shapes)]
    found = "; ".join(f"{what}: {some_of(names, 4)}" for what, names in problems if names)
    if found:
        raise UserError(f"model.archive={path} does not fit the model: {found}")
