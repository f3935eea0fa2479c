"""Reader of `model.archive`: the policy of this project or of the published code. Code in its files is never executed."""

import os
import zipfile
from collections.abc import Mapping
from typing import Optional

import torch

from tdpo.checkpointing.checkpoints import ADAPTER, POLICY, checkpoint_of, damaged_files, has_no_policy, policy_is_sound
from tdpo.checkpointing.state_reader import read_policy
from tdpo.distributed.world import World
from tdpo.utils import RunError, UserError, some_of

# Buffers in checkpoints of 2023 that today's models no longer have.
LEGACY_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def find_archive(path: str) -> Optional[str]:
    """Return where the weights are that a path names: a policy.pt, or a checkpoint's folder, if they are in its state/ only.

    Args:
        path: a policy.pt, a checkpoint's folder, or a run's folder, of which the newest checkpoint counts.

    Returns:
        the file or folder, which is adapter/ in a checkpoint of adapters only; None for a folder of another kind.

    Raises:
        UserError: the path does not exist; the message names the folder to give if the checkpoint has no policy.pt.
    """
    if os.path.isdir(path):
        folder = checkpoint_of(path) or path
        file, adapter = os.path.join(folder, POLICY), os.path.join(folder, ADAPTER)
        if os.path.isfile(file) or not checkpoint_of(folder):
            return file if os.path.isfile(file) else None
        return adapter if os.path.isdir(adapter) else folder
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"model.archive={path} is neither a file nor a folder")
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        hint = f": its checkpoint was saved without it (save_policy); give {folder}" if has_no_policy(folder) else ""
        raise UserError(f"model.archive={path} does not exist{hint}")
    return path


def read_archive(path: str) -> dict[str, torch.Tensor]:
    """Return a state dict, without legacy buffers. Tensors of a policy.pt stay on disk (memory-mapped) until they are copied.

    Args:
        path: see `find_archive`.

    Raises:
        UserError: the path does not exist or holds no policy, or its content is not what the run has saved.
    """
    found = find_archive(path)
    if found is None:
        raise UserError(f"model.archive={path} is neither a run's folder, nor a checkpoint, nor a policy.pt")
    state = _read_state(found) if os.path.isdir(found) else _read_file(found)
    return {name: tensor for name, tensor in state.items() if not name.endswith(LEGACY_BUFFERS)}


def _read_state(folder: str) -> dict[str, torch.Tensor]:
    if damaged := damaged_files(World(), folder):
        raise UserError(f"model.archive={folder} is damaged ({some_of(damaged, 4)}): give another checkpoint")
    try:
        return read_policy(folder)
    except RunError as error:
        raise UserError(f"model.archive={error}") from None


def _read_file(path: str) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"model.archive={path} is not a policy.pt (torch.save did not write it): give one, or a Hugging Face folder")
    if not policy_is_sound(path):
        raise UserError(
            f"model.archive={path} is not what its run saved (manifest.json beside it has another hash): give another checkpoint"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in content["state"].items()}
    except Exception as error:  # zip, pickle or key errors: the file is not a policy.pt
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"model.archive={path} is not a policy.pt, a file with {{step_idx, state, metrics}} ({reason})") from None


def check_archive(path: str, state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Check that an archive has a model's keys and shapes.

    Args:
        path: the archive's path, for the message.
        state: name -> tensor of any shape, see `read_archive`.
        model: may be on the meta device.

    Raises:
        UserError: keys are missing or unexpected, shapes differ, or tensors are not dense floating-point numbers. The message names them.
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
    kinds = [
        f"{name} {str(tensor.dtype).removeprefix('torch.')}{'' if tensor.layout == torch.strided else ' sparse'}"
        for name, tensor in state.items()
        if name in expected and (tensor.is_floating_point() != expected[name].is_floating_point() or tensor.layout != torch.strided)
    ]
    problems = [("missing", missing), ("not in the model", unexpected), ("other shape", shapes), ("not floating-point numbers", kinds)]
    found = "; ".join(f"{what}: {some_of(names, 4)}" for what, names in problems if names)
    if found:
        raise UserError(f"model.archive={path} does not fit the model: {found}")
